"""Families of models. The folders here, one a family, are the only places that name a model's classes and tensors.

A family is one stateless object, found by `config.model_type`. Placements, precisions, cache, planner, Fisher information, methods and
side networks know the protocol alone, so another family is another folder and a line of `ROOMS`.

Two words serve all of them: a model makes states of its *source*, then of its *target*, given the source. In an encoder-decoder these
are two stacks of blocks; in a decoder-only model the prompt and its continuation, in one.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Protocol

from lst_scale.errors import BackboneError

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

    from lst_scale.backbone.spec import BackboneSpec
    from lst_scale.backbone.taps import FrozenHead
    from lst_scale.recipe.method import Method

NO_PROBE = "initialization probe stands beside a decoder-only model: write method.initialization=random"
_LLAMAS = ("llama", "qwen2", "qwen3", "mistral", "gemma", "gemma2", "gemma3_text", "phi3", "smollm3", "olmo2", "olmo3", "granite")
ROOMS = {"t5": "t5", "mt5": "t5"} | dict.fromkeys(_LLAMAS, "llama") | {"t5gemma2": "t5gemma"}  # model_type -> folder
REFUSED = {"t5gemma": "a T5Gemma 1, whose stacks have a word table each: choose a T5Gemma 2"}  # what is near a known one, and why not
TEXT_PARTS = {"gemma3": "gemma3_text"}  # a model of images and text -> the model of text in it, which stands behind the boundary


@dataclass(frozen=True, kw_only=True)
class BlockRef:
    """One block of a model: which stack, which number in it, and where it sits."""

    stack: str
    index: int
    path: str  # in the model, and its prefix in checkpoints

    @property
    def label(self) -> str:
        return f"{self.stack} block {self.index}"

    def get(self, model: Any) -> nn.Module:
        block: nn.Module = model.get_submodule(self.path)
        return block

    def put(self, model: Any, block: nn.Module) -> None:
        parent, _, name = self.path.rpartition(".")
        setattr(model.get_submodule(parent), name, block)


@dataclass(frozen=True, kw_only=True)
class Narrowing:
    """How a side block differs from a block of the backbone."""

    reduction_factor: int
    heads: int
    dropout: float
    attention: str  # transformers' name of the attention function


@dataclass(frozen=True, kw_only=True)
class WholeHeads:
    """How attention's outputs are chosen where heads are kept whole: groups of query heads that share keys, and heads in them."""

    groups: int  # that the block has
    kept_groups: int
    kept_in_group: int
    head_dim: int


@dataclass(frozen=True, kw_only=True)
class Sublayer:
    """One link of the chain that carves side blocks out of a block: tensors' names in it."""

    norm: str
    inputs: tuple[str, ...]  # matrices of which the same outputs are kept; of whole heads those of queries, keys and values
    output: str  # the matrix that reads those outputs
    rows: int  # how many are kept
    heads: WholeHeads | None = None  # None: outputs are chosen one by one
    norm_adds: float = 0.0  # what the backbone's norm adds to its weight, which the side network's does not


class PositionsThatEnd(Protocol):
    """Until which token the source has positions; None: all have."""

    end: int | None


class Numbers(Protocol):
    """What can be known of a kind of model from its config.json alone. Imports no torch."""

    head_name: str  # of the output head in checkpoints, where it is a matrix of its own

    @property
    def spec_type(self) -> type[BackboneSpec]: ...

    def spec_from(self, config: Mapping[str, Any]) -> BackboneSpec:
        """Return the numbers of a config.json.

        Raises:
            KeyError: one that must be there is missing.
        """
        ...

    def problem_of(self, config: Mapping[str, Any]) -> str | None:
        """Return the first value of a config.json that can't be meant, and what it should be."""
        ...

    def lora_targets(self, spec: Any) -> Mapping[str, str]:
        """Return the matrices of a block that low-rank updates can be put on, by the names that a recipe may give them."""
        ...

    def trainable_parameters(self, spec: Any, own_head: bool, method: Method) -> int:
        """Return how many weights a method trains."""
        ...

    def backbone_parameters(self, spec: Any, own_head: bool) -> int:
        """Return the weights of the backbone; a tied head counts once."""
        ...


class Family(Protocol):
    """What the package must know of a kind of model.

    `model` is transformers' model, `config` its configuration, `spec` what this family made of that.
    """

    stacks: ClassVar[tuple[str, str]]  # which stack makes the source's states, which the target's; perhaps one and the same
    embedding_name: ClassVar[str]  # of the input embedding in checkpoints
    head_name: ClassVar[str]  # of the output head, where it is a matrix of its own
    live_classes: ClassVar[tuple[str, ...]]  # transformers' classes that can be wrapped
    peft_task: ClassVar[str]  # peft's name of what the model does
    answers_from_source: ClassVar[bool]  # whether generation goes on from what `read` made of a source

    # Names in checkpoints.

    def stored_names(self, name: str) -> tuple[str, ...]:
        """Return the names under which a checkpoint may store a tensor, in the order in which to look."""
        ...

    def canonical(self, names: Iterable[str]) -> set[str]:
        """Return each stored tensor's one name, without tensors that no model has a place for."""
        ...

    # The model: its shape, its parts, and where they sit.

    def spec(self, config: Any) -> BackboneSpec: ...

    def unfilled(self, spec: Any, *, shards: int) -> Any:
        """Return a model of this shape on the current device, without contents; with matrices divided by `shards`, one rank's share."""
        ...

    def skeleton(self, config: Any) -> Any:
        """Return the model on the meta device."""
        ...

    def blocks(self, spec: Any) -> tuple[BlockRef, ...]:
        """Return all blocks in the order in which a forward pass runs them."""
        ...

    def ends(self, *, own_head: bool) -> tuple[str, ...]:
        """Return the names of all weights outside the blocks that a checkpoint stores: embedding, head, final norms."""
        ...

    def tie(self, model: Any, *, own_head: bool) -> None:
        """Let all places of a shared weight hold the one that is filled."""
        ...

    def embedding(self, model: Any) -> Tensor:
        """Return the input embedding (V, D)."""
        ...

    def embedding_scale(self, spec: Any) -> float:
        """Return by what a row of the input embedding is multiplied when it is looked up."""
        ...

    def head(self, model: Any, spec: Any) -> FrozenHead: ...

    def head_scale(self, spec: Any) -> float:
        """Return by what the head multiplies its input."""
        ...

    # Running it.

    def divide(self, spec: Any, ids_BS: Tensor, mask_BS: Tensor, labels_BT: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return source ids (B, S), their mask, and the target ids (B, T) that a model reads to predict these labels.

        What is given are whole sources, padded after their last token.
        """
        ...

    def answers(self, generate: Callable[..., Tensor], ids_BS: Tensor, mask_BS: Tensor, **options: Any) -> Tensor:
        """Return what `generate`, a model's own, makes of sources that are padded after their last token: new tokens alone."""
        ...

    def stack_of(self, model: Any, *, target: bool) -> nn.ModuleList:
        """Return the blocks that make the states of the target, or of the source."""
        ...

    def read(self, model: Any, embedding_BSD: Tensor, attention_mask_BS: Tensor, context: Any | None = None) -> Any:
        """Run the source and return what `extend` needs of it. Only the family looks into that."""
        ...

    def context(self, model: Any, embedding_1CD: Tensor) -> Any:
        """Run what stands before every row, once, and return what `read` and `begun` go on from.

        Raises:
            BackboneError: sources are read as a whole, so nothing can be run before them.
        """
        ...

    def begun(self, context: Any | None, num_rows: int) -> Any:
        """Return what `extend` goes on from where a source has no tokens."""
        ...

    def extend(
        self,
        model: Any,
        embedding_BTD: Tensor,
        source: Any,
        attention_mask_BS: Tensor,
        target_mask_BT: Tensor | None,
        cache: Any | None,
        *,
        num_blocks: int,
    ) -> Tensor:
        """Run the first `num_blocks` blocks on the target, given the source; with a cache, on its new positions only.

        `target_mask_BT` is of all positions of the target, those in the cache among them; None: all are tokens.
        """
        ...

    def state(self, output: Any) -> Tensor:
        """Return the hidden state in what a block returns."""
        ...

    # One block by itself: Fisher information, the check of quantized weights.

    def block(self, config: Any, ref: BlockRef) -> nn.Module:
        """Return one block on the meta device."""
        ...

    def final_norm(self, spec: Any, stack: str) -> tuple[nn.Module, str]:
        """Return a stack's final norm on the meta device, and its path."""
        ...

    def positions(self, first_block: nn.Module) -> Callable[[int, torch.device], Any]:
        """Return what makes `along` for a stack: what its blocks are told of the positions of so many tokens."""
        ...

    def run_block(
        self,
        block: nn.Module,
        hidden: Tensor,
        along: Any,
        *,
        mask: Tensor | None,
        source: Tensor | None = None,
        source_mask: Tensor | None = None,
        cache: Any | None = None,
    ) -> tuple[Tensor, Any]:
        """Run one block of the backbone or of a side network; return its hidden states, and `along` for the next block.

        Masks are boolean, True where a key may be seen; `source` are the source's final states where the block attends to them.
        """
        ...

    def matrices(self, block: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
        """Yield the matrices of a block that Fisher information is summed over, by their names in it."""
        ...

    def config_of_blocks(self, config: Any) -> Any:
        """Return the part of a configuration that says how many heads a block has, in which AutoTP looks for them."""
        ...

    def summed(self, ref: BlockRef) -> tuple[str, ...]:
        """Return the linear maps of a block whose inputs tensor parallelism divides, and whose outputs are sums over ranks."""
        ...

    # Inside it: methods that train the model itself, and where they put what they add.

    def whole_logits(
        self,
        run: Callable[..., Any],
        source_BS: Tensor,
        source_mask_BS: Tensor,
        target_BT: Tensor,
        source: Any | None = None,
        *,
        keep: bool = False,
        share: bool = False,
    ) -> tuple[Tensor, Any]:
        """Return a target's logits (B, T, V) and, for other targets of these rows, the `source` that need not be run again.

        `run` is the whole model, perhaps wrapped; `source_BS` are token ids, or their embeddings (B, S, D). Without `keep` nothing is held
        for other targets that would cost memory, and there may be no `source`; one that is given stays as it is. With `share` what rows
        begin alike may run once for all of them: instructions, or a context.
        """
        ...

    def adapter_sites(self, model: Any, *, after_source_attention: bool) -> Iterator[str]:
        """Yield the paths of the linear maps that end self-attention and feed-forward of every block, or attention to the source too."""
        ...

    def lengthen(self, model: Any, vocab_size: int, generator: torch.Generator) -> None:
        """Add rows of N(0, 1) to the word table, for what is no word."""
        ...

    def positions_that_end(self, model: Any) -> PositionsThatEnd:
        """Return where the source's positions end from the next pass on: tokens from there have none, as rows and as columns."""
        ...

    def is_norm(self, module: nn.Module) -> bool:
        """Whether this is a norm of the family's own kind."""
        ...

    # Beside it: blocks of a side network. Cache layers are counted among the side network's own.

    def side_block(self, spec: Any, narrowing: Narrowing, *, target: bool, first: bool, cache_layer: int) -> nn.Module:
        """Return a side block, which `run_block` runs; `first` of its stack or not."""
        ...

    def tap_attention_block(
        self, spec: Any, narrowing: Narrowing, *, target: bool, first: bool, cache_layer: int, tap_cache_layer: int
    ) -> nn.Module:
        """Return a side block that also attends to its tap: (hidden, tap, along, mask, source, source_mask, cache) -> hidden, along."""
        ...

    def source_attention(self, spec: Any, narrowing: Narrowing, *, cache_layer: int) -> nn.Module:
        """Return an attention to the source's side states by itself: (hidden, source, source_mask, cache) -> hidden."""
        ...

    def side_feed_forward(self, spec: Any, narrowing: Narrowing) -> nn.Module:
        """Return the feed-forward of a side block by itself: hidden (B, T, R) -> (B, T, R)."""
        ...

    def side_positions(self, spec: Any, narrowing: Narrowing) -> nn.Module:
        """Return what makes `along` for a side stack whose blocks make none: (hidden, positions (B, T)) -> along."""
        ...

    def side_norm(self, spec: Any, width: int) -> nn.Module: ...

    def tail(self, spec: Any, first: int) -> Any:
        """Return a model, unfilled on the meta device, of the blocks from number `first` on and the final norm.

        Raises:
            LadderError: there are two stacks.
        """
        ...

    def tail_name(self, name: str, first: int) -> str:
        """Return what a weight of such a model is called in the whole one."""
        ...

    def run_tail(self, model: Any, hidden_BTD: Tensor, mask_BS: Tensor, cache: Any | None) -> Tensor:
        """Return final normed states (B, T, D) of the last of the tokens in `mask_BS` (B, past + T), given those before the blocks."""
        ...

    def generation_config(self, spec: Any, *, side_layers: int) -> Any:
        """Return what transformers' generation reads of a model whose cache has so many layers beside the backbone's."""
        ...

    def positions_of_text(self, first_block: nn.Module, num_text: int, num_beside: int) -> Any:
        """Return `along` for a side stack, given its first block, where tokens without positions (images) stand after the text."""
        ...

    def draw(self, module: nn.Module, normal: Callable[[Tensor, float], None]) -> Iterable[nn.Module]:
        """Fill one module of a side block at random, by `normal(weight, deviation)`; return the linear maps that are filled by it."""
        ...

    def leave_alone(self, block: nn.Module, channels: slice) -> None:
        """Let a residual state pass through a side block, or a feed-forward of one, unchanged in some channels."""
        ...

    def start_averaging(self, block: nn.Module, channels: slice, to: slice, factors_Q: Tensor) -> None:
        """Let a side block's attention begin with the mean of all tokens so far: of its normed state in Q channels, added to Q others."""
        ...

    def start_positions(self, stack: str, side_blocks: nn.Module, weights: Callable[[str], Tensor]) -> None:
        """Let a side stack know positions as the backbone's stack does."""
        ...

    def sublayers(self, spec: Any, narrowing: Narrowing, stack: str) -> tuple[Sublayer, ...]:
        """Return the chain through one block of a stack, in running order."""
        ...

    def put_carved(self, side_block: nn.Module, carved: dict[str, Tensor], *, attends_to_tap: bool) -> None:
        """Copy the weights that were carved out of a backbone block into a side block."""
        ...


def family_of(model_type: str | None, where: object) -> Family:
    """Return the family of a model type; `where` names the model in the error message.

    Raises:
        BackboneError: no family has it; the message names the types that are known.
    """
    family: Family = importlib.import_module(f"{__name__}.{_room(model_type, where)}.family").FAMILY
    return family


def numbers_of(model_type: str | None, where: object) -> Numbers:
    """Return what is known of a model type without torch; raises as `family_of` does."""
    numbers: Numbers = importlib.import_module(f"{__name__}.{_room(model_type, where)}.numbers").NUMBERS
    return numbers


def family_of_live(model: Any) -> Family:
    """Return the family of a live model of transformers.

    Raises:
        BackboneError: it is no model that can stand behind the boundary.
    """
    model_type = getattr(getattr(model, "config", None), "model_type", None)
    if model_type in ROOMS:
        family = family_of(model_type, type(model).__name__)
        if any(kind.__name__ in family.live_classes for kind in type(model).__mro__):
            return family
    known = dict.fromkeys(name for known in ROOMS for name in family_of(known, known).live_classes)
    raise BackboneError(f"{type(model).__name__} can't be a backbone: pass a {' or a '.join(known)}")


def text_part(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return what a config.json says of the model's text part; of a model of text alone, all that it says."""
    part = TEXT_PARTS.get(config.get("model_type", ""))
    if part is None:
        return config
    text: Mapping[str, Any] = importlib.import_module(f"{__name__}.{ROOMS[part]}.config").text_of(config)
    return text


def _room(model_type: str | None, where: object) -> str:
    if model_type in REFUSED:
        raise BackboneError(f"{where} is {REFUSED[model_type]}")
    if model_type not in ROOMS:
        *others, last = ROOMS
        raise BackboneError(f"{where} is a {model_type!r} model: choose a checkpoint of type {', '.join(others)} or {last}")
    return ROOMS[model_type]
