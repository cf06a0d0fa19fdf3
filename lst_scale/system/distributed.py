"""Processes: who am I, where do I run, and the few collectives we use. The only file that touches torch.distributed.

Ranks come from the environment alone (RANK, WORLD_SIZE, LOCAL_RANK), which `deepspeed`, `torchrun` and Slurm set-ups export and
a plain `python -m lst_scale.train` lacks: then this process is a world of one.
"""

from __future__ import annotations

import contextlib
import os
import socket
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from lst_scale.errors import ArgumentError, LstScaleError
from lst_scale.system import preemption

T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class World:
    """This process among all. `device` is where its backbone and side network live."""

    rank: int
    size: int
    local_rank: int
    device: torch.device

    @property
    def is_main(self) -> bool:
        return self.rank == 0


def connect() -> World:
    """Join the process group that the launcher describes (gloo on the CPU, nccl on CUDA) and return this process's place in it."""
    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")  # or DeepSpeed warns at the head of every run that it found nothing else
    import deepspeed

    # DeepSpeed calls collectives by names that torch 2.13 renamed; the warning would come at every step.
    warnings.filterwarnings("ignore", message=".*torch.distributed.*is deprecated", category=FutureWarning)
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK")
    present = [name for name in names if name in os.environ]
    if present and len(present) < len(names):
        missing = ", ".join(name for name in names if name not in os.environ)
        raise ArgumentError(
            f"the environment sets {', '.join(present)} but not {missing}: start with deepspeed, torchrun or plain python -m"
        )
    if not present:
        os.environ.update(RANK="0", WORLD_SIZE="1", LOCAL_RANK="0", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(_free_port()))
    rank, size, local_rank = (int(os.environ[name]) for name in names)
    use_cuda = torch.cuda.is_available() and os.environ.get("DS_ACCELERATOR") != "cpu"
    if use_cuda:
        torch.cuda.set_device(local_rank)
    if not dist.is_initialized():
        # Without oversubscription: the default of all cores in each process makes two processes slower than one.
        if not use_cuda and size > 1 and "OMP_NUM_THREADS" not in os.environ:
            torch.set_num_threads(max(1, (os.cpu_count() or 1) // size))
        # DeepSpeed's shared-memory all-reduce for the CPU ignores its group (it sums over all local ranks) and is compiled at first use.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
        deepspeed.init_distributed(dist_backend="nccl" if use_cuda else "gloo", auto_mpi_discovery=False, verbose=False)
    device = torch.device("cuda", local_rank) if use_cuda else torch.device("cpu")
    return World(rank=rank, size=size, local_rank=local_rank, device=device)


def disconnect(*, together: bool = True) -> None:
    """Leave the process group: an interpreter that ends inside one may abort.

    Args:
        together: wait until all ranks are here, because one that leaves closes its connections, which can fail a collective that others
            are still in. False where this rank alone leaves.
    """
    if not dist.is_initialized():
        return
    if together:
        with contextlib.suppress(RuntimeError):  # this barrier's own: whoever left it first had seen all others come
            barrier()
    import deepspeed

    deepspeed.comm.destroy_process_group()  # and what DeepSpeed remembers of it: a further run in this process may join another


def barrier() -> None:
    if dist.is_initialized() and dist.get_world_size() > 1:
        dist.barrier()


def sum_over_ranks(values: Tensor) -> list[float]:
    """Return the element-wise sum of `values` (float64, on this rank's device) over all ranks. The device is waited for once."""
    if dist.get_world_size() > 1:
        dist.all_reduce(values)
    result: list[float] = values.tolist()
    return result


def poll_interruption(world: World) -> None:
    """Leave together when any rank was asked to. All ranks must call it.

    Raises:
        Interrupted: on every rank.
    """
    request = torch.tensor(float(preemption.requested()), device=world.device)
    if world.size > 1:
        dist.all_reduce(request, op=dist.ReduceOp.MAX)
    preemption.leave_if(int(request))


def gather(value: T) -> list[T]:
    """Return every rank's `value`, by rank. For small picklable records of our own making."""
    gathered: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(gathered, value)
    return gathered


def gather_on_main(world: World, value: T) -> list[T]:
    """Return every rank's `value`, by rank, on rank 0, and nothing on the others: for what is too large for all to hold."""
    if world.size == 1:
        return [value]
    gathered: list[Any] | None = [None] * world.size if world.is_main else None
    dist.gather_object(value, gathered, dst=0)
    return gathered or []


def on_main_rank(world: World, action: Callable[[], T]) -> T:
    """Run `action` on rank 0 and return its result on every rank; its error is raised on every rank, so that none waits for ever."""
    outcome: list[Any] = [None, None]
    if world.is_main:
        try:
            outcome = [action(), None]
        except Exception as error:
            outcome = [None, error]
    if world.size > 1:
        dist.broadcast_object_list(outcome, src=0)
    if outcome[1] is not None:
        raise same_everywhere(outcome[1]) if isinstance(outcome[1], LstScaleError) else outcome[1]
    result: T = outcome[0]
    return result


def agree(world: World, action: Callable[[], T]) -> T:
    """Run `action` on every rank; when it fails on any, all raise one error that names the ranks, so that none waits for the others.

    `action` must not talk to other ranks.
    """
    if world.size == 1:
        return action()
    result: T | None = None
    failure: LstScaleError | None = None
    try:
        result = action()
    except LstScaleError as error:
        failure = error
    found = gather(None if failure is None else (type(failure), str(failure)))
    failed = [(rank, *each) for rank, each in enumerate(found) if each is not None]
    if failed:
        _, kind, message = failed[0]
        where = f"rank {', '.join(str(rank) for rank, *_ in failed)}: " if len(failed) < world.size else ""
        raise same_everywhere(kind(f"{where}{message}")) from failure
    return result  # type: ignore[return-value]  # of action, which did not fail


def same_everywhere(error: LstScaleError) -> LstScaleError:
    """Mark an error that every rank raises: rank 0 alone will print it."""
    error.same_on_all_ranks = True
    return error


def is_lost_contact(error: BaseException) -> bool:
    """Whether a collective failed because another rank is gone."""
    signs = ("Connection closed by peer", "Connection reset by peer", "Broken pipe", "Timed out waiting", "NCCL", "Socket", "Connect")
    return isinstance(error, dist.DistError) or (isinstance(error, RuntimeError) and any(sign in str(error) for sign in signs))


class Group:
    """Ranks that share one copy of a backbone."""

    def __init__(self, ranks: list[int], rank: int, handle: Any) -> None:
        self.ranks, self.size, self.handle = ranks, len(ranks), handle
        self.rank = ranks.index(rank)  # of this process within the group

    def sum(self, tensor: Tensor) -> Tensor:
        """Return the sum over the group, in place where that is possible."""
        if self.size > 1:
            dist.all_reduce(tensor, group=self.handle)
        return tensor

    def largest(self, tensor: Tensor) -> Tensor:
        """Return the element-wise maximum over the group."""
        tensor = tensor.clone()
        if self.size > 1:
            dist.all_reduce(tensor, op=dist.ReduceOp.MAX, group=self.handle)
        return tensor

    def start_all_gather(self, output: Tensor, part: Tensor) -> Any:
        """Begin to fill `output` with the `part`s of all ranks in order; the result's `wait()` ends it."""
        all_gather = getattr(dist, "all_gather_single", dist.all_gather_into_tensor)  # its name from torch 2.13 on
        return all_gather(output, part, group=self.handle, async_op=True)

    def gather_rows(self, rows: Tensor, fill: int, *, on_left: bool = False) -> tuple[Tensor, slice]:
        """Return the rows (B, L) of all ranks, short ones filled up with `fill` on the right or left, and where this rank's own are."""
        shapes = self._all_gather(torch.tensor(rows.shape, device=rows.device))
        counts, lengths = [int(shape[0]) for shape in shapes], [int(shape[1]) for shape in shapes]
        padded = rows.new_full((max(counts), max(lengths)), fill)
        first = max(lengths) - rows.shape[1] if on_left else 0
        padded[: rows.shape[0], first : first + rows.shape[1]] = rows
        everyone = torch.cat([part[:count] for part, count in zip(self._all_gather(padded), counts, strict=True)])
        start = sum(counts[: self.rank])
        return everyone, slice(start, start + rows.shape[0])

    def _all_gather(self, tensor: Tensor) -> list[Tensor]:
        parts = [torch.empty_like(tensor) for _ in range(self.size)]
        dist.all_gather(parts, tensor, group=self.handle)
        return parts


class Channel:
    """Rank 0 tells the others what to run, beside the collectives of what runs. On the processor, where waiting costs nothing. All ranks
    must make it."""

    def __init__(self) -> None:
        self._group = dist.new_group(backend="gloo")

    def tell(self, what: Any) -> None:
        """Send a record of our own making, small and picklable, from rank 0."""
        dist.broadcast_object_list([what], src=0, group=self._group, device=torch.device("cpu"))

    def hear(self) -> Any:
        """Wait for the next on another rank."""
        heard = [None]
        dist.broadcast_object_list(heard, src=0, group=self._group, device=torch.device("cpu"))
        return heard[0]


def consecutive_group(world: World, size: int) -> Group:
    """Divide all ranks into groups of `size` consecutive ones and return this rank's. All ranks must call it."""
    mine = None
    for first in range(0, world.size, size):
        ranks = list(range(first, first + size))
        handle = dist.new_group(ranks)
        if world.rank in ranks:
            mine = Group(ranks, world.rank, handle)
    assert mine is not None, "size divides the world"
    return mine


def nodes(world: World) -> list[str]:
    """Return the machine that each rank runs on."""
    return gather(os.environ.get("SLURM_NODEID") or socket.gethostname()) if world.size > 1 else [socket.gethostname()]


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
