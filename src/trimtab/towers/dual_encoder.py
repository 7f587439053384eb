"""The object that `trimtab.load` returns: images and texts to unit-norm embeddings in one space."""

from __future__ import annotations

import contextlib
import copy
import logging
import operator
import os
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence, Sized
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from trimtab.data.images import ImageError, SkippedImages, StoredPicture, read_image
from trimtab.data.templates import default_templates
from trimtab.errors import DataError, ModelError, TrimtabError
from trimtab.files import explain_disk_errors, open_up
from trimtab.towers.freezing import image_processor_digest
from trimtab.towers.passes import Passes, per_pass, results, rows_of
from trimtab.towers.publishing import hide_places
from trimtab.towers.resizing import shrunk
from trimtab.towers.tokens import TextInputs
from trimtab.towers.turns import Turn

if TYPE_CHECKING:
    from transformers import BaseImageProcessor

    from trimtab.data.images import ImageSource
    from trimtab.towers.classifier import Classifier

logger = logging.getLogger(__name__)

# Processors scale the short side to the tower's size: a strip of 1 x 100,000 pixels would become gigabytes.
_MAX_ASPECT = 500
_DECODING_THREADS = 4
_UNIT = 0.01  # how far from 1 a norm may be, after half precision too


@dataclass(frozen=True)
class Family:
    """What differs between model families.

    Attributes:
        model_class: name of the transformers class.
        pad_to_limit: see `TextInputs`.
        mask_by_tokenizer: pass an attention mask only if the tokenizer says so: SigLIP sees its padding.
        projects_tokens: `get_*_features` projects every token rather than a pooled vector; the first is the
            embedding.
        pools_end_token: the text vector is read at the end token, so the tokenizer must write it.
    """

    model_class: str
    pad_to_limit: bool = False
    mask_by_tokenizer: bool = False
    projects_tokens: bool = False
    pools_end_token: bool = False


class _NoDomainLinkError(ModelError, AttributeError):
    """Also an AttributeError, so that `hasattr` says what it should."""


class DualEncoder:
    """A frozen image tower and a frozen text tower with a shared embedding space.

    Threads may share it, and models of one base too: they take turns, one pass at a time.

    Attributes:
        name: what it was loaded by.
        family: the model type of its configuration.
        embedding_dim: D of the embeddings.
        logit_scale: multiplies cosines to give logits; `logit_bias` is added to them (SigLIP, else 0).
        model: the transformers model, frozen and in eval mode.
        text_inputs: its tokenizer, context length and padding.
        image_processor: resizes and normalises decoded images.
        last_skipped: images that the last `encode_image` left out, of whatever thread.
        last_truncated: how many texts the last `encode_text` cut to the context length.
        turn: held while a pass runs, here and in every model on the same towers; to be taken around the methods below
            that give tensors, where several threads use these.
        languages: tags of those that a language link here or below was trained on, and `english`, which way it sends
            English; see `trimtab.adapters.adapted.LanguageAdapted`.
    """

    languages: tuple[str, ...] = ()
    english: Literal["route", "adapter"] = "route"

    def __init__(
        self,
        model: nn.Module,
        text_inputs: TextInputs,
        image_processor: BaseImageProcessor,
        *,
        name: str,
        family: str,
        facts: Family,
        fingerprint: str,
    ) -> None:
        self.model: Any = model
        self.text_inputs = self._own_text_inputs = text_inputs
        self.image_processor = image_processor
        self.name = name
        self.family = family
        self._fingerprint = fingerprint
        self._known_fingerprint = "", ""  # of the model below, and the one here
        self.last_skipped = SkippedImages()
        self.last_truncated = 0
        self.turn = Turn()
        self._facts = facts
        scale, bias = getattr(model, "logit_scale", None), getattr(model, "logit_bias", None)
        self.logit_scale = float(scale.detach().float().exp()) if isinstance(scale, Tensor) else 1.0
        self.logit_bias = float(bias.detach().float()) if isinstance(bias, Tensor) else 0.0
        with torch.no_grad():
            self.embedding_dim = self.text_features(["a"]).shape[-1]

    def __repr__(self) -> str:
        kind = type(self).__name__
        return f"{kind}({self.name!r}, family={self.family!r}, embedding_dim={self.embedding_dim})"

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return next(self.model.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        """Precision of the weights."""
        return next(parameter.dtype for parameter in self.model.parameters() if parameter.is_floating_point())

    @property
    def fingerprint(self) -> str:
        """Names its weights and configuration, as they are now; see `trimtab.towers.freezing.fingerprint`."""
        return self._fingerprint

    def _once_for(self, below: str, make: Callable[[], str]) -> str:
        """The fingerprint that `make` gives, made again when that of the model below is another."""
        if self._known_fingerprint[0] != below:
            self._known_fingerprint = below, make()
        return self._known_fingerprint[1]

    @property
    def image_fingerprint(self) -> str:
        """Names what decides where pictures land: of two models that differ in their texts alone it is the same."""
        return self.fingerprint

    @property
    def text_input_digest(self) -> str:
        """Names what turns texts into the tokens of the base's own text tower: tokenizer, context length, padding.

        It is no part of `fingerprint`, which names that of a student.
        """
        return self._own_text_inputs.digest

    @property
    def image_input_digest(self) -> str:
        """Names what turns pictures into pixels: the settings of the image processor. No part of `fingerprint`."""
        return image_processor_digest(self.image_processor)

    @property
    def digests(self) -> tuple[str, str, str]:
        """Names all that decides what the model gives: its weights, and what turns texts and pictures into inputs."""
        return self.fingerprint, self.text_input_digest, self.image_input_digest

    @property
    def max_tokens(self) -> int:
        """Context length of the text tower, special tokens included."""
        return self.text_inputs.limit

    @property
    def alpha(self) -> float:
        """The dial of the domain link: 0 is the base, 1 as trained. Another alpha is another fingerprint.

        This, `gate`, `memory` and `states_below` are those of the domain link, which is here or below; see
        `trimtab.adapters.domain.DomainAdapted`.

        Raises:
            ModelError: there is none.
        """
        return float(self._with_domain().alpha)

    @alpha.setter
    def alpha(self, value: float) -> None:
        self._with_domain().alpha = value

    @property
    def gate(self) -> Any:
        """What leaves pictures from elsewhere to the base; None adapts all. See `alpha`."""
        return self._with_domain().gate

    @gate.setter
    def gate(self, gate: Any) -> None:
        self._with_domain().gate = gate

    @property
    def memory(self) -> Any:
        """Training pictures that new ones are drawn towards; None draws to none. See `alpha`."""
        return self._with_domain().memory

    @memory.setter
    def memory(self, memory: Any) -> None:
        self._with_domain().memory = memory

    @property
    def states_below(self) -> Any:
        """What lies below the adapters, kept from pass to pass; None keeps nothing. See `alpha`."""
        return self._with_domain().states_below

    @states_below.setter
    def states_below(self, states: Any) -> None:
        self._with_domain().states_below = states

    def _with_domain(self) -> DualEncoder:
        """The domain link here or below, which has these as its own."""
        below = self.__dict__.get("base")
        if below is None:
            raise _NoDomainLinkError(f"{self.name} has no domain link, and alpha, gate and memory are parts of one")
        return below._with_domain()

    def to(self, device: str | torch.device) -> DualEncoder:
        """Move the weights; returns itself."""
        self.model.to(device)
        return self

    def __copy__(self) -> Any:
        twin = object.__new__(type(self))
        twin.__dict__.update(self.__dict__)
        return twin

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        twin = memo[id(self)] = object.__new__(type(self))
        twin.__dict__.update(copy.deepcopy(self.__dict__, memo))
        return twin

    def __reduce_ex__(self, protocol: Any) -> Any:
        # Half of what transformers hooks into a tower cannot be pickled, and a worker is better off with the name.
        raise ModelError(
            f"{self.name} is loaded and cannot be pickled: give other processes its name, and trimtab.load it there; "
            "save_pretrained writes it to a folder"
        )

    # Arrays for users

    def encode_image(
        self,
        images: Iterable[ImageSource] | ImageSource,
        *,
        batch_size: int = 64,
        progress: bool = False,
        on_error: Literal["raise", "skip"] = "raise",
    ) -> np.ndarray:
        """Embed images.

        Args:
            images: any number of paths, file contents, PIL images or arrays, also from a generator; or one.
            batch_size: most images per forward pass; a CPU takes fewer, which it is faster with.
            progress: show a bar.
            on_error: "skip" leaves out images that cannot be used and lists them in `last_skipped`.

        Returns:
            (N, D) float32, unit norm; N counts the images that were used.

        Raises:
            ImageError: an image cannot be used and `on_error` is "raise".
        """
        parts: list[np.ndarray] = []
        passes = Passes(batch_size)

        def embed(pixels: dict[str, Tensor], span: slice) -> np.ndarray:
            return self._embeddings(self.pixel_features(rows_of(pixels, span)), "an image")

        for pixels in self.pixel_batches(images, batch_size=batch_size, progress=progress, on_error=on_error):
            with torch.inference_mode(), self.turn:
                parts += passes.of(partial(embed, pixels), len(next(iter(pixels.values()))))
        return np.concatenate(parts) if parts else np.zeros((0, self.embedding_dim), np.float32)

    def encode_text(self, texts: Iterable[str] | str, *, batch_size: int = 256, progress: bool = False) -> np.ndarray:
        """Embed texts.

        Texts longer than the context are cut with their end token kept; `last_truncated` counts them.

        Args:
            texts: any number of texts, also from a generator; or one.
            batch_size: most texts per forward pass, fewer on a CPU; texts of like length share a pass.
            progress: show a bar.

        Returns:
            (N, D) float32, unit norm, in the order of `texts`.

        Raises:
            DataError: an item is not a text.
        """
        _check_batch_size(batch_size)
        texts = as_texts(texts)
        embeddings = np.zeros((len(texts), self.embedding_dim), np.float32)
        self.last_truncated = 0
        batches = self.text_inputs.batches(texts, per_pass(batch_size, "texts", self.device))
        passes = Passes(batch_size)

        def embed(batch: tuple[list[int], dict[str, Tensor], list[int], int]) -> tuple[list[int], np.ndarray, int]:
            positions, tokens, _, cut = batch

            def run(span: slice) -> np.ndarray:
                return self._embeddings(self.token_features(rows_of(tokens, span)), "a text")

            return positions, np.concatenate(passes.of(run, len(positions))), cut

        # Adapted models change their base while a pass runs.
        several = type(self) is DualEncoder
        with (
            _progress_bar(texts, "texts", progress) as advance,
            contextlib.closing(results(embed, batches, self.device, threads=several, turn=self.turn)) as found,
        ):
            for positions, some, cut in found:
                embeddings[positions] = some
                self.last_truncated += cut
                advance(len(positions))
        if self.last_truncated:
            logger.warning(
                "%d of %d texts were longer than the %d tokens that %s reads, and were cut",
                self.last_truncated, len(texts), self.max_tokens, self.name,
            )  # fmt: skip
        return embeddings

    def similarity(self, images: Any, texts: Any) -> np.ndarray:
        """Cosine of every image with every text.

        Args:
            images: embeddings (N, D), or what `encode_image` takes.
            texts: embeddings (M, D), or what `encode_text` takes.

        Returns:
            (N, M) float32. Logits are ``logit_scale * cosine + logit_bias``.
        """
        image_side = images if self._are_embeddings(images) else self.encode_image(images)
        text_side = texts if self._are_embeddings(texts) else self.encode_text(texts)
        return np.asarray(image_side, np.float32) @ np.asarray(text_side, np.float32).T

    def default_templates(self, names: Sequence[str]) -> tuple[str, list[str]]:
        """Whom templates are for, and the templates; see `trimtab.data.templates.default_templates`."""
        return default_templates(names, self.languages if self.english == "adapter" else ())

    def classifier(self, classes: Sequence[str] | None = None, *, templates: Sequence[str] | None = None) -> Classifier:
        """A classifier of images by class names, without training.

        Args:
            classes: the names; only a model that was trained on classes may leave them out.
            templates: sentences with one ``{}`` each; None takes `default_templates`.

        Raises:
            DataError: there are no names, or one is empty or stands twice.
            RecipeError: a template has not exactly one ``{}``.
        """
        from trimtab.towers.classifier import Classifier  # it builds on this module

        if classes is None:
            raise DataError(f"{self.name} was not trained on classes: give their names, classifier(['cat', 'dog'])")
        return Classifier(self, classes, templates=templates)

    # Tensors for tasks and adapters; the gradient mode is the caller's

    def pixel_batches(
        self,
        images: Iterable[ImageSource] | ImageSource,
        *,
        batch_size: int = 64,
        progress: bool = False,
        on_error: Literal["raise", "skip"] = "raise",
    ) -> Iterator[dict[str, Tensor]]:
        """Input tensors of images, batch by batch, decoded ahead; arguments and errors as for `encode_image`."""
        if on_error not in ("raise", "skip"):
            raise ValueError(f"on_error={on_error!r} must be 'raise' or 'skip'")
        _check_batch_size(batch_size)
        batch_size = per_pass(batch_size, "images", self.device)
        sources = _as_sources(images)
        self.last_skipped = SkippedImages()
        with _progress_bar(sources, "images", progress) as advance:
            for batch in self._decode_ahead(sources, batch_size):
                pixels = []
                for index, future in batch:
                    try:
                        pixels.append(future.result())
                    except ImageError as error:
                        if on_error == "raise":
                            raise
                        self.last_skipped.add(index, error)
                if pixels:
                    yield _stack(pixels)
                advance(len(batch))

    def text_features(self, texts: Sequence[str] | str) -> Tensor:
        """Features of one batch of texts, (B, D), not normalised; by the way that `encode_text` sends them."""
        return self.token_features(self.text_inputs(as_texts(texts)))

    def image_features(self, images: Sequence[Image.Image]) -> Tensor:
        """Features of one batch of decoded RGB images, (B, D), not normalised."""
        return self.pixel_features(_stack([self.preprocess(image) for image in images]))

    def token_features(self, tokens: dict[str, Tensor]) -> Tensor:
        """Features (B, D) of what `text_inputs` returns."""
        return self._features(self.model.get_text_features(**self._on_device(tokens)))

    def pixel_features(self, pixels: dict[str, Tensor]) -> Tensor:
        """Features (B, D) of what `preprocess` returns, stacked along the first axis."""
        return self._features(self.model.get_image_features(**self._on_device(pixels)))

    def preprocess(self, image: Image.Image) -> dict[str, Tensor]:
        """One decoded RGB image as the image tower's input tensors, with a leading axis of 1."""
        if max(image.size) > _MAX_ASPECT * min(image.size):
            size = f"{image.width}x{image.height}"
            raise ImageError(f"<image {size}>", f"is too narrow ({size}): crop it to at most {_MAX_ASPECT}:1")
        return dict(self.image_processor(images=[shrunk(image, self.image_processor)], return_tensors="pt"))

    # Saving

    def save_pretrained(self, folder: str | Path) -> Path:
        """Write model, tokenizer and image processor as an ordinary transformers folder.

        Everything is written beside `folder` first and moved in when complete, the configuration last.
        """
        folder = Path(folder)
        if os.name == "nt" and type(self) is DualEncoder and folder.resolve() == Path(self.name).resolve():
            raise TrimtabError(f"{folder} is where this model was loaded from, and still in use: choose another folder")
        with explain_disk_errors(folder):
            folder.parent.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}.") as temporary:
                try:
                    self._write(temporary)
                except OSError:
                    raise
                except Exception as error:  # safetensors hides the number of an OSError in its text
                    raise TrimtabError(f"cannot write {folder}: {error}") from error
                open_up(temporary)
                folder.mkdir(exist_ok=True)
                for path in sorted(Path(temporary).iterdir(), key=lambda path: path.name == "config.json"):
                    path.replace(folder / path.name)
        return folder

    def push_to_hub(
        self,
        repo_id: str,
        *,
        private: bool | None = None,
        token: str | None = None,
        commit_message: str = "Upload with trimtab",
    ) -> str:
        """Upload what `save_pretrained` writes to a hub repository, made if need be; returns its address.

        Of absolute paths in descriptions only the last part is uploaded.

        Raises:
            TrimtabError: the hub refused or cannot be reached.
        """
        from huggingface_hub import HfApi

        with tempfile.TemporaryDirectory() as temporary:
            folder = self.save_pretrained(Path(temporary) / "model")
            hide_places(folder)
            try:
                api = HfApi(token=token)
                address = api.create_repo(repo_id, private=private, exist_ok=True)
                api.upload_folder(repo_id=repo_id, folder_path=folder, commit_message=commit_message)
            except Exception as error:  # the hub client raises a dozen unrelated kinds
                raise TrimtabError(f"cannot upload to {repo_id}: {error}") from error
        return str(address)

    def _write(self, folder: str) -> None:
        from trimtab.towers.parts import quiet

        with quiet():
            self.model.save_pretrained(folder)
            self.text_inputs.tokenizer.save_pretrained(folder)
            self.image_processor.save_pretrained(folder)

    # Helpers

    def _features(self, output: Any) -> Tensor:
        # transformers 5 returns an output object; models that bring their own code may return the tensor.
        features = output if isinstance(output, Tensor) else output.pooler_output
        return features[:, 0] if self._facts.projects_tokens else features

    def _on_device(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        device, dtype = self.device, self.dtype
        return {
            name: tensor.to(device, dtype) if tensor.is_floating_point() else tensor.to(device)
            for name, tensor in tensors.items()
        }

    def _embeddings(self, features: Tensor, what: str) -> np.ndarray:
        embeddings = nn.functional.normalize(features.float(), dim=-1).cpu().numpy()
        if not np.isfinite(embeddings).all():
            hint = "" if self.dtype == torch.float32 else f"; load it with dtype='float32' rather than {self.dtype}"
            raise ModelError(f"{self.name} gives NaN or infinity for {what}: its weights are damaged{hint}")
        return embeddings

    def _are_embeddings(self, value: Any) -> bool:
        if isinstance(value, Tensor):
            raise DataError(f"a tensor of torch {tuple(value.shape)}: give embeddings as a NumPy array, tensor.numpy()")
        if not isinstance(value, np.ndarray) or value.dtype.kind != "f" or value.shape[1:] != (self.embedding_dim,):
            return False
        norms = np.linalg.norm(value.astype(np.float32), axis=1)
        if not ((np.abs(norms - 1) < _UNIT) | (norms == 0)).all():  # zeros stand for pictures that were left out
            raise DataError(
                f"floats {value.shape} are taken for embeddings, whose rows have unit norm, and these have not: divide "
                "them by their norms, or give a picture as uint8 or in a list"
            )
        return True

    def _read(self, source: ImageSource) -> dict[str, Tensor]:
        image = read_image(source)
        try:
            return self.preprocess(image)
        except ImageError as error:
            if isinstance(source, (str, Path)):
                raise ImageError(str(source), error.reason) from None
            raise

    def _decode_ahead(
        self, sources: Iterable[ImageSource], batch_size: int
    ) -> Iterator[list[tuple[int, Future[dict[str, Tensor]]]]]:
        """Batches of (position, pixels to come); the next one is decoded while the tower works on this."""
        numbered = enumerate(sources)
        pool = ThreadPoolExecutor(min(_DECODING_THREADS, os.cpu_count() or 1))

        def submit() -> list[tuple[int, Future[dict[str, Tensor]]]]:
            return [(index, pool.submit(self._read, source)) for index, source in islice(numbered, batch_size)]

        try:
            ahead = submit()
            while ahead:
                batch, ahead = ahead, submit()
                yield batch
        finally:
            pool.shutdown(cancel_futures=True)


def _stack(pixels: Sequence[dict[str, Tensor]]) -> dict[str, Tensor]:
    return {name: torch.cat([one[name] for one in pixels]) for name in pixels[0]}


def as_texts(texts: Iterable[str] | str) -> list[str]:
    """Several texts as a list, and one as a list of one.

    Raises:
        DataError: neither; what the items are is for the tokenizer to check.
    """
    if isinstance(texts, str):
        return [texts]
    try:
        return list(texts)
    except TypeError as error:
        raise DataError(f"texts are a {type(texts).__name__}: give a text, or several") from error


def _as_sources(images: Any) -> Iterable[ImageSource]:
    """Several pictures as they are, and one as a list of one.

    Raises:
        DataError: neither, or an array that could be either.
    """
    channels = (1, 3, 4)
    if isinstance(images, np.ndarray):
        if images.ndim == 3 and images.shape[0] in channels and images.shape[2] not in channels:
            raise DataError(
                f"an array {images.shape} is one picture with its channels first, or several grey ones: put the "
                "channels last, array.transpose(1, 2, 0), or give a list of pictures"
            )
        return [images] if images.ndim == 2 or (images.ndim == 3 and images.shape[2] in channels) else images
    if isinstance(images, (str, os.PathLike, bytes, bytearray, Image.Image, StoredPicture)):
        return [images]  # type: ignore[list-item]
    try:
        if isinstance(images, Tensor) or hasattr(images, "read"):  # these have rows and lines
            raise TypeError
        return iter(images) if not isinstance(images, Iterable) else images  # as torch's data sets
    except TypeError as error:
        raise DataError(
            f"pictures are a {type(images).__name__}: give paths, the bytes of files, PIL images or NumPy arrays "
            "(H, W, 3)"
        ) from error


def _check_batch_size(batch_size: int) -> None:
    try:
        operator.index(batch_size)
    except TypeError:
        raise TypeError(f"batch_size={batch_size!r} must be a whole number") from None
    if batch_size < 1:
        raise ValueError(f"batch_size={batch_size} must be at least 1")


@contextlib.contextmanager
def _progress_bar(items: Iterable[Any], what: str, show: bool) -> Iterator[Any]:
    """Yield a function that advances a bar of `items` by a count."""
    if not show:
        yield lambda count: None
        return
    from rich.progress import Progress

    total = len(items) if isinstance(items, Sized) else None
    with Progress(transient=True) as bar:
        task = bar.add_task(what, total=total)
        yield lambda count: bar.advance(task, count)
