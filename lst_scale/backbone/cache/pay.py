"""Whether a tap cache pays: what it costs to read a token's taps beside computing them again, both measured where the run is.

Computing is taken as the matrix products of the backbone's blocks alone, at the speed of a product of its own width, so it is rather
more than is said here; reading is taken from the disk, not from the system's memory of files, so it may be less.
"""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from lst_scale.backbone.cache.key import CacheKey
from lst_scale.backbone.families import family_of
from lst_scale.backbone.spec import BackboneSpec

SAMPLE = 16 << 20  # bytes that are written and read to know a disk
MOST = 2e9  # operations of a try: a wide product is tried with fewer rows
TRIES = 3


@dataclass(frozen=True, kw_only=True)
class Tokens:
    """How many tokens of sources and of targets."""

    source: float
    target: float


@dataclass(frozen=True, kw_only=True)
class Rates:
    """What this machine does in a second."""

    read: float  # bytes from the disk under the cache
    compute: float  # floating-point operations in matrix products of the backbone's width


def rates(folder: Path, d_model: int, precision: str, device: torch.device) -> Rates:
    """Measure both, in about half a second. `folder` must be there, and nothing stays in it."""
    return Rates(read=_read_rate(folder), compute=_compute_rate(d_model, precision, device))


def sentence(key: CacheKey, spec: BackboneSpec, rows: Tokens, step: Tokens, found: Rates) -> str:
    """Say what the cache takes for `rows`, what a step costs with and without it, and what to write where it does not pay.

    Args:
        step: the tokens of one rank's step.
    """
    size, read = (key.bytes_of(round(tokens.source), round(tokens.target)) for tokens in (rows, step))
    reading, computing = read / found.read, operations(spec, step) / found.compute
    said = (
        f"the tap cache takes {size / 1e9:.2f} GB; a step reads {read / 1e6:.1f} MB in {reading:.3f} s at {found.read / 1e6:,.0f} MB/s, "
        f"computing that takes {computing:.3f} s or more at {found.compute / 1e9:,.0f} GFLOP/s"
    )
    if reading <= computing:
        return f"{said}: it pays, {computing / max(reading, 1e-9):.1f} times"
    less = "" if key.dtype == "int8" else "cache.dtype=int8, "
    return f"{said}: it does not pay; write {less}fewer method.side_layers, a cache.folder on a faster disk, or cache.enabled=false"


def break_even(key: CacheKey, spec: BackboneSpec, step: Tokens) -> str:
    """Say where the cache pays, for machines that are not at hand."""
    read, computed = key.bytes_of(round(step.source), round(step.target)), operations(spec, step)
    return (
        f"a step reads {read / 1e6:.1f} MB of taps instead of computing {computed / 1e12:.3g} TFLOP: the cache pays where the disk reads "
        f"{1e3 * read / computed:.2g} GB/s or more for each TFLOP/s of the device"
    )


def operations(spec: BackboneSpec, tokens: Tokens) -> float:
    """Return the floating-point operations of the matrix products in a forward pass: two a weight and token."""
    family = family_of(spec.model_type, "this backbone")
    with torch.device("meta"):
        model = family.unfilled(spec, shards=1)
    weights = dict.fromkeys(family.stacks, 0)
    for ref in family.blocks(spec):
        weights[ref.stack] += sum(parameter.numel() for parameter in ref.get(model).parameters() if parameter.dim() == 2)
    source, target = family.stacks
    return 2 * (weights[source] * tokens.source + weights[target] * tokens.target)


def _read_rate(folder: Path) -> float:
    """Write a file, let the system forget its contents, and read it: bytes a second of the fastest try."""
    data = memoryview(os.urandom(1 << 20) * (SAMPLE >> 20))
    with tempfile.TemporaryFile(dir=folder) as file:  # without a name: nothing stays even where this process is killed
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
        into = bytearray(SAMPLE)

        def read() -> None:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
            os.preadv(file.fileno(), [into], 0)

        return SAMPLE / _fastest(read)


def _compute_rate(width: int, precision: str, device: torch.device) -> float:
    """Multiply as a block of this width does, in the arithmetic of its precision: operations a second of the fastest try."""
    dtype = torch.float32 if precision == "fp32" else torch.bfloat16
    rows = max(16, min(512, int(MOST / (2 * width * width))))
    one, other = (torch.ones(count, width, device=device, dtype=dtype) for count in (rows, width))
    wait = torch.cuda.synchronize if device.type == "cuda" else _nothing

    def multiply() -> None:
        torch.matmul(one, other)
        wait()

    multiply()  # the first sets up what later ones find
    return 2 * rows * width * width / _fastest(multiply)


def _fastest(work: Callable[[], None]) -> float:
    """Return the seconds of the fastest of some tries."""
    taken = []
    for _ in range(TRIES):
        began = time.perf_counter()
        work()
        taken.append(time.perf_counter() - began)
    return min(taken)


def _nothing() -> None:
    pass
