"""Text towers that read input embeddings in place of tokens, and the patch tokens of image towers.

This is the only place that knows how families differ for prompts. A prompt is assembled as

    [start tokens][learned tokens][class name][class-specific tokens][end tokens]

in embedding space. The tower's own forward pass runs on it: for a while its table of token embeddings gives the
assembled states, and the token ids that go with them are made so that positions, mask and pooling are right. Causal
towers have a faster way with the same result: `trimtab.towers.prefix_reuse`.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from trimtab.errors import DataError, ModelError, RecipeError
from trimtab.towers.dual_encoder import DualEncoder
from trimtab.towers.layers import TowerCut, _set, sites, tower_module

MEMORY = 512 << 20
"""Bytes that the activations of one pass may take, unless said otherwise."""

# Names of the table of token embeddings, by family.
_TABLES = ("token_embedding", "word_embeddings")
_ORDINARY = "a"  # its token stands in for learned ones among the token ids
_FLOATS_PER_TOKEN = 24  # activations of a Transformer layer, in widths of a token

_GROUPS, _GROUP_ROWS = 4, 24  # rows of like length run together: at most so many groups, of so many rows each

Job = TypeVar("Job")


@dataclass(frozen=True, eq=False)
class PromptLayout:
    """Where the tokens of C classes stand in rows of one length T.

    Attributes:
        inputs: the tower's token tensors (C, T); the ids of learned tokens are those of an ordinary token.
        states: (C, T, W) token embeddings, to be overwritten where tokens are learned.
        prompt_at: (C, P) columns of learned tokens before the name.
        extra_at: (C, E) columns of class-specific tokens behind it.
        name_at: (C,) first column of the name.
        end_at: (C,) last column that is not padding.
    """

    inputs: dict[str, Tensor]
    states: Tensor
    prompt_at: Tensor
    extra_at: Tensor
    name_at: Tensor
    end_at: Tensor

    def __len__(self) -> int:
        return len(self.states)

    @property
    def length(self) -> int:
        """T."""
        return self.states.shape[1]

    def take(self, classes: Tensor | slice) -> PromptLayout:
        """The rows of some classes, repeats allowed."""
        return PromptLayout(
            {name: tensor[classes] for name, tensor in self.inputs.items()},
            *(getattr(self, name)[classes] for name in ("states", "prompt_at", "extra_at", "name_at", "end_at")),
        )


class PromptTower:
    """The text tower of a base, fed with input embeddings.

    Not for several threads at once: the model is changed while a pass runs.

    Args:
        base: a dual encoder. Of one that reads a further language through a student, the tower below it is taken, with
            the adapters that a domain has there.
        memory: bytes that the activations of one pass may take.

    Attributes:
        base: whose tower it is.
        width: W of the input embeddings; `state_width` that of the states between layers.
        layers: Transformer layers.
        causal: whether tokens see only those before them.
        padded_left: whether padding comes first.

    Raises:
        ModelError: the tower's layers or its table of token embeddings are not known.
    """

    def __init__(self, base: DualEncoder, *, memory: int = MEMORY) -> None:
        core: Any = getattr(base, "core", base)  # of a composed model
        self.base: DualEncoder = core.base if hasattr(core, "student") else core
        self.memory = memory
        self._sites = sites(self.base, "text", "layers")
        self._table = _token_table(self.base)
        self.width: int = self._table.embedding_dim
        self.state_width = self._sites[0].width_in
        self.layers = len(self._sites)
        self.causal = self._sites[0].causal
        inputs = self.base.text_inputs
        self.padded_left = (inputs.padding_side or inputs.tokenizer.padding_side) == "left"
        # Padding that the tower sees is part of the text.
        self._may_trim = not self.padded_left and not inputs.pad_to_limit and (inputs.use_mask or self.causal)
        special = set(inputs.tokenizer.all_special_ids)
        ids = inputs.token_ids([_ORDINARY])[0][0]
        words = [at for at, token in enumerate(ids) if token not in special]
        if not words:
            raise ModelError(f"the tokenizer of {self.base.name} has no token for {_ORDINARY!r}: it takes no prompts")
        self._start, self._end = ids[: words[0]], ids[words[-1] + 1 :]
        self._filler = ids[words[-1]]

    @property
    def device(self) -> torch.device:
        """Where the tower is."""
        return self.base.device

    @property
    def room(self) -> int:
        """Tokens that a prompt may have between the start and end tokens."""
        return self.base.max_tokens - len(self._start) - len(self._end)

    def name_tokens(self, names: Sequence[str]) -> list[list[int]]:
        """Token ids of class names as they stand in the middle of a text; none is cut."""
        behind = self.tokens_of([f"{_ORDINARY} {name}" for name in names])
        alone = self.tokens_of(names)
        # Some tokenizers write the blank before a word into its token.
        return [ids[1:] if ids[:1] == [self._filler] else bare for ids, bare in zip(behind, alone, strict=True)]

    def tokens_of(self, texts: Sequence[str]) -> list[list[int]]:
        """Token ids of texts without start and end tokens."""
        found = []
        for ids in self.base.text_inputs.whole_token_ids(texts):
            start = len(self._start) if ids[: len(self._start)] == self._start else 0
            stop = len(ids) - len(self._end) if self._end and ids[-len(self._end) :] == self._end else len(ids)
            found.append(ids[start:stop])
        return found

    @torch.no_grad()
    def embedded(self, text: str) -> Tensor:
        """Input embeddings (T, W) of a text without start and end tokens."""
        ids = torch.tensor(self.tokens_of([text])[0], dtype=torch.long, device=self.device)
        return self._table(ids).float()

    @torch.no_grad()
    def layout(self, names: Sequence[str], *, prompt: int, extra: int = 0) -> PromptLayout:
        """Rows for class names behind `prompt` learned tokens and before `extra` class-specific ones.

        Raises:
            DataError: a name is too long for the tower's context beside the learned tokens.
        """
        tokens = self.name_tokens(names)
        free = self.room - prompt - extra
        for name, ids in zip(names, tokens, strict=True):
            if len(ids) > free:
                raise DataError(
                    f"class name {name!r:.80} has {len(ids)} tokens, but beside {prompt + extra} learned ones the text "
                    f"tower of {self.base.name} has room for {max(0, free)}: shorten the name, or learn fewer tokens"
                )
        fillers = [self._filler] * prompt, [self._filler] * extra
        rows = [[*self._start, *fillers[0], *ids, *fillers[1], *self._end] for ids in tokens]
        inputs = {name: tensor.to(self.device) for name, tensor in self.base.text_inputs.pad(rows).items()}
        if self.causal and not self.padded_left:  # what follows the end token is never seen
            inputs = {name: tensor[:, : max(map(len, rows))] for name, tensor in inputs.items()}
        length = inputs["input_ids"].shape[1]
        begin = torch.tensor([length - len(row) if self.padded_left else 0 for row in rows])
        name_at = begin + len(self._start) + prompt
        extra_at = name_at + torch.tensor([len(ids) for ids in tokens])
        places = {
            "prompt_at": (name_at - prompt)[:, None] + torch.arange(prompt),
            "extra_at": extra_at[:, None] + torch.arange(extra),
            "name_at": name_at,
            "end_at": begin + torch.tensor([len(row) - 1 for row in rows]),
        }
        states = self._table(inputs["input_ids"]).float()
        return PromptLayout(inputs, states, **{name: place.to(self.device) for name, place in places.items()})

    # Prompts through the whole tower

    def assemble(self, layout: PromptLayout, prompt: Tensor, extra: Tensor | None = None) -> Tensor:
        """Input embeddings (R, T, W) of rows with learned tokens in their places.

        Args:
            prompt: (R, P, W), or (1, P, W) for all rows alike.
            extra: (R, E, W).
        """
        states = put(layout.states, layout.prompt_at, prompt)
        return states if extra is None else put(states, layout.extra_at, extra)

    def features(self, layout: PromptLayout, prompt: Tensor, extra: Tensor | None = None) -> Tensor:
        """Features (R, D) of rows; arguments as for `assemble`. Runs in passes that fit into `memory`."""
        prompt = prompt.expand(len(layout), -1, -1)

        def run(rows: Tensor) -> Tensor:
            some = self.trimmed(layout.take(rows))
            states = self.assemble(some, prompt[rows], None if extra is None else extra[rows])
            with self._reading(states):
                return self.base.token_features(some.inputs)

        order, jobs, fits = self._by_length(layout, self.layers)
        return torch.cat(passes(run, jobs, keep=fits))[order.argsort()]

    def trimmed(self, layout: PromptLayout) -> PromptLayout:
        """The rows without columns that are padding in all of them, where the tower does not see padding."""
        if not self._may_trim:
            return layout
        length = int(layout.end_at.max()) + 1
        return replace(
            layout,
            inputs={name: tensor[:, :length] for name, tensor in layout.inputs.items()},
            states=layout.states[:, :length],
        )

    def _by_length(self, layout: PromptLayout, layers: int) -> tuple[Tensor, list[Tensor], bool]:
        """Rows in an order of like length, and parts of it that fit into `memory` and have little padding.

        The last result says whether the activations of all parts fit at once.
        """
        order = torch.argsort(layout.end_at, stable=True)
        groups = max(1, min(_GROUPS, len(order) // _GROUP_ROWS)) if self._may_trim else 1
        jobs, tokens = [], 0
        for group in torch.tensor_split(order, groups):
            length = int(layout.end_at[group].max()) + 1 if self._may_trim else layout.length
            jobs += [group[span] for span in self.spans(len(group), length, layers)]
            tokens += len(group) * length
        return order, jobs, tokens <= rows_per_pass(self.memory, 1, self.state_width, layers)

    # Prompts of which a part joins at a later layer

    def entering(self, layout: PromptLayout, layer: int, prompt: Tensor, extra: Tensor | None = None) -> Tensor:
        """States (R, T, state_width) that enter a layer, from 1 on; other arguments as for `assemble`.

        Raises:
            ModelError: the text tower has adapters, which a pass that ends or begins at a layer would miss.
        """
        placed = self.base.adapters.placed() if hasattr(self.base, "adapters") else []
        if any(site.tower == "text" for site, _ in placed):
            raise ModelError(
                f"{self.base.name} has adapters on its text tower, and prompt.instance.layer={layer} would pass them "
                "by: set prompt.instance.layer=0, or train the domain with tower: image alone"
            )
        cut = TowerCut(self.base, "text", self._sites[layer])
        with self._reading(self.assemble(layout, prompt, extra)):
            return cut.entering(layout.inputs)

    def shifted(self, layout: PromptLayout, layer: int, states: Tensor, classes: Tensor, shift: Tensor) -> Tensor:
        """Features (R, D) of rows whose last M learned tokens before the name are shifted at a layer.

        Args:
            layout: of C classes.
            states: (C, T, state_width) from `entering`.
            classes: (R,) the class of each row.
            shift: (R, M, state_width), added to the states.
        """
        cut = TowerCut(self.base, "text", self._sites[layer])
        at = layout.prompt_at[:, layout.prompt_at.shape[1] - shift.shape[1] :]

        def run(rows: Tensor) -> Tensor:
            some = classes[rows]
            inputs = self.trimmed(layout.take(some)).inputs
            length = inputs["input_ids"].shape[1]
            index = at[some][:, :, None].expand(-1, -1, states.shape[2])
            moved = states[some][:, :length].scatter_add(1, index, shift[rows].to(states.dtype))
            return cut.upper({"states": moved}, inputs)

        order, jobs, fits = self._by_length(layout.take(classes), self.layers - layer)
        return torch.cat(passes(run, jobs, keep=fits))[order.argsort()]

    # Memory

    def spans(self, count: int, length: int, layers: int | None = None) -> list[slice]:
        """`count` rows of so many tokens in parts whose activations fit into `memory`.

        Args:
            layers: that rows run through; all by default. Without gradients only one layer's activations are held.
        """
        held = (self.layers if layers is None else layers) if torch.is_grad_enabled() else 1
        size = rows_per_pass(self.memory, length, self.state_width, held)
        return [slice(start, min(start + size, count)) for start in range(0, count, size)]

    @contextlib.contextmanager
    def _reading(self, states: Tensor) -> Iterator[None]:
        """Within it, and in this thread, the table of token embeddings gives `states` (R, T, W)."""
        mine, own = threading.get_ident(), self._table.forward
        states = states.to(self._table.weight.dtype)

        def lookup(ids: Tensor) -> Tensor:
            return states if threading.get_ident() == mine else own(ids)

        with _set(self._table, "forward", lookup):
            yield


def passes(run: Callable[[Job], Tensor], jobs: Sequence[Job], *, keep: bool = False) -> list[Tensor]:
    """What `run` gives for each job.

    Where gradients are recorded and there are several jobs, the activations of each are forgotten and computed again
    on the way back.

    Args:
        keep: there is room for the activations of all jobs, so none are forgotten.
    """
    if keep or len(jobs) == 1 or not torch.is_grad_enabled():
        return [run(job) for job in jobs]
    return [checkpoint(run, job, use_reentrant=False, preserve_rng_state=False) for job in jobs]


def rows_per_pass(memory: int, tokens: int, width: int, layers: int) -> int:
    """Rows of so many tokens, at least 1, whose activations in so many layers at a time fit into `memory` bytes."""
    return max(1, memory // (4 * _FLOATS_PER_TOKEN * width * tokens * max(1, layers)))


def put(states: Tensor, at: Tensor, tokens: Tensor) -> Tensor:
    """A copy of states (R, T, W) with tokens (R or 1, n, W) in the columns `at` (R, n)."""
    if at.shape[1] == 0:
        return states
    index = at[:, :, None].expand(-1, -1, states.shape[2])
    return states.scatter(1, index, tokens.to(states.dtype).expand(len(states), -1, -1))


def _token_table(base: DualEncoder) -> nn.Embedding:
    modules = tower_module(base, "text").named_modules()
    tables = [module for name, module in modules if name.rpartition(".")[2] in _TABLES]
    if len(tables) != 1 or not isinstance(tables[0], nn.Embedding):
        raise ModelError(f"the text tower of {base.name} has no single table of token embeddings: it takes no prompts")
    return tables[0]


# Patch tokens


# Where a tower has a map that is richer than its tokens, or no tokens: the module whose output that is.
_MAPS: dict[str, Callable[[Any], nn.Module]] = {
    "trimtab_starter_vision": lambda tower: tower.trunk.head,
    "trimtab_clip_resnet": lambda tower: tower.blocks[-1],
}


class ImageTokens(NamedTuple):
    """What an image tower gives for B pictures.

    Attributes:
        features: (B, D), as `DualEncoder.pixel_features`.
        tokens: (B, N, Wi) its token states above the last layer, with CLS token and registers where there are any. Of
            `starter` the 49 places of its trunk's last map, of which its own layers see a projection to a fifth; of
            CLIP's ResNets those of the last map.
        mask: (B, N) bool, False on padding; None if all are real.
    """

    features: Tensor
    tokens: Tensor
    mask: Tensor | None


def image_tokens(base: DualEncoder, pixels: dict[str, Tensor]) -> ImageTokens:
    """Features and patch tokens from one pass of the image tower.

    Args:
        pixels: what `DualEncoder.preprocess` gives, stacked.

    Raises:
        RecipeError: the tower has no patch tokens; the message says what it has.
    """
    # Adapters of a domain may act on some pictures only: such a model knows by itself what its tokens are.
    base = getattr(base, "core", base)
    while not hasattr(base, "image_tokens") and hasattr(base, "base"):
        base = base.base
    if hasattr(base, "image_tokens"):
        return base.image_tokens(pixels)
    found = tokens_in_pass(base, pixels, lambda: base.pixel_features(pixels))
    if found is None:
        raise _no_patches(base, "it gives nothing beside its pooled output")
    return found


def tokens_in_pass(base: DualEncoder, pixels: dict[str, Tensor], run: Callable[[], Tensor]) -> ImageTokens | None:
    """As `image_tokens`, of a pass of the tower from wherever `run` has it start.

    Args:
        run: gives the features (B, D) of the pictures.

    Returns:
        None if the pass began above the patch tokens.

    Raises:
        RecipeError: as `image_tokens`.
    """
    try:
        tower: Any = tower_module(base, "image")
    except ModelError as error:
        raise _no_patches(base, str(error)) from None
    find_map = _MAPS.get(tower.config.model_type)
    seen: list[Any] = []
    module = find_map(tower) if find_map else tower
    handle = module.register_forward_hook(lambda module, args, output: seen.append(output))
    try:
        features = run()
    finally:
        handle.remove()
    if not seen:
        return None
    output: Any = seen[-1]
    tokens = output.flatten(2).transpose(1, 2) if find_map else getattr(output, "last_hidden_state", None)
    if not isinstance(tokens, Tensor) or tokens.ndim != 3 or tokens.shape[1] < 2:
        shape = "nothing beside its pooled output" if tokens is None else f"states of shape {tuple(tokens.shape)}"
        raise _no_patches(base, f"it gives {shape}")
    mask = pixels.get("pixel_attention_mask")
    return ImageTokens(features, tokens, None if mask is None else mask.to(tokens.device).bool())


def _no_patches(base: DualEncoder, reason: str) -> RecipeError:
    return RecipeError(
        f"the image tower of {base.name} has no patch tokens ({reason}), and prompts attend to them: set "
        "prompt.instance to null and prompt.domain.patches to false"
    )
