"""A recipe: one YAML file a run, complete without inheritance; defaults live here; `key=value` overrides on the command line.

Imports no torch: a mistake in a recipe is reported in well under a second. Backbone, method and
tasks have their sections in `backbone.py`, `method.py`, `task.py` and `release.py`; decoding and its error messages are in `decode.py`.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, Union

import yaml
from pydantic import BeforeValidator, Discriminator, Field, Tag, field_validator, model_validator

from lst_scale.errors import RecipeError
from lst_scale.recipe import decode
from lst_scale.recipe.amounts import Beams, Epochs, Length, NewTokens, Rows, Seed, Share
from lst_scale.recipe.backbone import PLACEMENTS, BackboneRecipe
from lst_scale.recipe.decode import Count, Section
from lst_scale.recipe.grid import grid_as_lines
from lst_scale.recipe.marks import KEPT_BY_RESUME, ONE_FOR_MEMBERS
from lst_scale.recipe.method import METHODS, LstRecipe, Method, ProbeRecipe
from lst_scale.recipe.release import FORMATS, LONGEST_ANSWER, ReleaseTask
from lst_scale.recipe.task import GLUE, FileTask, OwnName, Task, beside, images_of, name_of, rows_a_step, which_task, written_out
from lst_scale.recipe.vision import VisionRecipe
from lst_scale.system.assets import find_recipe
from lst_scale.system.names import Name, PathText, checked_name

_CHOICES = {"method": METHODS, "backbone.placement": PLACEMENTS}  # sections chosen by their name

if TYPE_CHECKING:
    AnyTask = Task
else:
    _WORDS = Literal[(*GLUE, *FORMATS)]
    _TASKS = (Annotated[_WORDS, Tag("<word>")], Annotated[FileTask, Tag("<mapping>")], Annotated[ReleaseTask, Tag("<format>")])
    AnyTask = Annotated[Union[_TASKS], Discriminator(which_task), BeforeValidator(written_out)]  # noqa: UP007, made at run time


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
    epochs: Epochs | None = None  # None: 3 for one's own files, 10 or 20 for GLUE by task, 20 for the release's tasks
    max_steps: Count | None = None  # ends the run earlier than epochs would
    global_batch_size: Annotated[Rows, ONE_FOR_MEMBERS, KEPT_BY_RESUME] = 100  # rows an optimizer step, over all ranks
    micro_batch_size: Annotated[Rows | None, ONE_FOR_MEMBERS] = None  # rows a forward pass; None: all of a rank's share
    deepspeed: Annotated[PathText, ONE_FOR_MEMBERS] = "zero2"  # a file of ds_configs/, or a path
    evaluate_every: decode.either(number=Count, word=Literal["epoch"]) = "epoch"  # type: ignore[valid-type]  # optimizer steps
    patience: Count | None = None  # evaluations without a better score before stopping
    # the weights that are saved and scored on the test split: of the best evaluation, or the last ones (the release's vision half)
    result: Annotated[Literal["best", "last"], KEPT_BY_RESUME] = "best"
    save_every_steps: Count | None = None  # beside those at every evaluation
    keep_checkpoints: Count = 2  # the newest, to resume from
    # A finished run, or its side_network/ or trained/: its weights are where this run begins.
    start_from: Annotated[PathText | None, KEPT_BY_RESUME] = None

    @model_validator(mode="after")
    def _patience_for_the_best(self) -> TrainingRecipe:
        if self.patience is not None and self.result == "last":
            raise ValueError("patience has no effect on result last: remove it or write result: best")
        return self

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
    # global batches that are sorted by length together, which saves padding; where length tells the kind of question, each batch is then of
    # one kind (easy-VQA lost 6 points): write 1
    length_pool: Rows = 50
    shuffle_buffer: Rows = 10_000  # of task.streaming: rows that are shuffled together, of all processes


class EvaluationRecipe(Section):
    # write an answer; choose the likeliest label; or take the mean of the numbers among the training targets, each as likely as it is
    method: Literal["generation", "likelihood", "expectation"] = "generation"
    batch_size: Rows = 64  # rows at once
    num_beams: Beams = 1  # of generation
    max_new_tokens: NewTokens | None = None  # None: the longest target

    score_start: bool = False  # before training also score what the method starts as, on the rows that the result is of

    @model_validator(mode="after")
    def _beams_need_generation(self) -> EvaluationRecipe:
        if self.method != "generation" and (self.num_beams != 1 or self.max_new_tokens is not None):
            raise ValueError(f"num_beams and max_new_tokens have no effect on method {self.method}: remove them or write generation")
        return self


class CacheRecipe(Section):
    """Taps remembered on disk, so that no row is run through the backbone twice."""

    enabled: bool = False  # write taps down in the first epoch and read them later
    dtype: Literal["bf16", "fp32", "int8"] = "bf16"  # in which they are stored
    folder: PathText | None = None  # None: ~/.cache/lst_scale/taps


class LoggingRecipe(Section):
    # trackers that are told the numbers, each needs its package: pip install 'lst_scale[wandb]'
    report_to: tuple[Literal["tensorboard", "wandb", "trackio", "mlflow"], ...] = ()
    project: str | None = None  # under which trackers file the run; None: as their environment says, or lst_scale
    callbacks: tuple[OwnName, ...] = ()  # classes of one's own that are told them, as module:Class or a file beside the recipe
    tensorboard: bool = False  # the same as report_to: [tensorboard]
    log_every_steps: Count = 10  # a line of loss, learning rate and time
    profile_steps: tuple[Count, Count] | None = None  # first and last step, counted from 1, that are traced into the run's folder

    @property
    def reports(self) -> tuple[str, ...]:
        """All trackers."""
        return ("tensorboard", *self.report_to) if self.tensorboard else self.report_to

    @model_validator(mode="after")
    def _each_once(self) -> LoggingRecipe:
        for key, names in (("report_to", self.report_to), ("callbacks", self.callbacks)):
            if twice := [name for name in names if names.count(name) > 1]:
                raise ValueError(f"{key} names {twice[0]} twice: write it once")
        if self.tensorboard and "tensorboard" in self.report_to:
            raise ValueError("tensorboard: true says what report_to says too: remove it")
        if self.project is not None and not set(self.report_to) - {"tensorboard"}:
            raise ValueError("project has no effect without wandb, trackio or mlflow in report_to: remove it")
        return self

    def with_code_of(self, folder: Path) -> LoggingRecipe:
        """Return the same with each class of one's own that is a file in `folder` named by that file's whole path."""
        return self.model_copy(update={"callbacks": tuple(beside(folder, name) for name in self.callbacks)})

    @model_validator(mode="after")
    def _check_steps(self) -> LoggingRecipe:
        if self.profile_steps is not None and self.profile_steps[0] > self.profile_steps[1]:
            first, last = self.profile_steps
            raise ValueError(f"profile_steps [{first}, {last}] ends before it begins: write [{last}, {first}]")
        return self


class Recipe(Section):
    """What `run` carries out. `task` is one of GLUE's names, a task of the release's CLIP-T5, or a mapping for one's own files; `tasks`
    are several of them."""

    name: Name  # of the run; its folder is NAME-TASK-seedN
    # what is learned: a task of GLUE, one of the release's CLIP-T5, or one's own files as below
    task: Annotated[AnyTask | None, ONE_FOR_MEMBERS, KEPT_BY_RESUME] = None
    # or several, in batches of one task each that come in proportion to the tasks' sizes; the score is the mean of the tasks'
    tasks: Annotated[tuple[AnyTask, ...] | None, Field(min_length=1), ONE_FOR_MEMBERS, KEPT_BY_RESUME] = None
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
    def each_task(self) -> tuple[Task, ...]:
        """All tasks: one is a list of one."""
        return self.tasks or (() if self.task is None else (self.task,))

    @property
    def image_counts(self) -> tuple[int, ...]:
        """How many images a row may have, least first; empty: rows are text alone."""
        return tuple(sorted({len(images_of(task)) for task in self.each_task} - {0}))

    def rows_a_step(self, task: Task) -> int:
        """Return how many rows a step on one of the tasks has."""
        return rows_a_step(task, self.training.global_batch_size)

    def evaluation_of(self, task: Task) -> EvaluationRecipe:
        """Return how answers to one of the tasks are made: to those of the release as it makes them."""
        if not isinstance(task, ReleaseTask):
            return self.evaluation
        ways = {"method": "likelihood" if task.of.labels else "generation", "num_beams": task.num_beams or task.of.num_beams}
        return self.evaluation.model_copy(update=ways | {"max_new_tokens": task.max_new_tokens or LONGEST_ANSWER})

    @model_validator(mode="after")
    def _some_task(self) -> Recipe:
        if self.task is None and self.tasks is None:
            raise ValueError("task is missing; write task: ...")
        if self.task is not None and self.tasks is not None:
            raise ValueError("task and tasks are both there: write one of them")
        names = [name_of(task) for task in self.each_task]
        if twice := sorted({name for name in names if names.count(name) > 1}):
            raise ValueError(f"tasks: two are called {twice[0]}: write another name for one")
        if len(names) > 1 and any(isinstance(task, FileTask) and task.streaming for task in self.each_task):
            raise ValueError("tasks: one that streams has no end, so it goes alone: remove streaming, or write it as task")
        if len(names) > 1 and self.backbone.context is not None:
            raise ValueError("backbone.context stands before the rows of one task: remove it, or write one task")
        own = self.evaluation.model_fields_set & {"method", "num_beams", "max_new_tokens"}
        changed = [key for key in sorted(own) if getattr(self.evaluation, key) != type(self.evaluation).model_fields[key].default]
        if changed and all(isinstance(task, ReleaseTask) for task in self.each_task):
            raise ValueError(f"evaluation.{changed[0]} has no effect on tasks of the release, which say it themselves: remove it")
        return self

    @model_validator(mode="after")
    def _images_are_read(self) -> Recipe:
        if self.vision is None and self.image_counts:
            raise ValueError(
                "task.images names pictures, but nothing says how they are read: write vision: {image_model: ..., feature_dim: ...}"
            )
        if self.vision is not None and not self.image_counts:
            raise ValueError("vision has no effect without pictures: name their columns in task.images, or remove it")
        without = [name_of(task) for task in self.each_task if not images_of(task)]
        if self.vision is not None and without:
            raise ValueError(f"tasks: {without[0]} has no pictures and others have: give all of them some, or none")
        if isinstance(self.method, LstRecipe):
            if self.vision is not None and self.method.design != "transformer":
                raise ValueError(f"method.design {self.method.design} reads no images: write transformer")
            if self.vision is not None and self.vision.vocab_size is not None:
                raise ValueError("vision.vocab_size has no effect on method lst, whose backbone stays as it is: remove it")
            if self.vision is None and not (self.method.scale_image_rows and self.method.object_order == "random"):
                raise ValueError("method.scale_image_rows and method.object_order have no effect without vision: remove them")
        return self

    @model_validator(mode="after")
    def _nothing_before_a_tail(self) -> Recipe:
        if isinstance(self.method, LstRecipe) and self.method.design == "tail" and self.backbone.context is not None:
            raise ValueError(
                "backbone.context is run once, and method.design=tail runs the last blocks anew: write its text into task.template, "
                "or choose design transformer"
            )
        return self

    @model_validator(mode="after")
    def _fitted_to_labels(self) -> Recipe:
        """Say everything that a method without steps can't go with, or has no use for."""
        method = self.method
        for key in method.no_effect:
            section, _, last = key.partition(".")
            found, default = getattr(self, section), type(self).model_fields[section].default
            if last:
                found, default = getattr(found, last), getattr(default, last)
            if found != default:
                raise ValueError(f"{key} has no effect on method {method.name}, which goes through the rows once: remove it")
        if not isinstance(method, ProbeRecipe):
            return self
        (task, *more) = self.each_task
        file = task if isinstance(task, FileTask) else None
        wrong = {
            "tasks: a probe answers one: write task": bool(more),
            "task: a probe chooses among labels: write a classification": isinstance(task, ReleaseTask)
            or task == "stsb"
            or (file is not None and file.kind != "classification"),
            "task.streaming: a probe is fitted to all rows at once: remove it": file is not None and file.streaming,
            "task.score: a probe counts every row once: remove it": file is not None and file.score is not None,
            "vision: a probe reads the backbone, which sees no pictures: remove it": self.vision is not None,
            "evaluation.method: a probe chooses the likeliest label: write likelihood": self.evaluation.method != "likelihood",
        }
        if found := [what for what, is_so in wrong.items() if is_so]:
            raise ValueError(f"method probe: {'; '.join(found)}")
        return self

    @model_validator(mode="after")
    def _streams_alone(self) -> Recipe:
        """Say everything that a stream of rows can't go with, or needs."""
        if not isinstance(self.task, FileTask) or not self.task.streaming:
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
            "write method.initialization=random: a probe is fitted before the first step": (
                isinstance(self.method, LstRecipe) and self.method.initialization == "probe"
            ),
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
        return "-".join(map(name_of, self.each_task))

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
    found = [task.with_metrics_of(path.parent) if isinstance(task, FileTask) else task for task in recipe.each_task]
    told = recipe.logging.with_code_of(path.parent)
    return recipe.model_copy(update={"logging": told} | ({"task": found[0]} if recipe.tasks is None else {"tasks": tuple(found)}))


def parse_recipe(text: str, where: str, overrides: Sequence[str] = ()) -> Recipe:
    """Decode a recipe's YAML text; `where` names it in error messages."""
    tree, problems = decode.read_yaml(text, where)
    problems += decode.apply_overrides(tree, _switched(tree, overrides))
    return decode.build(Recipe, tree, problems)


def _switched(tree: dict[str, Any], overrides: Sequence[str]) -> list[str]:
    """Return overrides with those first that choose another method or placement, whose section then loses what only the old one has.

    So `method.name=lora` works on any recipe, and complains of no key that was not typed: nor of those outside its section that say nothing
    to it. What both have stays as the file says. Likewise one task in place of several, or several in place of one.
    """
    for one, other in (("task", "tasks"), ("tasks", "task")):
        if other in tree and any(override.startswith(f"{one}=") for override in overrides):
            del tree[other]
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
            for key in _CHOICES[path][chosen].no_effect:
                _remove(tree, key)
    return [*first, *(override for override in overrides if override not in first)]


def _remove(tree: dict[str, Any], key: str) -> None:
    """Take a dotted key out of a tree, if it is there."""
    *above, last = key.split(".")
    for part in above:
        tree = tree.get(part, {}) if isinstance(tree, dict) else {}
    if isinstance(tree, dict):
        tree.pop(last, None)


def to_yaml(recipe: Recipe) -> str:
    """Return the resolved recipe, every value written out; it loads back equal."""
    return yaml.dump(recipe.model_dump(mode="json"), Dumper=decode.Dumper, sort_keys=False, allow_unicode=True)
