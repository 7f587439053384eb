"""Send an embeddings folder to Qdrant, and search there.

    python examples/qdrant_upload.py runs/photos --url http://localhost:6333 --model runs/language-zh 红苹果

It can be run again: a point's number follows from its id. Without --url everything stays in memory, to try it. Needs
the package qdrant-client.
"""

from __future__ import annotations

import argparse
import sys
import uuid
from pathlib import Path
from typing import Any

import trimtab
from trimtab.errors import ModelError
from trimtab.serve.store import Embeddings

BATCH = 512


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("embeddings", type=Path, help="folder that `trimtab embed` wrote")
    parser.add_argument("queries", nargs="*", help="texts to look for afterwards")
    parser.add_argument("--url", help="of the server; in memory without it")
    parser.add_argument("--collection", help="the folder's name by default")
    parser.add_argument("--model", help="encodes the queries; the model of the embeddings by default")
    chosen = parser.parse_args(arguments)
    try:
        import qdrant_client
    except ImportError:
        sys.exit("this needs Qdrant's client: pip install qdrant-client")

    client = qdrant_client.QdrantClient(url=chosen.url) if chosen.url else qdrant_client.QdrantClient(":memory:")
    embeddings = Embeddings.open(chosen.embeddings)
    collection = chosen.collection or chosen.embeddings.resolve().name
    print(f"{upload(client, qdrant_client.models, embeddings, collection)} points in {collection}")
    if chosen.queries:
        model = trimtab.load(chosen.model or embeddings.about.model.name)
        if not embeddings.about.model.fits(model, embeddings.about.of):
            raise ModelError(f"{model.name} is of another space than {chosen.embeddings}")
        for query, vector in zip(chosen.queries, model.encode_text(chosen.queries), strict=True):
            print(query)
            for point in client.query_points(collection, query=vector.tolist(), limit=5).points:
                print(f"  {point.score:.3f}  {point.payload['id']}")


def upload(client: Any, models: Any, embeddings: Embeddings, collection: str) -> int:
    """Send all vectors; their columns are the payload. Returns how many points the collection has then."""
    if not client.collection_exists(collection):
        size = models.VectorParams(size=embeddings.about.dim, distance=models.Distance.COSINE)
        client.create_collection(collection, vectors_config=size)
    for table, vectors in embeddings.blocks():
        rows = table.to_pylist()
        for start in range(0, len(rows), BATCH):
            some = slice(start, start + BATCH)
            points = [
                models.PointStruct(
                    id=str(uuid.uuid5(uuid.NAMESPACE_URL, row["id"])),
                    vector=vector.tolist(),
                    payload={**row, "model": embeddings.about.model.fingerprint},
                )
                for row, vector in zip(rows[some], vectors[some], strict=True)
            ]
            client.upsert(collection, points=points)
    return int(client.count(collection).count)


if __name__ == "__main__":
    main()
