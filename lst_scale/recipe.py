"""A recipe: one YAML file a run, complete without inheritance; defaults live here; `key=value` overrides on the command line.

Imports no torch: a mistake in a recipe is reported in well under a second. Decoding and its error messages are in `decode.py`.
"""

from __future__ import annotations

import re
import string
from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated, Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from lst_scale import decode
from lst_scale.assets import find_recipe

FP16_REASON = "T5 overflows in fp16 (its feed-forward exceeds 65504): write bf16, which has the range of fp32"
GLUE = ("cola", "mnli", "mrpc", "qnli", "qqp", "rte", "sst2", "stsb")
METRICS = ("accuracy", "f1", "matthews", "pearson", "spearman", "exact_match", "rouge_l", "chrf")

Count = Annotated[int, Field(ge=1)]
Share = Annotated[float, Field(ge=0, lt=1)]


class _Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)


class FileTask(_Section):
    """One's own data: a local .csv, .jsonl or .parquet file, "embedded:..." or "hub:owner/name[:config][:split]" for each split."""

    name: str = "custom"
    kind: Literal["classification", "regression", "text"]
    train: str
    validation: str
    test: str | None = None
    source: tuple[str, ...] = Field(min_length=1)
    target: str
    prefix: str | None = None
    template: str | None = None  # the source text with {field}s; None: "prefix field: value field: value"
    target_prefix: str | None = None  # written before every target and cut from answers, such as <extra_id_0> after a template with it
    labels: tuple[str, ...] | None = None
    metrics: tuple[Literal[METRICS], ...] | None = None  # type: ignore[valid-type]

    @model_validator(mode="after")
    def _template_names_the_source(self) -> FileTask:
        if self.template is None:
            return self
        try:
            named = {field for _, field, _, _ in string.Formatter().parse(self.template) if field is not None}
        except ValueError as error:
            raise ValueError(f"template {self.template!r}: {error}; write {{{{ for a brace that stands for itself") from error
        if named != set(self.source):
            wrong = sorted(named ^ set(self.source))
            raise ValueError(f"template and source must name the same fields, but {wrong[0]!r} is only in one of them")
        if self.prefix is not None:
            raise ValueError("prefix has no effect beside template: write it into the template")
        return self

    @model_validator(mode="after")
    def _labels_fit_the_kind(self) -> FileTask:
        if self.labels is not None and self.kind != "classification":
            raise ValueError(f"labels has no effect on kind {self.kind}: remove it or write kind: classification")
        return self


class Replicated(_Section):
    """One copy a rank."""

    name: Literal["replicated"]


class TensorParallel(_Section):
    """Every matrix divided over groups of `size` consecutive ranks (DeepSpeed inference, AutoTP)."""

    name: Literal["tensor_parallel"]
    size: Count | None = None  # None: all ranks
    across_nodes: bool = False  # whether a group may span machines
    deepspeed: str = "inference"  # a file of ds_configs/, or a path


class Zero3(_Section):
    """Every block divided over all ranks and gathered just before it runs."""

    name: Literal["zero3"]


class Streamed(_Section):
    """Blocks in host memory or on disk; two on the device, the next one copied while one runs."""

    name: Literal["streamed"]
    source: Literal["host", "disk"] = "host"
    folder: str | None = None  # of the block files for source: disk; None: ~/.cache/lst_scale/blocks

    @model_validator(mode="after")
    def _folder_needs_disk(self) -> Streamed:
        if self.folder is not None and self.source != "disk":
            raise ValueError(f"folder has no effect on source {self.source}: remove it or write source: disk")
        return self


if TYPE_CHECKING:
    Placement = Replicated | TensorParallel | Zero3 | Streamed
else:
    Placement = decode.tagged(replicated=Replicated, tensor_parallel=TensorParallel, zero3=Zero3, streamed=Streamed)


class BackboneRecipe(_Section):
    checkpoint: str
    revision: str | None = None
    precision: Literal["fp32", "bf16", "int8", "nf4"] = "bf16"
    max_quantization_error: float | None = Field(default=None, gt=0)  # None: the precision's own
    placement: Placement = Replicated(name="replicated")

    @field_validator("precision", mode="before")
    @classmethod
    def _not_fp16(cls, value: Any) -> Any:
        if value in ("fp16", "float16", "half"):
            raise ValueError(FP16_REASON)
        return value

    @model_validator(mode="after")
    def _threshold_needs_quantization(self) -> BackboneRecipe:
        if self.max_quantization_error is not None and self.precision in ("fp32", "bf16"):
            raise ValueError(f"max_quantization_error has no effect on precision {self.precision}: remove it or write int8 or nf4")
        return self


class LstRecipe(_Section):
    name: Literal["lst"]
    design: Literal["transformer", "cross_attention", "adapter"] = "transformer"
    reduction_factor: Count = 8
    side_layers: decode.either(list=tuple[Annotated[int, Field(ge=0)], ...], word=Literal["all"]) = "all"  # type: ignore[valid-type]
    initialization: Literal["pruning", "fisher", "random"] = "pruning"  # carved out by weight magnitude, or by Fisher information
    recompute: bool = True  # run side blocks again in the backward pass instead of keeping what happened in them
    tap_storage: Literal["exact", "bf16", "int8"] = "exact"  # how taps are held until the backward pass
    fisher_samples: Count = 1024  # training examples that Fisher information is estimated from
    merge_last: bool = False
    normalize_taps: bool = False  # RMS-normalise taps before they are downsampled
    start_as_backbone: bool = False  # with merge_last: the first prediction is the backbone's
    gate: Literal["learnable", "per_channel", "fixed", "none"] = "learnable"
    side_heads: Count | None = None  # None: the backbone's
    downsample_rank: Count | None = None  # two narrower linears for each downsample
    dropout: Share | None = None  # None: the backbone's
    precision: Literal["fp32", "bf16"] = "fp32"  # of the side network's arithmetic; its weights stay float32

    @field_validator("precision", mode="before")
    @classmethod
    def _not_fp16(cls, value: Any) -> Any:
        if value in ("fp16", "float16", "half"):
            raise ValueError(FP16_REASON)
        return value

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
            raise ValueError(f"{list(layers)} must be ascending, each block once, at least one; or write all")
        return layers


class _InsideRecipe(_Section):
    """A method that trains inside the backbone."""

    precision: Literal["fp32", "bf16"] = "fp32"  # of the arithmetic; trained weights stay float32
    gradient_checkpointing: bool = False  # keep blocks' inputs and run them again in the backward pass


class FullRecipe(_InsideRecipe):
    """Every weight (the paper: learning rate 3e-4)."""

    name: Literal["full"]


class LoraRecipe(_InsideRecipe):
    """Low-rank updates by peft (the paper: rank 32, alpha 32, dropout 0.1, q and v of every attention, and BitFit's biases)."""

    name: Literal["lora"]
    rank: Count = 32
    alpha: Count = 32
    dropout: Share = 0.1
    targets: tuple[Literal["q", "k", "v", "o", "wi", "wi_0", "wi_1", "wo"], ...] = Field(default=("q", "v"), min_length=1)
    bitfit: bool = False  # the release trains BitFit's biases too


class PromptRecipe(_InsideRecipe):
    """Vectors before the encoder's input, by peft (the paper: 100, learning rate 3e-1)."""

    name: Literal["prompt"]
    num_vectors: Count = 100


class AdaptersRecipe(_InsideRecipe):
    """Houlsby adapters after self-attention and feed-forward, and all norms (the paper: bottleneck 48, learning rate 3e-4)."""

    name: Literal["adapters"]
    bottleneck: Count = 48


class BitfitRecipe(_InsideRecipe):
    """Biases, which T5 lacks: zero ones are added to every linear map, norm and the head (the paper: learning rate 3e-4)."""

    name: Literal["bitfit"]


if TYPE_CHECKING:
    Method = LstRecipe | FullRecipe | LoraRecipe | PromptRecipe | AdaptersRecipe | BitfitRecipe
else:
    Method = decode.tagged(
        lst=LstRecipe, full=FullRecipe, lora=LoraRecipe, prompt=PromptRecipe, adapters=AdaptersRecipe, bitfit=BitfitRecipe
    )


class OptimizerRecipe(_Section):
    learning_rate: float = Field(default=3e-3, gt=0)
    betas: tuple[Share, Share] = (0.9, 0.999)
    epsilon: float = Field(default=1e-8, gt=0)
    weight_decay: float = Field(default=0.0, ge=0)
    max_grad_norm: float = Field(default=1.0, gt=0)
    warmup: int | float = 0.06  # an int is steps (the paper: 500), a float below 1 is a share of all steps
    schedule: Literal["linear", "constant"] = "linear"

    @field_validator("warmup")
    @classmethod
    def _steps_or_share(cls, value: int | float) -> int | float:
        if value < 0 or (isinstance(value, float) and value >= 1):
            raise ValueError(f"{value} must be whole steps, such as 500, or a share of all steps below 1, such as 0.06")
        return value


class TrainingRecipe(_Section):
    epochs: Count | None = None  # None: the task's own
    max_steps: Count | None = None
    global_batch_size: Count = 100
    micro_batch_size: Count | None = None  # rows a forward pass; None: all of a rank's share
    deepspeed: str = "zero2"  # a file of ds_configs/, or a path
    evaluate_every: decode.either(number=Count, word=Literal["epoch"]) = "epoch"  # type: ignore[valid-type]  # optimizer steps
    patience: Count | None = None  # evaluations without a better score before stopping
    save_every_steps: Count | None = None  # None: at every evaluation
    keep_checkpoints: Count = 2

    @model_validator(mode="after")
    def _micro_within_global(self) -> TrainingRecipe:
        if self.micro_batch_size is not None and self.micro_batch_size > self.global_batch_size:
            raise ValueError(
                f"micro_batch_size {self.micro_batch_size} is larger than global_batch_size {self.global_batch_size}: lower it"
            )
        return self


class DataRecipe(_Section):
    max_source_length: Count = 128
    max_target_length: Count | None = None  # None: the longest target
    max_train_rows: Count | None = None
    max_eval_rows: Count | None = None
    shuffle_seed: Annotated[int, Field(ge=0)] | None = None  # None: seed. One value lets runs of several seeds share a backbone pass


class EvaluationRecipe(_Section):
    method: Literal["generation", "likelihood"] = "generation"
    batch_size: Count = 64
    num_beams: Count = 1
    max_new_tokens: Count | None = None  # None: the longest target

    @model_validator(mode="after")
    def _beams_need_generation(self) -> EvaluationRecipe:
        if self.method == "likelihood" and (self.num_beams != 1 or self.max_new_tokens is not None):
            raise ValueError("num_beams and max_new_tokens have no effect on method likelihood: remove them or write generation")
        return self


class CacheRecipe(_Section):
    """Taps remembered on disk, so that no row is run through the backbone twice."""

    enabled: bool = False
    dtype: Literal["bf16", "fp32", "int8"] = "bf16"
    folder: str | None = None  # None: ~/.cache/lst_scale/taps


class LoggingRecipe(_Section):
    tensorboard: bool = False
    log_every_steps: Count = 10


class Recipe(_Section):
    """What `run` carries out. `task` is one of GLUE's names, or a mapping for one's own files."""

    name: str
    task: decode.either(word=Literal[GLUE], mapping=FileTask)  # type: ignore[valid-type]
    seed: int = Field(default=0, ge=0)
    output_dir: str = "runs"
    backbone: BackboneRecipe
    method: Method
    optimizer: OptimizerRecipe = OptimizerRecipe()
    training: TrainingRecipe = TrainingRecipe()
    data: DataRecipe = DataRecipe()
    evaluation: EvaluationRecipe = EvaluationRecipe()
    cache: CacheRecipe = CacheRecipe()
    logging: LoggingRecipe = LoggingRecipe()
    members: tuple[str, ...] | None = Field(default=None, min_length=1)  # overrides, a line each: trained together on one backbone pass

    @field_validator("name")
    @classmethod
    def _fit_for_a_folder(cls, name: str) -> str:
        if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", name):
            raise ValueError(f"{name!r} names a folder: letters, digits, '.', '_' and '-' only, starting with a letter or digit")
        return name

    @property
    def task_name(self) -> str:
        return self.task if isinstance(self.task, str) else self.task.name

    @property
    def run_name(self) -> str:
        """The run's folder below output_dir."""
        return f"{self.name}-{self.task_name}-seed{self.seed}"


def load_recipe(name_or_path: str, overrides: Sequence[str] = ()) -> Recipe:
    """Read a shipped recipe or a file and apply `key=value` overrides.

    Raises:
        RecipeError: every mistake of the file and of the overrides, one line each.
    """
    path = find_recipe(name_or_path)
    return parse_recipe(path.read_text(), str(path.name), overrides)


def parse_recipe(text: str, where: str, overrides: Sequence[str] = ()) -> Recipe:
    """Decode a recipe's YAML text; `where` names it in error messages."""
    tree, problems = decode.read_yaml(text, where)
    problems += decode.apply_overrides(tree, overrides)
    return decode.build(Recipe, tree, problems)


def to_yaml(recipe: Recipe) -> str:
    """Return the resolved recipe, every value written out; it loads back equal."""
    return yaml.safe_dump(recipe.model_dump(mode="json"), sort_keys=False, allow_unicode=True)
