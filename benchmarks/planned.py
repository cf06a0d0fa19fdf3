"""The planner against measurement: a real step of each recipe under torch's allocator events, and what `lst-scale plan --cpu` says of it.

    python benchmarks/planned.py
    python benchmarks/planned.py --recipes t5-3b t5-3b-8bit --batches 1 2

    python benchmarks/planned.py --recipes smollm2-135m --ranks 3 --set backbone.placement=tensor_parallel

Each measurement has processes of its own. Weights are not read from anywhere: a step takes the same room whatever they are; but a backbone
that is divided or streamed is loaded from its checkpoint. The step is training's own: taps, loss, DeepSpeed's backward pass and optimizer
step; the second one is measured, when Adam's moments are there. On a GPU the figure is torch.cuda.max_memory_allocated. Of several ranks
the first is measured. Blocks streamed from host memory are tensors on a CPU as well, so there `source: disk` is what can be measured.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from typing import Any

import torch

RECIPES = (
    "quickstart",
    *("t5-base", "t5-base-full", "t5-base-adapters", "t5-base-lora", "t5-base-bitfit", "t5-base-prompt", "t5-base-lst"),
    *("t5-base-lst-all-layers", "t5-base-lst-adapter-block", "t5-base-lst-cross-attention", "t5-large", "t5-large-lst"),
)


def measure(name: str, rows: int, overrides: list[str]) -> dict[str, Any]:
    """Run two steps of a recipe and return the second one's peak, and the planned one."""
    from transformers.initialization import no_init_weights

    from lst_scale.backbone.placement.load import load_placed
    from lst_scale.backbone.weights.precision import held_tensors
    from lst_scale.plan import fake
    from lst_scale.plan.footprint import footprint
    from lst_scale.plan.measure import peak_bytes
    from lst_scale.plan.report import setting_of
    from lst_scale.recipe.backbone import Replicated
    from lst_scale.recipe.schema import load_recipe
    from lst_scale.side.count import shape_of
    from lst_scale.system import distributed
    from lst_scale.system.assets import load_ds_config
    from lst_scale.training.engine import build_engine

    world = distributed.connect()
    recipe = load_recipe(name, [*overrides, f"training.global_batch_size={rows * world.size}", "training.micro_batch_size=null"])
    shape = shape_of(recipe.backbone.checkpoint)
    assert shape is not None
    on_gpu = torch.cuda.is_available()
    setting = setting_of(recipe, world_size=world.size, on_gpu=on_gpu, target=None)
    planned = footprint(recipe, shape, setting)
    device = torch.device("cuda" if on_gpu else "cpu")
    held_whole = isinstance(recipe.backbone.placement, Replicated)
    with no_init_weights(), device:
        backbone = fake.backbone(shape, recipe) if held_whole else load_placed(recipe.backbone, world)
        batch = fake.batch(setting.rows, setting.source, setting.target)
    with contextlib.nullcontext() if recipe.method.name == "lst" else device:  # a side network is drawn on the CPU, and moved
        trainee = fake.trainee(recipe, backbone)
    trainee.module.to(device)
    batch.attention_mask_BS[0, -1] = 0  # a batch without any padding needs no mask, and on a GPU makes none: plans are for the others
    frozen: Any = getattr(trainee, "backbone", trainee)
    for tensor in (*held_tensors(trainee.module), *(held_tensors(frozen._model) if held_whole else ())):
        if tensor.is_floating_point():
            tensor.data.fill_(0.01)  # any finite value: DeepSpeed skips the optimizer step when a gradient is not
    ds_config = load_ds_config(recipe.training.deepspeed)
    engine = build_engine(trainee.module, recipe.optimizer, ds_config, micro_batch_size=rows, accumulation=1)

    def step() -> None:
        prepared = trainee.prepare(batch)
        engine.backward(trainee.nll(engine, batch, prepared))
        engine.step()

    step()
    if on_gpu:
        torch.cuda.reset_peak_memory_stats()
        step()
        measured = torch.cuda.max_memory_allocated()
    else:
        with let_go_at_once():
            measured = peak_bytes(step)
    distributed.disconnect()
    return {"recipe": name, "rows": rows, "measured": measured, "planned": planned.peak, "where": planned.where}


@contextlib.contextmanager
def let_go_at_once() -> Iterator[None]:
    """Let a sum over ranks return when gloo's own thread has let go of the tensor: what that thread frees, torch's events do not show."""
    summed = torch.distributed.all_reduce

    def all_reduce(tensor: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        before = tensor._use_count()  # type: ignore[attr-defined]
        work = summed(tensor, *args, **kwargs)
        while work is None and tensor._use_count() > before:  # type: ignore[attr-defined]
            time.sleep(1e-4)
        return work

    torch.distributed.all_reduce = all_reduce
    try:
        yield
    finally:
        torch.distributed.all_reduce = summed


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipes", nargs="+", default=RECIPES)
    parser.add_argument("--batches", nargs="+", type=int, default=(2, 8))
    parser.add_argument("--ranks", type=int, default=1)
    parser.add_argument("--set", nargs="+", default=[], metavar="key=value", help="overrides for all")
    parser.add_argument("--one", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        found = measure(options.one[0], int(options.one[1]), options.set)
        if os.environ["RANK"] == "0":
            print(json.dumps(found))
        return
    print("| recipe | rows | measured, MB | planned, MB | error | peak in |\n| --- | --- | --- | --- | --- | --- |", flush=True)
    for name in options.recipes:
        for rows in options.batches:
            launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(options.ranks)]
            command = [*launcher, sys.argv[0], "--one", name, str(rows), *(["--set", *options.set] if options.set else [])]
            done = subprocess.run(command, capture_output=True, text=True, check=False)
            lines = [line for line in done.stdout.splitlines() if line.startswith("{")]
            if done.returncode or not lines:
                failure = [line for line in done.stderr.splitlines() if "Error" in line] or ["failed"]
                print(f"| {name} | {rows} | {failure[-1][:120]} | | | |", flush=True)
                continue
            found = json.loads(lines[-1])
            error = found["planned"] / found["measured"] - 1
            print(
                f"| {name} | {rows} | {found['measured'] / 1e6:,.0f} | {found['planned'] / 1e6:,.0f} | {error:+.1%} | {found['where']} |",
                flush=True,
            )


if __name__ == "__main__":
    main()
