"""Ask a server for embeddings, names and pictures, with the standard library alone.

    python examples/serve_client.py 红苹果 --picture photo.jpg --classes 苹果 香蕉

Start one before, in another window: `trimtab serve MODEL --index DIR`. A key is read from the variable TRIMTAB_KEY.
"""

from __future__ import annotations

import argparse
import base64
import contextlib
import json
import os
import sys
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any


class Client:
    """A server by its address."""

    def __init__(self, address: str, key: str | None = None) -> None:
        self.address, self.key = address.rstrip("/"), key

    def ask(self, route: str, body: dict[str, Any] | None = None) -> Any:
        """The answer of a route; the message of an error ends the program."""
        headers = {"Content-Type": "application/json"}
        if self.key:
            headers["Authorization"] = f"Bearer {self.key}"
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(self.address + route, data, headers)
        try:
            with urllib.request.urlopen(request, timeout=60) as answer:
                return json.load(answer)
        except urllib.error.HTTPError as error:
            said = error.read().decode("utf-8", "replace")
            # Plain text comes from a server with no connection left, and from proxies.
            with contextlib.suppress(ValueError, KeyError, TypeError):
                said = json.loads(said)["error"]["message"]
            sys.exit(f"{error.code}: {said}")
        except OSError as error:
            reason = getattr(error, "reason", error)
            if data and isinstance(reason, (BrokenPipeError, ConnectionAbortedError, ConnectionResetError)):
                size = f"{len(data) / (1 << 20):.1f} MiB"
                sys.exit(f"{self.address} ended the connection ({reason}): a request of {size} may be too large for it")
            sys.exit(f"{self.address} cannot be reached ({reason}): start it with `trimtab serve MODEL`")


def in_base64(path: Path) -> str:
    return base64.b64encode(path.read_bytes()).decode("ascii")


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("text")
    parser.add_argument("--picture", type=Path, help="to be named, and compared with the text")
    parser.add_argument("--classes", nargs="+", help="names to choose from; the server's own by default")
    parser.add_argument("--address", default="http://127.0.0.1:8000")
    chosen = parser.parse_args(arguments)

    client = Client(chosen.address, os.environ.get("TRIMTAB_KEY"))
    model = client.ask("/v1/models")["data"][0]
    print(f"model {model['id']}, {model['embedding_dim']} dimensions")

    items: list[Any] = [chosen.text]
    if chosen.picture:
        items.append({"image": in_base64(chosen.picture)})
    vectors = [one["embedding"] for one in client.ask("/v1/embeddings", {"input": items})["data"]]
    if chosen.picture:
        cosine = sum(left * right for left, right in zip(*vectors, strict=True))
        print(f"cosine of {chosen.text} and {chosen.picture.name}: {cosine:.3f}")
        if chosen.classes or model["classes"]:
            body: dict[str, Any] = {"image": in_base64(chosen.picture), "top_k": 3}
            body |= {"classes": chosen.classes} if chosen.classes else {}
            for label in client.ask("/v1/classify", body)["data"][0]["labels"]:
                print(f"  {label['score']:6.1%}  {label['label']}")
    if model["index"]:
        for found in client.ask("/v1/search", {"text": chosen.text, "k": 5})["data"]:
            print(f"  {found['score']:.3f}  {found['id']}")


if __name__ == "__main__":
    main()
