"""What is answered: embeddings, labels and search results, from whatever thread or pass they come. No HTTP."""

from __future__ import annotations

import asyncio
import contextlib
import os
import threading
from collections import OrderedDict
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from itertools import groupby
from operator import itemgetter
from pathlib import Path
from typing import Any, Protocol, cast

import numpy as np
import torch

from trimtab.data.templates import fill_all
from trimtab.errors import DataError, ModelError, OutOfMemory, TrimtabError
from trimtab.serve.http.addresses import Fetcher
from trimtab.serve.http.batching import Batcher, Coming
from trimtab.serve.http.inputs import Picture, Text, check_count, fetched, is_web_address, pixels_of
from trimtab.serve.http.metrics import Metrics
from trimtab.serve.http.options import ServeOptions
from trimtab.serve.http.problems import Problem
from trimtab.serve.http.thumbnails import Thumbnails
from trimtab.towers.classifier import Classifier, Prediction, check_class_names
from trimtab.towers.dual_encoder import DualEncoder

TEXT, IMAGE = "text", "image"
LOOK = "look"
"""Pictures beside the classifier that reads more of them than their embeddings."""
_KEPT_CLASSIFIERS = 32
_TEMPLATES_AT_MOST = 16
_LONGEST_NAME = 500  # characters of a class name or template
_DECODING_THREADS = 4
_FETCHING_THREADS = 8  # which wait, and hold a body of the largest size each
_LOOKS = 8  # in a pass: each may have prompts of its own go through the text tower
_PARTS_AT_ONCE = 2  # of one request's pictures: one is preprocessed while the model has the other
_PREPROCESSED_BATCHES, _PREPROCESSED_LOOKS = 8, 32  # of all requests together
_HANGS = 4  # times the time-out of a request
_COMMON_LENGTH = 64  # characters of a text that costs as much as a common one


class SearchIndex(Protocol):
    """What the server asks of an index; `trimtab.serve.index.Index` is one."""

    @property
    def model_fingerprint(self) -> str: ...

    @property
    def checksum(self) -> str: ...

    def __len__(self) -> int: ...

    def search(self, vectors: np.ndarray, k: int = 10) -> Any: ...


class Service:
    """One model at the disposal of many requests.

    Args:
        model: owned by the service from here on: no other thread may use it.
        name: what clients call it.
        classes: names for `classify` where a request brings none; those a model was trained on by default.
        index: what `search` looks into.
        thumbnails: small copies of the indexed pictures.
    """

    def __init__(
        self,
        model: DualEncoder,
        *,
        name: str,
        options: ServeOptions | None = None,
        classes: Sequence[str] | None = None,
        index: SearchIndex | None = None,
        thumbnails: Thumbnails | None = None,
    ) -> None:
        self.model, self.name, self.index, self.thumbnails = model, name, index, thumbnails
        self.options = options or ServeOptions()
        self.metrics = Metrics()
        self.fetcher = (
            Fetcher(self.options.max_body, timeout=min(10.0, self.options.timeout)) if self.options.allow_urls else None
        )
        self.classifier = _default_classifier(model, classes)
        self.batcher = Batcher(
            {TEXT: self._forward_texts, IMAGE: self._forward_pixels, LOOK: self._forward_looks},
            max_batch=self.options.max_batch,
            max_wait=self.options.max_wait_ms / 1000,
            capacity=self.options.queue,
            patience=self.options.timeout,
            cost=self._cost,
            metrics=self.metrics,
            counted_as={LOOK: IMAGE},
        )
        self.metrics.gauge("trimtab_queue_items", "Items that wait for the model.", lambda: self.batcher.waiting)
        self.metrics.gauge("trimtab_items_in_work", "Items not yet answered.", lambda: self.batcher.reserved)
        self.metrics.gauge(
            "trimtab_pass_seconds", "How long the running pass has taken; 0 between.", lambda: self.batcher.pass_seconds
        )
        threads = min(_DECODING_THREADS, os.cpu_count() or 1)
        # Pools of their own: texts shall not wait for pictures of others, nor pictures for slow addresses.
        self._decoding = ThreadPoolExecutor(threads, "trimtab-decode")
        self._fetching = ThreadPoolExecutor(_FETCHING_THREADS, "trimtab-fetch")
        self._answering = ThreadPoolExecutor(threads, "trimtab-answer")
        self._turn = 2 * threads  # of one request in the pool at a time: the others wait for these alone
        self._part = {IMAGE: self.options.max_batch, LOOK: min(_LOOKS, self.options.max_batch)}
        self._preprocessed = {
            IMAGE: _Places(_PREPROCESSED_BATCHES * self.options.max_batch),
            LOOK: _Places(_PREPROCESSED_LOOKS),
        }
        self._classifiers: OrderedDict[tuple[Any, ...], Classifier] = OrderedDict()
        self._classifiers_lock = threading.Lock()

    def start(self) -> None:
        self.batcher.start()

    def stop(self, seconds: float = 30.0) -> bool:
        """Finish what is in the queue; False when it takes longer than `seconds`."""
        done = self.batcher.stop(seconds)
        for pool in (self._fetching, self._decoding, self._answering):
            pool.shutdown(wait=False, cancel_futures=True)
        return done

    @property
    def alive(self) -> bool:
        """Whether the model can be asked: its thread runs, and has not been in one pass for much longer than any should
        take. No one of them can be ended, so that a server of which a GPU hangs has to be started again."""
        return self.batcher.alive and self.batcher.pass_seconds < _HANGS * self.options.timeout

    @property
    def max_inputs(self) -> int:
        """Items of one call: more than fit into the queue could never be taken on."""
        return min(self.options.max_inputs, self.options.queue)

    def describe(self) -> dict[str, Any]:
        """What clients may know of the model."""
        described: dict[str, Any] = {
            "embedding_dim": self.model.embedding_dim,
            "fingerprint": self.model.fingerprint,
            "max_tokens": self.model.max_tokens,
            "languages": list(self.model.languages),
            "classes": len(self.classifier.classes) if self.classifier else 0,
            "index": None,
        }
        if self.index is not None:
            described["index"] = {
                "items": len(self.index),
                "pictures": self.thumbnails is not None,
                "checksum": self.index.checksum,
            }
        return described

    async def embed(self, items: Sequence[Text | Picture]) -> tuple[np.ndarray, int]:
        """Embeddings (N, D) float32 of unit norm, and how many tokens the texts had.

        Raises:
            Problem: an item cannot be used, there is no room, or the model failed.
        """
        with self.batcher.room(len(items)):
            return await self._embed(items)

    async def classify(
        self,
        pictures: Sequence[Picture | bytes],
        *,
        classes: Sequence[str] | None = None,
        templates: Sequence[str] | None = None,
        top_k: int = 5,
    ) -> tuple[list[list[Prediction]], Sequence[str]]:
        """The most probable names of each picture, and all names.

        Raises:
            Problem: as for `embed`; 422 for names or templates that cannot be used, and where there are none.
        """
        check_count(len(pictures), self.max_inputs, "images")
        with self.batcher.room(len(pictures)):
            classifier = await self._classifier(classes, templates)
            if classifier.reads_embeddings:
                vectors = await self._embed_pictures(pictures)
                predict = partial(classifier.predict, vectors, top_k=top_k)
            else:
                rows = await self._in_parts(LOOK, pictures, lambda image: (classifier, self.model.preprocess(image)))
                predict = partial(classifier.best, np.stack(rows), top_k)
            return await self.in_pool(predict), classifier.classes

    async def search(self, query: Text | Picture | bytes, k: int) -> list[dict[str, Any]]:
        """The nearest items of the index, best first.

        Raises:
            Problem: as for `embed`; 404 without an index, 422 for a `k` above the limit.
        """
        if self.index is None:
            raise Problem(404, "this server has no index: start it with --index DIR")
        if k > self.options.max_k:
            raise Problem(422, f"k={k} is above the limit of {self.options.max_k}", param="k")
        with self.batcher.room(1):
            if isinstance(query, Text):
                vectors, _ = await self._embed([query])
            else:
                vectors = await self._embed_pictures([query])
            hits = await self.in_pool(partial(self.index.search, vectors, min(k, len(self.index))))
        ids, scores, metadata = hits
        return [
            {"rank": rank, "id": id, "score": float(score), "metadata": dict(known)}
            for rank, (id, score, known) in enumerate(zip(ids[0], scores[0], metadata[0], strict=True), 1)
        ]

    async def thumbnail(self, id: str) -> bytes:
        """A small JPEG of an indexed picture.

        Raises:
            Problem: 404, no such item, or no picture of it.
        """
        if self.thumbnails is None:
            raise Problem(404, "this server has no pictures to show")
        return await self._decode(partial(self.thumbnails.jpeg, id))

    # Helpers

    async def _embed(self, items: Sequence[Text | Picture]) -> tuple[np.ndarray, int]:
        texts = [(at, item) for at, item in enumerate(items) if isinstance(item, Text)]
        pictures = [(at, item) for at, item in enumerate(items) if isinstance(item, Picture)]
        vectors = np.zeros((len(items), self.model.embedding_dim), np.float32)
        found, seen = await _together(
            self.batcher.submit(TEXT, [item.text for _, item in texts]),
            self._embed_pictures([item for _, item in pictures]),
        )
        tokens = 0
        for (at, _), (vector, count) in zip(texts, found, strict=True):
            vectors[at], tokens = vector, tokens + count
        for (at, _), vector in zip(pictures, seen, strict=True):
            vectors[at] = vector
        return vectors, tokens

    async def _embed_pictures(self, pictures: Sequence[Picture | bytes]) -> np.ndarray:  # (N, D)
        rows = await self._in_parts(IMAGE, pictures, self.model.preprocess)
        return np.stack(rows) if rows else np.zeros((0, self.model.embedding_dim), np.float32)

    async def _in_parts(
        self, kind: str, pictures: Sequence[Picture | bytes], finish: Callable[[Any], Any]
    ) -> list[np.ndarray]:
        """A row for each picture. Preprocessed pictures are large, so that only some are in memory at a time."""
        size = self._part[kind]
        turns = asyncio.Semaphore(_PARTS_AT_ONCE)

        async def part(start: int, coming: Coming) -> list[np.ndarray]:
            some = pictures[start : start + size]
            async with turns, self._preprocessed[kind].taken(len(some)):
                return await self.batcher.submit(kind, await self._read(some, finish, start), coming)

        with self.batcher.expecting(kind, len(pictures) * self._cost(kind, None)) as coming:
            found = await _together(*(part(start, coming) for start in range(0, len(pictures), size)))
        return [row for part in found for row in part]

    async def _read(
        self, pictures: Sequence[Picture | bytes], finish: Callable[[Any], Any], start: int = 0
    ) -> list[Any]:
        turns = asyncio.Semaphore(self._turn)

        async def read(at: int, picture: Picture | bytes) -> Any:
            where = picture.where if isinstance(picture, Picture) else f"images[{start + at}]"
            async with turns:
                if self.fetcher is not None and isinstance(picture, Picture) and is_web_address(picture.sent):
                    fetch = partial(fetched, picture, self.fetcher)
                    picture = await asyncio.get_running_loop().run_in_executor(self._fetching, fetch)
                return await self._decode(
                    partial(
                        pixels_of,
                        picture,
                        where=where,
                        max_pixels=self.options.max_pixels,
                        fetcher=self.fetcher,
                        preprocess=finish,
                    )
                )

        return await _together(*(read(at, picture) for at, picture in enumerate(pictures)))

    async def _decode(self, function: Callable[[], Any]) -> Any:
        return await asyncio.get_running_loop().run_in_executor(self._decoding, function)

    async def in_pool(self, function: Callable[[], Any]) -> Any:
        """The result of a function that takes a while, decodes no picture and does not use the model."""
        return await asyncio.get_running_loop().run_in_executor(self._answering, function)

    async def _classifier(self, classes: Sequence[str] | None, templates: Sequence[str] | None) -> Classifier:
        if classes is None:
            if templates is not None:
                raise Problem(422, "templates need classes", param="templates")
            if self.classifier is None:
                raise Problem(
                    422, "name the classes, or start the server with --classes: the model has none", param="classes"
                )
            return self.classifier
        check_names(classes, "classes", self.options.max_classes)
        if templates is not None:
            check_names(templates, "templates", _TEMPLATES_AT_MOST)
        key = (tuple(classes), None if templates is None else tuple(templates))
        with self._classifiers_lock:
            if key in self._classifiers:
                self._classifiers.move_to_end(key)
                return self._classifiers[key]
        if templates is None and _has_prompts(self.model):
            made = cast(Classifier, await self.batcher.call(partial(_make, self.model, classes)))
        else:
            made = await self._by_templates(classes, templates)
        with self._classifiers_lock:
            self._classifiers[key] = made
            while len(self._classifiers) > _KEPT_CLASSIFIERS:
                self._classifiers.popitem(last=False)
        return made

    async def _by_templates(self, classes: Sequence[str], templates: Sequence[str] | None) -> Classifier:
        """As `DualEncoder.classifier`, by passes that take turns with those of others: it may be thousands of texts."""
        with _as_problem():
            names = check_class_names(classes)
            templates = self.model.default_templates(names)[1] if templates is None else templates
            texts = fill_all(templates, names)
        check_count(len(texts), self.max_inputs, "classes times templates")
        with self.batcher.room(len(texts)):
            vectors = np.stack([vector for vector, _ in await self.batcher.submit(TEXT, texts)])
        return await self.in_pool(partial(Classifier, self.model, names, templates=templates, texts=vectors))

    def _cost(self, kind: str, item: Any) -> float:
        """Of a text by its length, up to where it is cut; a token has one to four characters."""
        if kind == TEXT:
            return max(1.0, min(len(item), 2 * self.model.max_tokens) / _COMMON_LENGTH)
        return max(1.0, self.options.max_batch / _LOOKS) if kind == LOOK else 1.0

    # Passes; the worker thread calls them

    def _forward_texts(self, texts: list[str]) -> list[tuple[np.ndarray, int]]:
        ids, _ = self.model.text_inputs.token_ids(texts)
        vectors = self.model.encode_text(texts, batch_size=len(texts))
        if cut := self.model.last_truncated:  # by the towers that they went through: English may have another one
            self.metrics.truncated.add(by=cut)
        return [(vector, len(one)) for vector, one in zip(vectors, ids, strict=True)]

    def _forward_pixels(self, pixels: list[Mapping[str, torch.Tensor]]) -> list[np.ndarray]:
        with torch.inference_mode():
            features = self.model.pixel_features(_stacked(pixels))  # (B, D)
            vectors = torch.nn.functional.normalize(features.float(), dim=-1).cpu().numpy()
        return self._finite(vectors)

    def _forward_looks(self, items: list[tuple[Any, Mapping[str, torch.Tensor]]]) -> list[np.ndarray]:
        rows: list[np.ndarray] = []  # (C,) each
        for classifier, group in groupby(items, key=itemgetter(0)):
            rows += self._finite(classifier.pixel_similarities(_stacked([pixels for _, pixels in group])))
        return rows

    def _finite(self, rows: np.ndarray) -> list[np.ndarray]:
        if not np.isfinite(rows).all():
            raise ModelError(f"{self.name} gives NaN or infinity for a picture")
        return list(rows)


def _stacked(pixels: Sequence[Mapping[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    return {name: torch.cat([one[name] for one in pixels]) for name in pixels[0]}


class _Places:
    """So many places for all requests; who waits for some is served in order."""

    def __init__(self, count: int) -> None:
        self._free = asyncio.Semaphore(count)
        self._next = asyncio.Lock()

    @contextlib.asynccontextmanager
    async def taken(self, count: int) -> AsyncIterator[None]:
        """Hold `count` places, no more than there are."""
        held = 0
        try:
            async with self._next:  # two that each hold a part would wait for each other
                while held < count:
                    await self._free.acquire()
                    held += 1
            yield
        finally:
            for _ in range(held):
                self._free.release()


async def _together(*jobs: Coroutine[Any, Any, Any]) -> list[Any]:
    """What all jobs give; if one is refused, nobody waits for the others."""
    started = [asyncio.ensure_future(job) for job in jobs]
    try:
        return list(await asyncio.gather(*started))
    finally:
        for job in started:
            job.cancel()


def check_names(names: Sequence[str], where: str, limit: int) -> None:
    """Raises:
    Problem: 422, none, too many, or one that is too long.
    """
    if not names:
        raise Problem(422, f"{where} is an empty list", param=where)
    check_count(len(names), limit, where)
    for at, name in enumerate(names):
        if len(name) > _LONGEST_NAME:
            raise Problem(422, f"{where}[{at}] has {len(name)} characters; {_LONGEST_NAME} are the limit", param=where)


def check_index(index: SearchIndex, model: DualEncoder, folder: str | Path) -> None:
    """Refuse an index whose vectors another model made.

    Raises:
        ModelError: with what to do.
    """
    if hasattr(index, "check_model"):
        index.check_model(model)
    elif index.model_fingerprint != model.fingerprint:
        raise ModelError(
            f"the index {folder} was made by another model than {model.name}: embed and index again with this one"
        )


def _default_classifier(model: DualEncoder, classes: Sequence[str] | None) -> Classifier | None:
    if classes is not None:
        return model.classifier(classes)
    try:
        return model.classifier()
    except DataError:  # it was not trained on classes
        return None


def _has_prompts(model: Any) -> bool:
    """Whether names of classes stand in learned prompts rather than in templates."""
    return hasattr(getattr(model, "prompt", None) if hasattr(model, "core") else model, "prompt_tower")


def _make(model: DualEncoder, classes: Sequence[str]) -> Classifier:
    with _as_problem():
        return model.classifier(classes)


@contextlib.contextmanager
def _as_problem() -> Iterator[None]:
    try:
        yield
    except OutOfMemory:  # nothing that the client can mend
        raise
    except TrimtabError as error:
        raise Problem(422, str(error), param="classes") from error
