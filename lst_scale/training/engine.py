"""DeepSpeed gets the side network, and nothing else.

The frozen backbone never enters the engine: checkpoints weigh megabytes, a quantized weight is never touched, and any ZeRO stage
is a free choice. Side weights are float32 under every stage (bf16 is a matter of autocast inside the network), so no stage keeps a
second master copy whose rounding could differ.

What a checkpoint needs is read out whole, under names that no stage or world size knows (`snapshot`), and put back in two moves:
weights before the engine is made, Adam's moments after (`restore_moments`).
"""

from __future__ import annotations

import contextlib
import importlib
from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

import torch
from pydantic import ValidationError
from torch import Tensor, nn

from lst_scale.errors import RecipeError, fence
from lst_scale.methods.base import trained_parameters
from lst_scale.recipe.schema import OptimizerRecipe

MOMENTS = ("exp_avg", "exp_avg_sq")


@dataclass(frozen=True, kw_only=True)
class Snapshot:
    """Weights and Adam's moments by parameter name, whole, float32, on the CPU. Empty on ranks other than 0."""

    weights: dict[str, Tensor]
    moments: dict[str, Tensor]  # "exp_avg/NAME" and "exp_avg_sq/NAME"


def build_engine(
    module: nn.Module,
    optimizer: OptimizerRecipe,
    ds_config: dict[str, Any],
    *,
    micro_batch_size: int,
    accumulation: int,
    no_decay: Collection[str] = (),
) -> Any:
    """Return a DeepSpeed engine over `module`. The recipe's values are added to those of a file in ds_configs/.

    Args:
        no_decay: names of matrices that weight decay leaves alone; it never touches vectors.
    """
    import deepspeed

    _spare_muon()
    config = ds_config | {
        "train_micro_batch_size_per_gpu": micro_batch_size,
        "gradient_accumulation_steps": accumulation,
        "gradient_clipping": optimizer.max_grad_norm,
        "zero_allow_untested_optimizer": True,
        "steps_per_print": 2**31,
    }
    _size_buckets(config, sum(parameter.numel() for parameter in trained_parameters(module).values()))
    adam = torch.optim.AdamW(
        parameter_groups(module, optimizer.weight_decay, no_decay),
        lr=optimizer.learning_rate,
        betas=optimizer.betas,
        eps=optimizer.epsilon,
        fused=True,  # one kernel in place of a dozen a tensor, and no temporaries as large as what trains
    )
    engine, *_ = deepspeed.initialize(model=module, optimizer=adam, config=config, dist_init_required=False)
    return engine


def check_ds_config(ds_config: dict[str, Any], name: str) -> None:
    """Let DeepSpeed look at the values of a file in ds_configs/, before anything is loaded. The process group must be there.

    Raises:
        RecipeError: what DeepSpeed says against them, in one line.
    """
    from deepspeed.runtime.config import DeepSpeedConfig

    with fence(RecipeError, f"training.deepspeed: {name}"):
        try:
            DeepSpeedConfig(ds_config | {"train_micro_batch_size_per_gpu": 1})
        except ValidationError as error:
            first = error.errors(include_url=False)[0]
            where = ".".join(map(str, first["loc"]))
            raise RecipeError(f"training.deepspeed: {name}: {where} is {first['input']!r:.60}: {first['msg']}") from error


def _spare_muon() -> None:
    """Import DeepSpeed's Muon without torch.compile, whose own imports take two seconds of processor time.

    Every ZeRO engine imports it, to ask whether the optimizer is Muon (DeepSpeed 0.19); ours never is.
    """
    from deepspeed.runtime import compiler

    if not hasattr(compiler, "compile"):
        return
    compile_, compiler.compile = compiler.compile, lambda *_, **__: lambda function: function
    try:
        with contextlib.suppress(ImportError):
            importlib.import_module("deepspeed.runtime.zero.muon.muon_optimizer")
    finally:
        compiler.compile = compile_


def release(engine: Any) -> None:
    """End an engine that trains no more: ZeRO's hooks on weights would keep them, their gradients and Adam's moments in memory."""
    engine.destroy()
    if hasattr(engine.optimizer, "fp32_partitioned_groups_flat"):
        _forget_in_zero3(engine.module)


def _forget_in_zero3(module: nn.Module) -> None:
    """Take a module out of what ZeRO-3 keeps for the whole process and never lets go of by itself (DeepSpeed 0.19)."""
    from deepspeed.runtime.zero import parameter_offload
    from deepspeed.runtime.zero.partitioned_param_coordinator import PartitionedParameterCoordinator

    # Root modules, and layers whose forward pass recomputation cut short.
    ours, stack = set(module.modules()), parameter_offload.FWD_MODULE_STACK
    stack[:] = [other for other in stack if other not in ours]
    # An lru_cache on a method holds every coordinator, and so its engine; others' entries are made again when they are needed.
    cached = getattr(PartitionedParameterCoordinator, "_PartitionedParameterCoordinator__params_to_release", None)
    for cell in getattr(cached, "__closure__", None) or ():
        if hasattr(cell.cell_contents, "cache_clear"):
            cell.cell_contents.cache_clear()


def _size_buckets(config: dict[str, Any], trained: int) -> None:
    """Let ZeRO's communication buffers hold what trains, where the file does not say: DeepSpeed's own 5e8 elements are 2 GB in float32.

    An even number of elements: DeepSpeed refuses others.
    """
    zero = dict(config.get("zero_optimization", {}))
    largest = max(min(trained + trained % 2, 500_000_000), 2)
    names = ("reduce_bucket_size", *(("stage3_prefetch_bucket_size",) if zero.get("stage") == 3 else ("allgather_bucket_size",)))
    config["zero_optimization"] = {name: largest for name in names} | zero


def parameter_groups(module: nn.Module, weight_decay: float, no_decay: Collection[str] = ()) -> list[dict[str, Any]]:
    """Everything with weight decay, except vectors (norms, biases, gates) and what is named in `no_decay`."""
    decayed: list[nn.Parameter] = []
    kept: list[nn.Parameter] = []
    for name, parameter in trained_parameters(module).items():
        (kept if parameter.ndim < 2 or name in no_decay else decayed).append(parameter)
    groups = [{"params": decayed, "weight_decay": weight_decay}, {"params": kept, "weight_decay": 0.0}]
    return [group for group in groups if group["params"]]


def set_learning_rate(engine: Any, learning_rate: float) -> None:
    """Set the rate of every group; called before each step, so that no scheduler state has to be saved."""
    for group in engine.optimizer.param_groups:
        group["lr"] = learning_rate


def full_weights(engine: Any) -> dict[str, Tensor]:
    """Return the whole weights by name, on every rank; under ZeRO-3 they are gathered one at a time. All ranks must call it."""
    import deepspeed

    weights = {}
    for name, parameter in trained_parameters(engine.module).items():
        partitioned = hasattr(parameter, "ds_id")
        with deepspeed.zero.GatheredParameters([parameter]) if partitioned else contextlib.nullcontext():
            weights[name] = parameter.detach().to("cpu", torch.float32, copy=True)
        # An adapter saved empty under ZeRO-3 (DeepSpeed issue 7900) is the failure to guard against.
        assert weights[name].numel() == getattr(parameter, "ds_numel", parameter.numel()) > 0, f"{name} was gathered empty"
    return weights


def snapshot(engine: Any, *, keep: bool) -> Snapshot:
    """Gather weights and moments of all ranks; `keep` is true on the rank that will write them. All ranks must call it."""
    from deepspeed.utils import safe_get_full_optimizer_state

    weights = full_weights(engine)
    _link_moments(engine)
    moments = {}
    for name, parameter in trained_parameters(engine.module).items():
        for moment in MOMENTS:
            if _is_sharded(parameter):
                value = safe_get_full_optimizer_state(parameter, moment)
            else:
                value = engine.optimizer.state[parameter][moment]
            moments[f"{moment}/{name}"] = value.detach().to("cpu", torch.float32, copy=True).view_as(weights[name])
    return Snapshot(weights=weights if keep else {}, moments=moments if keep else {})


def restore_moments(engine: Any, moments: dict[str, Tensor], step: int) -> None:
    """Put Adam's moments and its step count into a fresh engine whose weights were loaded before it was made."""
    from deepspeed.utils import safe_set_full_optimizer_state, safe_set_local_optimizer_state

    adam = getattr(engine.optimizer, "optimizer", engine.optimizer)
    for tensor in _optimizer_tensors(engine):
        empty = {moment: torch.zeros_like(tensor, requires_grad=False) for moment in MOMENTS}
        adam.state[tensor] = empty | adam.state.get(tensor, {}) | {"step": torch.tensor(float(step), device=tensor.device)}
    _link_moments(engine)
    for name, parameter in trained_parameters(engine.module).items():
        for moment in MOMENTS:
            value = moments[f"{moment}/{name}"].to(parameter.device)
            if hasattr(parameter, "ds_id"):
                # safe_set_full_optimizer_state fails where the world size does not divide the parameter.
                safe_set_local_optimizer_state(parameter, _partition(value, parameter), moment)
            elif _is_sharded(parameter):
                safe_set_full_optimizer_state(parameter, value, moment)
            else:
                adam.state[parameter][moment] = value.clone()


def _optimizer_tensors(engine: Any) -> list[Tensor]:
    """Return the tensors that Adam keeps its state under: ZeRO-3's flat partitions, otherwise what stands in its groups."""
    if hasattr(engine.optimizer, "fp32_partitioned_groups_flat"):
        return list(engine.optimizer.fp32_partitioned_groups_flat)
    return [tensor for group in engine.optimizer.param_groups for tensor in group["params"]]


def _link_moments(engine: Any) -> None:
    """Tell ZeRO-1 and 2 where Adam's moments are: they link them once, at a first step whose states may not exist yet."""
    link = getattr(engine.optimizer, "_lazy_init_hp_params_optimizer_state", None)
    if link is not None:
        engine.optimizer._hp_optimizer_states_linked = False
        link()


def _is_sharded(parameter: nn.Parameter) -> bool:
    return hasattr(parameter, "ds_id") or hasattr(parameter, "_hp_mapping")


def _partition(value: Tensor, parameter: Any) -> Tensor:
    """Return this rank's slice of `value`, padded with zeros as ZeRO-3 pads it."""
    size = parameter.partition_numel()
    start = size * torch.distributed.get_rank(parameter.ds_process_group)
    padded = nn.functional.pad(value.flatten(), (0, size * torch.distributed.get_world_size(parameter.ds_process_group) - value.numel()))
    return padded.narrow(0, start, size)
