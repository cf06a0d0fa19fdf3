"""A recipe: one YAML file a run, complete without inheritance; defaults live here; `key=value` overrides on the command line.

Imports no torch: a mistake in a recipe is reported in well under a second. Backbone and task have
their sections in `backbone.py` and `task.py`; decoding and its error messages are in `decode.py`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

import yaml
from pydantic import BeforeValidator, Field, field_validator, model_validator

from lst_scale.errors import RecipeError
from lst_scale.recipe import decode
from lst_scale.recipe.backbone import PLACEMENTS, BackboneRecipe, NotFp16
from lst_scale.recipe.decode import Count, Section
from lst_scale.recipe.grid import grid_as_lines
from lst_scale.recipe.marks import KEPT_BY_RESUME, ONE_FOR_MEMBERS
from lst_scale.recipe.task import GLUE, FileTask
from lst_scale.recipe.vision import VisionRecipe
from lst_scale.system.assets import find_recipe
from lst_scale.system.names import Name, PathText, checked_name

Share = Annotated[float, Field(ge=0, lt=1)]
Seed = Annotated[int, Field(ge=0, lt=2**32)]
# Counts beyond which nothing would end, or fit any memory.
Width = Annotated[int, Field(ge=1, le=65_536)]  # of a part of a network
Length = Annotated[int, Field(ge=1, le=1_000_000)]  # in tokens
Rows = Annotated[int, Field(ge=1, le=1_000_000)]  # at once
Epochs = Annotated[int, Field(ge=1, le=1_000_000)]
Beams = Annotated[int, Field(ge=1, le=256)]
NewTokens = Annotated[int, Field(ge=1, le=100_000)]


class LstRecipe(Section):
    beside_backbone: ClassVar[bool] = True  # reads the frozen backbone's states: passes may be shared and remembered
    name: Literal["lst"]  # ladder side-tuning
    design: Literal["transformer", "cross_attention", "adapter"] = "transformer"  # the paper's own, or one of the two of its supplement
    reduction_factor: Width = 8  # r: the side network's widths are the backbone's divided by it
    # backbone blocks, from 0, that have a side block in both stacks
    side_layers: decode.either(list=tuple[Annotated[int, Field(ge=0)], ...], word=Literal["all"]) = "all"  # type: ignore[valid-type]
    initialization: Literal["pruning", "fisher", "random"] = "pruning"  # carved out by weight magnitude, or by Fisher information
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

    @model_validator(mode="after")
    def _something_to_prune(self) -> LstRecipe:
        if self.design == "adapter" and self.initialization != "random":
            raise ValueError("design adapter has no blocks to carve out of the backbone: write initialization: random")
        if self.initialization != "fisher" and "fisher_samples" in self.model_fields_set and self.fisher_samples != 1024:
            raise ValueError(f"fisher_samples has no effect on initialization {self.initialization}: remove it or write fisher")
        return self

    @field_validator("side_layers")
    @classmethod
    def _ascending(cls, layers: tuple[int, ...] | str) -> tuple[int, ...] | str:
        if isinstance(layers, tuple) and (not layers or list(layers) != sorted(set(layers))):
            raise ValueError(f"{list(layers)!s:.60} must be ascending, each block once, at least one; or write all")
        return layers


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
    """Vectors before the encoder's input, by peft (the paper: 100, learning rate 3e-1)."""

    name: Literal["prompt"]  # prompt tuning
    num_vectors: Width = 100  # before the encoder's input
    hidden: Width = 800  # with images: the width of the network that makes them


class AdaptersRecipe(_InsideRecipe):
    """Houlsby adapters after self-attention and feed-forward, and all norms (the paper: bottleneck 48, learning rate 3e-4)."""

    name: Literal["adapters"]  # adapters
    bottleneck: Width = 48  # their inner width
    cross_attention: bool = False  # one after the attention to the source, too (the release's vision half)
    train_norms: bool = True  # the backbone's norms train, too (in the release's vision half they don't)
    start_small: bool = True  # from N(0, 0.01^2), or as torch makes a linear map (the release's vision half)


class BitfitRecipe(_InsideRecipe):
    """Biases, which T5 lacks: zero ones are added to every linear map, norm and the head (the paper: learning rate 3e-4)."""

    name: Literal["bitfit"]  # biases alone


_METHODS: dict[str, type[Section]] = {
    "lst": LstRecipe,
    "full": FullRecipe,
    "lora": LoraRecipe,
    "prompt": PromptRecipe,
    "adapters": AdaptersRecipe,
    "bitfit": BitfitRecipe,
}
_CHOICES = {"method": _METHODS, "backbone.placement": PLACEMENTS}  # sections chosen by their name

if TYPE_CHECKING:
    Method = LstRecipe | FullRecipe | LoraRecipe | PromptRecipe | AdaptersRecipe | BitfitRecipe
else:
    Method = decode.tagged(**_METHODS)


class OptimizerRecipe(Section):
    learning_rate: float = Field(default=3e-3, gt=0, le=1000)  # at its highest, after the warm-up
    betas: tuple[Share, Share] = (0.9, 0.999)  # of AdamW's two means
    epsilon: float = Field(default=1e-8, gt=0, le=1)  # of AdamW
    weight_decay: float = Field(default=0.0, ge=0, le=1000)  # on matrices; norms, biases and gates have none
    max_grad_norm: float = Field(default=1.0, gt=0, le=1e9)  # longer gradients are cut to it
    warmup: int | float = 0.06  # an int is steps (the paper: 500), a float below 1 is a share of all steps
    schedule: Literal["linear", "constant"] = "linear"  # after the warm-up: falling to 0, or level

    @field_validator("warmup", mode="before")
    @classmethod
    def _steps_or_share(cls, value: Any) -> Any:
        if type(value) not in (int, float) or not 0 <= value < (10**9 if type(value) is int else 1):
            raise ValueError(f"{str(value)[:60]} must be whole steps, such as 500, or a share of all steps below 1, such as 0.06")
        return value


class TrainingRecipe(Section):
    epochs: Epochs | None = None  # None: the task's own
    max_steps: Count | None = None  # ends the run earlier than epochs would
    global_batch_size: Annotated[Rows, ONE_FOR_MEMBERS, KEPT_BY_RESUME] = 100  # rows an optimizer step, over all ranks
    micro_batch_size: Annotated[Rows | None, ONE_FOR_MEMBERS] = None  # rows a forward pass; None: all of a rank's share
    deepspeed: Annotated[PathText, ONE_FOR_MEMBERS] = "zero2"  # a file of ds_configs/, or a path
    evaluate_every: decode.either(number=Count, word=Literal["epoch"]) = "epoch"  # type: ignore[valid-type]  # optimizer steps
    patience: Count | None = None  # evaluations without a better score before stopping
    save_every_steps: Count | None = None  # beside those at every evaluation
    keep_checkpoints: Count = 2  # the newest, to resume from
    # A finished run, or its side_network/ or trained/: its weights are where this run begins.
    start_from: Annotated[PathText | None, KEPT_BY_RESUME] = None

    @model_validator(mode="after")
    def _micro_within_global(self) -> TrainingRecipe:
        if self.micro_batch_size is not None and self.micro_batch_size > self.global_batch_size:
            raise ValueError(
                f"micro_batch_size {self.micro_batch_size} is larger than global_batch_size {self.global_batch_size}: lower it"
            )
        return self


class DataRecipe(Section):
    max_source_length: Length = 128  # tokens; longer sources are cut, and counted in the log
    max_target_length: Length | None = None  # None: the longest target
    max_train_rows: Count | None = None  # the first of them; None: all
    max_eval_rows: Count | None = None  # of validation and of test, the first of them; None: all
    shuffle_seed: Seed | None = None  # None: seed. One value lets runs of several seeds share a backbone pass
    shuffle_buffer: Rows = 10_000  # of task.streaming: rows that are shuffled together, of all processes


class EvaluationRecipe(Section):
    method: Literal["generation", "likelihood"] = "generation"  # write an answer, or choose the likeliest label
    batch_size: Rows = 64  # rows at once
    num_beams: Beams = 1  # of generation
    max_new_tokens: NewTokens | None = None  # None: the longest target

    score_start: bool = False  # before training also score what the method starts as, on the rows that the result is of

    @model_validator(mode="after")
    def _beams_need_generation(self) -> EvaluationRecipe:
        if self.method == "likelihood" and (self.num_beams != 1 or self.max_new_tokens is not None):
            raise ValueError("num_beams and max_new_tokens have no effect on method likelihood: remove them or write generation")
        return self


class CacheRecipe(Section):
    """Taps remembered on disk, so that no row is run through the backbone twice."""

    enabled: bool = False  # write taps down in the first epoch and read them later
    dtype: Literal["bf16", "fp32", "int8"] = "bf16"  # in which they are stored
    folder: PathText | None = None  # None: ~/.cache/lst_scale/taps


class LoggingRecipe(Section):
    tensorboard: bool = False  # needs pip install 'lst_scale[tensorboard]'
    log_every_steps: Count = 10  # a line of loss, learning rate and time
    profile_steps: tuple[Count, Count] | None = None  # first and last step, counted from 1, that are traced into the run's folder

    @model_validator(mode="after")
    def _check_steps(self) -> LoggingRecipe:
        if self.profile_steps is not None and self.profile_steps[0] > self.profile_steps[1]:
            first, last = self.profile_steps
            raise ValueError(f"profile_steps [{first}, {last}] ends before it begins: write [{last}, {first}]")
        return self


class Recipe(Section):
    """What `run` carries out. `task` is one of GLUE's names, or a mapping for one's own files."""

    name: Name  # of the run; its folder is NAME-TASK-seedN
    # what is learned: a task of GLUE, or one's own files as below
    task: Annotated[decode.either(word=Literal[GLUE], mapping=FileTask), ONE_FOR_MEMBERS, KEPT_BY_RESUME]  # type: ignore[valid-type]
    seed: Annotated[Seed, KEPT_BY_RESUME] = 0  # of initialization, dropout and, without data.shuffle_seed, of the order of batches
    output_dir: PathText = "runs"  # where runs' folders are
    backbone: Annotated[BackboneRecipe, ONE_FOR_MEMBERS]  # the frozen model
    method: Annotated[Method, KEPT_BY_RESUME]  # what trains, and how much
    vision: Annotated[VisionRecipe | None, ONE_FOR_MEMBERS, KEPT_BY_RESUME] = None  # images beside the texts
    optimizer: Annotated[OptimizerRecipe, KEPT_BY_RESUME] = OptimizerRecipe()  # AdamW
    training: TrainingRecipe = TrainingRecipe()  # how long, in what portions
    data: Annotated[DataRecipe, ONE_FOR_MEMBERS, KEPT_BY_RESUME] = DataRecipe()  # lengths and order
    evaluation: Annotated[EvaluationRecipe, ONE_FOR_MEMBERS] = EvaluationRecipe()  # how answers are made
    cache: Annotated[CacheRecipe, ONE_FOR_MEMBERS] = CacheRecipe()  # taps on disk
    logging: LoggingRecipe = LoggingRecipe()  # what is told
    # Trained together on one backbone pass: overrides, a line each; or a grid of key: [values], every combination of them.
    members: Annotated[tuple[str, ...], Field(min_length=1), BeforeValidator(grid_as_lines)] | None = None

    @property
    def image_columns(self) -> tuple[str, ...]:
        return () if isinstance(self.task, str) else self.task.images or ()

    @model_validator(mode="after")
    def _images_are_read(self) -> Recipe:
        if self.vision is None and self.image_columns:
            raise ValueError(
                "task.images names pictures, but nothing says how they are read: write vision: {image_model: ..., feature_dim: ...}"
            )
        if self.vision is not None and not self.image_columns:
            raise ValueError("vision has no effect without pictures: name their columns in task.images, or remove it")
        if isinstance(self.method, LstRecipe):
            if self.vision is not None and self.method.design != "transformer":
                raise ValueError(f"method.design {self.method.design} reads no images: write transformer")
            if self.vision is not None and self.vision.vocab_size is not None:
                raise ValueError("vision.vocab_size has no effect on method lst, whose backbone stays as it is: remove it")
            if self.vision is None and not (self.method.scale_image_rows and self.method.object_order == "random"):
                raise ValueError("method.scale_image_rows and method.object_order have no effect without vision: remove them")
        return self

    @model_validator(mode="after")
    def _streams_alone(self) -> Recipe:
        """Say everything that a stream of rows can't go with, or needs."""
        if isinstance(self.task, str) or not self.task.streaming:
            return self
        evaluation = self.evaluation
        writes = self.task.kind != "classification" and evaluation.method == "generation"
        wrong = {
            "write training.max_steps: nobody knows how many rows there are": self.training.max_steps is None,
            "remove training.epochs: training.max_steps says how long": self.training.epochs is not None,
            "remove data.max_train_rows: training.max_steps says how long": self.data.max_train_rows is not None,
            "write task.labels: not all rows are looked at before": self.task.kind == "classification" and not self.task.labels,
            "write evaluation.max_new_tokens: not all answers are looked at before": writes and evaluation.max_new_tokens is None,
            "remove cache.enabled: rows that come once need no cache": self.cache.enabled,
            "remove members: they share a table": self.members is not None,
            "write loss: token_mean: a stream counts tokens": self.task.loss != "token_mean",
            "remove images: their features are made before training": bool(self.task.images),
            "write backbone.context.text: examples are drawn from a table of rows": (
                self.backbone.context is not None and self.backbone.context.examples is not None
            ),
            "download the files of hub: data sets first, and write their pattern": self.task.train.startswith("hub:"),
        }
        if found := [what for what, is_so in wrong.items() if is_so]:
            raise ValueError(f"task.streaming: {'; '.join(found)}")
        return self

    @property
    def task_name(self) -> str:
        return self.task if isinstance(self.task, str) else self.task.name

    @property
    def run_name(self) -> str:
        """The run's folder below output_dir."""
        return f"{self.name}-{self.task_name}-seed{self.seed}"

    def renamed(self, name: str) -> Recipe:
        """Return the same recipe under another name.

        Raises:
            RecipeError: it is not fit for a folder. (`model_copy` would not look.)
        """
        try:
            return self.model_copy(update={"name": checked_name(name)})
        except ValueError as error:
            raise RecipeError(f"name: {error}") from error


def load_recipe(name_or_path: str, overrides: Sequence[str] = ()) -> Recipe:
    """Read a shipped recipe or a file and apply `key=value` overrides.

    Raises:
        RecipeError: every mistake of the file and of the overrides, one line each.
    """
    path = find_recipe(name_or_path)
    recipe = parse_recipe(decode.read_text(path), str(path.name), overrides)
    if isinstance(recipe.task, str):
        return recipe
    return recipe.model_copy(update={"task": recipe.task.with_metrics_of(path.parent)})


def parse_recipe(text: str, where: str, overrides: Sequence[str] = ()) -> Recipe:
    """Decode a recipe's YAML text; `where` names it in error messages."""
    tree, problems = decode.read_yaml(text, where)
    problems += decode.apply_overrides(tree, _switched(tree, overrides))
    return decode.build(Recipe, tree, problems)


def _switched(tree: dict[str, Any], overrides: Sequence[str]) -> list[str]:
    """Return overrides with those first that choose another method or placement, whose section then loses what only the old one has.

    So `method.name=lora` works on any recipe, and complains of no key that was not typed. What both have stays as the file says.
    """
    first = [override for override in overrides if override.startswith(tuple(f"{path}.name=" for path in _CHOICES))]
    for override in first:
        key, _, chosen = override.partition("=")
        path = key.removesuffix(".name")
        section: Any = tree
        for part in path.split("."):
            section = section.get(part) if isinstance(section, dict) else None
        if isinstance(section, dict) and section.get("name") != chosen and chosen in _CHOICES[path]:
            kept = _CHOICES[path][chosen].model_fields
            for name in [name for name in section if name not in kept]:
                del section[name]
    return [*first, *(override for override in overrides if override not in first)]


def to_yaml(recipe: Recipe) -> str:
    """Return the resolved recipe, every value written out; it loads back equal."""
    return yaml.safe_dump(recipe.model_dump(mode="json"), sort_keys=False, allow_unicode=True)
