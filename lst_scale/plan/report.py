"""A recipe next to its rivals: what each needs, whether it fits, and the largest micro-batch that does."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lst_scale.errors import ArgumentError
from lst_scale.plan.footprint import (
    BACKWARD,
    FORWARD,
    GRADIENTS,
    METHOD,
    OPTIMIZER,
    SAVED,
    STEP,
    TAPS,
    TRAINED,
    WEIGHTS,
    Footprint,
    Setting,
)
from lst_scale.plan.members import shared_request, together
from lst_scale.recipe.backbone import Replicated
from lst_scale.recipe.members import expand_members
from lst_scale.recipe.method import FullRecipe, LoraRecipe, LstRecipe, Method, ProbeRecipe
from lst_scale.recipe.release import ReleaseTask
from lst_scale.recipe.schema import CacheRecipe, Recipe
from lst_scale.recipe.task import FileTask, Task, images_of
from lst_scale.side.count import Shape
from lst_scale.system.assets import resolve

if TYPE_CHECKING:
    from lst_scale.backbone.cache.key import CacheKey

# Training rows of GLUE (Wang et al. 2019, as on the Hugging Face hub).
GLUE_ROWS = {"cola": 8551, "mnli": 392702, "mrpc": 3668, "qnli": 104743, "qqp": 363846, "rte": 2490, "sst2": 67349, "stsb": 5749}
TARGET = 8  # tokens of a target when the recipe leaves it open: a label and its end
MOST_ROWS = 1 << 16
MOST_LENGTH = 1 << 16  # tokens of a row
MOST_SOURCE_TOKENS, MOST_TARGET_TOKENS = 1 << 26, 1 << 20  # of a micro-batch
MOST_MEMORY = 10**15
TRIES = 8
# What a table has room for; the picture shows every part.
COLUMNS = {
    "backbone": (WEIGHTS,),
    "trained": (TRAINED,),
    "optimizer": (OPTIMIZER,),
    "taps": (TAPS,),
    "saved": (SAVED,),
    "gradients": (GRADIENTS,),
    "working": (FORWARD, METHOD, BACKWARD, STEP),
}


@dataclass(frozen=True, kw_only=True)
class Gpu:
    """What a GPU's memory is needed for beside tensors.

    context: bytes of the CUDA context, cuBLAS's workspace and NCCL's buffers; a typical value, not measured.
    fragmentation: share of the tensors' bytes that the caching allocator holds and nobody uses; 0.13 to 0.20 in steps of T5-3B on an H200
        (docs/benchmarks.md).
    """

    context: int = 900_000_000
    fragmentation: float = 0.17

    def needed(self, tensors: int) -> int:
        return self.context + int(tensors * (1 + self.fragmentation))

    def room(self, memory: int) -> int:
        """Return about how many bytes of tensors need `memory`."""
        return int((memory - self.context) / (1 + self.fragmentation))


@dataclass(frozen=True, kw_only=True)
class Line:
    """One way to train: its name, its footprint, and with a memory limit the largest micro-batch (0: not even one row)."""

    name: str
    found: Footprint
    largest: int | None = None


def setting_of(recipe: Recipe, *, world_size: int, on_gpu: bool, target: int | None) -> Setting:
    """Return the micro-batch that training would run, full rows of the longest lengths."""
    task = max(recipe.each_task, key=lambda task: recipe.rows_a_step(task) * _positions(recipe, task))  # the largest batch's
    a_rank = -(-recipe.rows_a_step(task) // world_size)
    if isinstance(recipe.method, ProbeRecipe):
        a_rank = recipe.evaluation.batch_size
    setting = Setting(
        rows=min(recipe.training.micro_batch_size or a_rank, a_rank),
        source=_longest_source(recipe, task),
        images=len(images_of(task)),
        target=target or recipe.data.max_target_length or TARGET,
        world_size=world_size,
        on_gpu=on_gpu,
    )
    _check_fits(setting)
    return setting


def _longest_source(recipe: Recipe, task: Task) -> int:
    own = task.of.source_length if isinstance(task, ReleaseTask) else None
    return min(recipe.data.max_source_length, own or recipe.data.max_source_length)


def _positions(recipe: Recipe, task: Task) -> int:
    """Return how many tokens a row has at most, of text and of images."""
    beside = 0 if recipe.vision is None else len(images_of(task)) * recipe.vision.pooled_grid**2
    return _longest_source(recipe, task) + beside


def _check_fits(setting: Setting) -> None:
    """Stop before steps are planned that no machine could take and that would take hours to plan.

    Raises:
        ArgumentError: says what is too much, and where it is written.
    """
    limits = (
        (setting.source, MOST_LENGTH, "source tokens a row", "data.max_source_length"),
        (setting.target, MOST_LENGTH, "target tokens a row", "--target or data.max_target_length"),
        (setting.rows * setting.source, MOST_SOURCE_TOKENS, "source tokens a micro-batch", "training.micro_batch_size"),
        (setting.rows * setting.target, MOST_TARGET_TOKENS, "target tokens a micro-batch", "training.micro_batch_size"),
        (setting.world_size, MOST_ROWS, "ranks", "--gpus"),
    )
    for value, most, what, where in limits:
        if value > most:
            raise ArgumentError(f"{value:.3g} {what} can't be planned: write a smaller {where}, at most {most:,} {what}")


def lines(
    recipe: Recipe,
    shape: Shape,
    setting: Setting,
    *,
    memory: int | None = None,
    gpu: Gpu | None = None,
    begin: Callable[[str], None] = lambda name: None,
) -> Iterator[Line]:
    """Yield the recipe, the recipe on remembered taps where it asks for a cache, and its rivals on the same batch.

    Args:
        begin: told the name of each before it is planned.
    """
    members = expand_members(recipe)
    for name, ways, where in _ways(members, setting):
        begin(name)
        peak = partial(together, ways, shape)
        yield Line(name=name, found=peak(where), largest=None if memory is None else largest_rows(peak, where, memory, gpu))


def largest_rows(peak: Callable[[Setting], Footprint], setting: Setting, memory: int, gpu: Gpu | None) -> int:
    """Return the most rows a micro-batch may have; 0: not even one.

    A peak is the highest of straight lines in the rows, one for each moment of the step. So each try is where the line through the last
    two meets the limit, and a try just on that line says that all is one line up to there, which one row more is not below.
    """

    def fits(tensors: int | Fraction) -> bool:
        return (tensors if gpu is None else gpu.needed(int(tensors))) <= memory

    limit = memory if gpu is None else gpu.room(memory)
    standing = sum(peak(setting).parts.get(part, 0) for part in (WEIGHTS, TRAINED, OPTIMIZER))
    low, high = 0, max(min(MOST_ROWS, MOST_TARGET_TOKENS // setting.target), setting.rows) + 1  # what fits, and what does not
    tries, rows = [(0, standing)], setting.rows  # no row was tried, and is but a first guess
    for _ in range(TRIES):
        size = peak(replace(setting, rows=rows)).peak
        foretold = len(tries) > 2 and _on_line(tries, rows) == size
        tries.append((rows, size))
        low, high = (rows, high) if fits(size) else (low, rows)
        if high - low == 1 or (foretold and low == rows and not fits(_on_line(tries, rows + 1))):
            break
        rows = min(max(_where_line_meets(tries, limit), low + 1), high - 1)
    return low


def _on_line(tries: Sequence[tuple[int, int]], rows: int) -> Fraction:
    """Return the bytes that the line through the last two tries (rows, bytes) has at `rows`."""
    (x, y), (x_last, y_last) = tries[-2:]
    return y + Fraction((y_last - y) * (rows - x), x_last - x)


def _where_line_meets(tries: Sequence[tuple[int, int]], limit: int) -> int:
    """Return the most rows at which the line through the last two tries is not above `limit`."""
    slope = _on_line(tries, 1) - _on_line(tries, 0)
    return int((limit - _on_line(tries, 0)) / max(slope, Fraction(1)))


def _ways(members: Sequence[Recipe], setting: Setting) -> Iterator[tuple[str, Sequence[Recipe], Setting]]:
    """Yield what is compared: a name, the recipes that train together, the setting."""
    first = members[0]
    name = first.method.name if len(members) == 1 else f"{len(members)} members"
    if isinstance(first.method, LstRecipe) and first.cache.enabled:
        yield f"{name}, first epoch", members, setting
        yield f"{name}, taps from disk", members, replace(setting, cached=True)
    else:
        yield name, members, setting
    frozen = "fp32" if first.backbone.precision == "fp32" else "bf16"
    arithmetic: Any = frozen
    rivals: list[tuple[str, Method, str]] = [
        (f"LoRA, {frozen}", LoraRecipe(name="lora", precision=arithmetic), frozen),
        (f"LoRA, {frozen}, checkpointed", LoraRecipe(name="lora", precision=arithmetic, gradient_checkpointing=True), frozen),
        ("full", FullRecipe(name="full", precision=arithmetic), "fp32"),
    ]
    for name, method, precision in rivals[:2]:
        if not _same_method(method, first.method):
            yield name, [as_rival(first, method, precision)], setting
    for packed, called in (("int8", "LoRA, int8"), ("nf4", "QLoRA, nf4")):
        for ending, again in (("", False), (", checkpointed", True)):
            method = LoraRecipe(name="lora", precision="bf16", gradient_checkpointing=again)
            yield called + ending, [as_rival(first, method, "bf16")], replace(setting, packed=packed)
    for name, method, precision in rivals[2:]:
        if not _same_method(method, first.method):
            yield name, [as_rival(first, method, precision)], setting


def _same_method(one: Method, other: Method) -> bool:
    return one.name == other.name and getattr(one, "gradient_checkpointing", 0) == getattr(other, "gradient_checkpointing", 0)


def as_rival(recipe: Recipe, method: Method, precision: str) -> Recipe:
    """Return the recipe with another method, on a whole backbone on every rank: what methods that run backward through it need."""
    whole = Replicated(name="replicated")
    backbone = recipe.backbone.model_copy(update={"precision": precision, "placement": whole, "max_quantization_error": None})
    return recipe.model_copy(update={"backbone": backbone, "method": method, "members": None, "cache": CacheRecipe()})


def cache_bytes(recipe: Recipe, shape: Shape, setting: Setting) -> tuple[int, int, bool]:
    """Return training rows, the bytes of their taps on disk at most (every row at full length), and whether the rows are really known."""
    rows = _train_rows(recipe)
    counted = rows or 1000
    return counted, _cache_key(recipe, shape).bytes_of(counted * setting.source, counted * setting.target), rows is not None


def where_a_cache_pays(recipe: Recipe, shape: Shape, setting: Setting) -> str:
    """Return one sentence: what a step reads, what it would compute, and at which speeds reading is the shorter."""
    from lst_scale.backbone.cache.pay import Tokens, break_even

    step = Tokens(source=setting.rows * setting.source, target=setting.rows * setting.target)
    return break_even(_cache_key(recipe, shape), shape.spec, step)


def _cache_key(recipe: Recipe, shape: Shape) -> CacheKey:
    """Return what says how many bytes a token takes; it is no cache's own."""
    from lst_scale.backbone.cache.key import CacheKey

    wanted = shared_request(expand_members(recipe), shape)
    assert wanted is not None, "only what reads taps has a cache of them"
    return CacheKey(
        fingerprint="",
        precision=recipe.backbone.precision,
        layers=wanted.layers,
        decoder_final=wanted.target_final,
        target_only=not wanted.source,
        d_model=shape.spec.d_model,
        dtype=recipe.cache.dtype,
    )


def _train_rows(recipe: Recipe) -> int | None:
    each = [_rows_of(task, recipe.data.max_train_rows) for task in recipe.each_task]
    return None if None in each else sum(rows for rows in each if rows is not None)


def _rows_of(task: Task, most: int | None) -> int | None:
    rows = most
    if isinstance(task, FileTask) and task.messages is None:  # a conversation is as many rows as it has answers
        path = Path(resolve(task.train))
        rows = _lines_of(path) if path.suffix == ".jsonl" and path.is_file() else most
    elif isinstance(task, str):
        rows = GLUE_ROWS[task]
    return rows if most is None or rows is None else min(rows, most)


def _lines_of(path: Path) -> int:
    with path.open("rb") as file:
        return sum(1 for _ in file)


def as_table(found: Sequence[Line], memory: int | None, gpu: Gpu | None) -> list[list[str]]:
    """Return the table's cells, header first; memory in GB (10^9 bytes)."""
    header = ["method", "trainable", *COLUMNS, "peak", "where"]
    if memory is not None:
        header += ["fits", "largest batch"]
    table = [header]
    for line in found:
        sizes = (sum(line.found.parts.get(part, 0) for part in parts) for parts in COLUMNS.values())
        cells = [line.name, f"{line.found.trainable:,}", *(_gb(size) for size in sizes)]
        cells += [_gb(line.found.peak), line.found.where]
        if memory is not None:
            needed = line.found.peak if gpu is None else gpu.needed(line.found.peak)
            cells += ["yes" if needed <= memory else f"no: {_gb(needed)}", str(line.largest)]
        table.append(cells)
    return table


def as_values(found: Sequence[Line], memory: int | None, gpu: Gpu | None) -> list[dict[str, Any]]:
    """Return the same table's rows in bytes and counts, with every part of the peak."""
    rows = []
    for line in found:
        peak = line.found.peak
        row = {
            "method": line.name,
            "trainable": line.found.trainable,
            "parts": line.found.parts,
            "peak_bytes": peak,
            "where": line.found.where,
        }
        if memory is not None:
            needed = peak if gpu is None else gpu.needed(peak)
            row |= {"needed_bytes": needed, "fits": needed <= memory, "largest_batch": line.largest}
        rows.append(row)
    return rows


def parse_memory(text: str) -> int:
    """Return the bytes of "16GB", "80GiB", "500MB".

    Raises:
        ArgumentError: it is none of those.
    """
    units = {"GIB": 2**30, "MIB": 2**20, "GB": 10**9, "MB": 10**6}
    for unit, size in units.items():
        number = text.upper().removesuffix(unit)
        if number != text.upper():
            try:
                value = float(number)
            except ValueError:
                break
            if 1 <= value * size < MOST_MEMORY:
                return int(value * size)
    raise ArgumentError(f"{text!r} is no size of memory: write for example 16GB or 80GiB")


def _gb(size: int) -> str:
    return f"{size / 1e9:.2f}" if size else "0"
