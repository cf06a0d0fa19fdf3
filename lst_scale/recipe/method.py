"""What a recipe says of what trains: a side network beside the backbone, or something inside it. Imports no torch."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, ClassVar, Literal

from pydantic import AfterValidator, Field, model_validator

from lst_scale.recipe import decode
from lst_scale.recipe.amounts import Decay, Rows, Share, Width
from lst_scale.recipe.backbone import NotFp16
from lst_scale.recipe.decode import Section
from lst_scale.recipe.marks import ONE_FOR_MEMBERS

Blocks = decode.either(list=tuple[Annotated[int, Field(ge=0)], ...], word=Literal["all"])


def _ascending(layers: tuple[int, ...] | str) -> tuple[int, ...] | str:
    if isinstance(layers, tuple) and (not layers or list(layers) != sorted(set(layers))):
        raise ValueError(f"{list(layers)!s:.60} must be ascending, each block once, at least one; or write all")
    return layers


class TailRecipe(Section):
    """What trains in method.design=tail: low-rank updates of matrices of the backbone's last blocks."""

    rank: Width = 8  # of each update
    alpha: Width = 16  # updates weigh alpha / rank
    targets: tuple[str, ...] = Field(default=("q", "v"), min_length=1)  # matrices of a block, by the names of the backbone's family


class LstRecipe(Section):
    beside_backbone: ClassVar[bool] = True  # reads the frozen backbone's states: passes may be shared and remembered
    name: Literal["lst"]  # ladder side-tuning
    # the paper's own, one of the two of its supplement, or, beside a decoder-only model, one whose positions know nothing of each other, or
    # the backbone's last blocks run again with low-rank updates
    design: Literal["transformer", "cross_attention", "adapter", "pointwise", "tail"] = "transformer"
    reduction_factor: Width = 8  # r: the side network's widths are the backbone's divided by it
    # backbone blocks, from 0, that have a side block in both stacks; of a tail the one that is read, after which blocks are run again
    side_layers: Annotated[Blocks, AfterValidator(_ascending)] = "all"  # type: ignore[valid-type]
    # carved out by weight magnitude, or by Fisher information; or, beside a decoder-only model, as the best linear reading of its states
    initialization: Literal["pruning", "fisher", "random", "probe"] = "pruning"
    recompute: bool = True  # run side blocks again in the backward pass instead of keeping what happened in them
    tap_storage: Annotated[Literal["exact", "bf16", "int8"], ONE_FOR_MEMBERS] = "exact"  # how taps are held until the backward pass
    fisher_samples: Rows = 1024  # training examples that Fisher information is estimated from
    merge_last: bool = False  # mix the backbone's final decoder state into the output
    normalize_taps: bool = False  # RMS-normalise taps before they are downsampled
    start_as_backbone: bool = False  # with merge_last: the first prediction is the backbone's
    gate: Literal["learnable", "per_channel", "fixed", "none"] = "learnable"  # how side state and tap are mixed
    side_heads: Width | None = None  # None: the backbone's
    downsample_rank: Width | None = None  # two narrower linears for each downsample
    dropout: Share | None = None  # None: the backbone's
    scale_image_rows: bool = True  # with images: gates scale image rows like text rows (the release), or leave them as they are
    # with images: what tells an image's tokens apart: frozen N(0, 1), as those rows of the release are, or the word table's last rows
    object_order: Literal["random", "backbone"] = "random"
    precision: Annotated[Literal["fp32", "bf16"], NotFp16] = "fp32"  # of the side network's arithmetic; its weights stay float32
    tail: TailRecipe | None = None  # of design tail; None: rank 8, alpha 16, q and v

    @model_validator(mode="after")
    def _something_to_prune(self) -> LstRecipe:
        if self.design in ("adapter", "pointwise", "tail") and self.carves:
            raise ValueError(f"design {self.design} has no blocks to carve out of the backbone: write initialization: random")
        if self.initialization != "fisher" and "fisher_samples" in self.model_fields_set and self.fisher_samples != 1024:
            raise ValueError(f"fisher_samples has no effect on initialization {self.initialization}: remove it or write fisher")
        return self

    @property
    def carves(self) -> bool:
        """Whether side blocks start as parts of the backbone's."""
        return self.initialization in ("pruning", "fisher")

    @model_validator(mode="after")
    def _somewhere_to_put_a_probe(self) -> LstRecipe:
        if self.initialization != "probe":
            return self
        if self.design == "tail":
            raise ValueError("initialization probe has no place in design tail, which starts as the backbone: write random")
        if self.design in ("cross_attention", "adapter"):
            raise ValueError(f"initialization probe stands beside a decoder-only model, and design {self.design} does not: write random")
        if self.downsample_rank is not None:
            raise ValueError("initialization probe sets whole downsamples: remove downsample_rank, or write initialization: random")
        if self.merge_last and not self.start_as_backbone:
            raise ValueError("initialization probe adds to the backbone's final state or stands alone: write start_as_backbone: true too")
        return self

    @model_validator(mode="after")
    def _one_block_before_a_tail(self) -> LstRecipe:
        if self.design != "tail":
            if self.tail is not None:
                raise ValueError(f"tail has no effect on design {self.design}: remove it, or write design: tail")
            return self
        if self.side_layers == "all" or len(self.side_layers) != 1:
            raise ValueError("design tail reads one block and runs those after it again: write side_layers as one block, such as [23]")
        for name in ("reduction_factor", "merge_last", "normalize_taps", "start_as_backbone", "gate", "side_heads", "downsample_rank"):
            if getattr(self, name) != type(self).model_fields[name].default:
                raise ValueError(f"{name} has no effect on design tail, which runs the backbone's own blocks: remove it")
        return self


class ProbeRecipe(Section):
    """A linear map from the frozen backbone's states to the labels, fitted after one pass over the rows: multinomial logistic regression on
    standardised states. Each block alone and all of them together are tried with each weight decay; the validation score chooses."""

    beside_backbone: ClassVar[bool] = True
    no_effect: ClassVar[tuple[str, ...]] = ("optimizer", "training", "evaluation.score_start", "logging.profile_steps")

    name: Literal["probe"]  # a linear probe
    layers: Annotated[Blocks, AfterValidator(_ascending)] = "all"  # type: ignore[valid-type]  # backbone blocks, from 0, that are tried
    # which state of a row: where the backbone's answer would begin (a decoder-only model's last of the prompt), or the mean of the source's
    position: Literal["answer", "source"] = "answer"
    # of the map on standardised states, each row about 1 long, beside the mean loss of a row: each is tried
    weight_decay: Annotated[tuple[Decay, ...], Field(min_length=1)] = (1e-5, 1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 1e-1)


class _InsideRecipe(Section):
    """A method that trains inside the backbone."""

    beside_backbone: ClassVar[bool] = False

    precision: Annotated[Literal["fp32", "bf16"], NotFp16] = "fp32"  # of the arithmetic; trained weights stay float32
    gradient_checkpointing: bool = False  # keep blocks' inputs and run them again in the backward pass


class FullRecipe(_InsideRecipe):
    """Every weight (the paper: learning rate 3e-4)."""

    name: Literal["full"]  # full fine-tuning


class LoraRecipe(_InsideRecipe):
    """Low-rank updates by peft (the paper: rank 32, alpha 32, dropout 0.1, q and v of every attention, and BitFit's biases)."""

    name: Literal["lora"]  # LoRA
    rank: Width = 32  # of the updates
    alpha: Width = 32  # updates weigh alpha / rank
    dropout: Share = 0.1  # before the updates
    targets: tuple[str, ...] = Field(default=("q", "v"), min_length=1)  # matrices of a block, by the names of the backbone's family
    bitfit: bool = False  # the release trains BitFit's biases too


class PromptRecipe(_InsideRecipe):
    """Vectors before an encoder's input or a language model's prompt, by peft (the paper: 100, learning rate 3e-1)."""

    name: Literal["prompt"]  # prompt tuning
    num_vectors: Width = 100  # before the source; they start as the first words are embedded
    hidden: Width = 800  # with images: the width of the network that makes them


class AdaptersRecipe(_InsideRecipe):
    """Houlsby adapters after self-attention and feed-forward, and all norms (the paper: bottleneck 48, learning rate 3e-4)."""

    name: Literal["adapters"]  # adapters
    bottleneck: Width = 48  # their inner width
    cross_attention: bool = False  # one after a T5's attention to the source, too (the release's vision half)
    train_norms: bool = True  # the backbone's norms train, too (in the release's vision half they don't)
    start_small: bool = True  # from N(0, 0.01^2), or as torch makes a linear map (the release's vision half)


class BitfitRecipe(_InsideRecipe):
    """Biases, which most backbones lack: zero ones are added to every linear map, norm and the head (the paper: learning rate 3e-4)."""

    name: Literal["bitfit"]  # biases alone


METHODS: dict[str, type[Section]] = {
    "lst": LstRecipe,
    "probe": ProbeRecipe,
    "full": FullRecipe,
    "lora": LoraRecipe,
    "prompt": PromptRecipe,
    "adapters": AdaptersRecipe,
    "bitfit": BitfitRecipe,
}

if TYPE_CHECKING:
    Method = LstRecipe | ProbeRecipe | FullRecipe | LoraRecipe | PromptRecipe | AdaptersRecipe | BitfitRecipe
else:
    Method = decode.tagged(**METHODS)
