"""Time and memory of one training step: a ladder against LoRA and full fine-tuning, side by side, each in a process of its own.

    python benchmarks/make_checkpoint.py google-t5/t5-3b /tmp/t5-3b
    python benchmarks/steps.py /tmp/t5-3b --batch 100 --source 128 --target 8 --layers 23 \
        --cases forward:bf16 lst:bf16 forward:int8 lst:int8 forward:nf4 lst:nf4 lora:bf16 lora-checkpointed:bf16

A case is METHOD:PRECISION; lst-plain is LST without recomputed side blocks, lst-cross-attention and lst-adapter (reduction factor 16) are
the other designs, lst-streamed keeps the backbone's blocks in host memory, and transfer only copies them to the device, the floor of its
time. Columns: seconds a step (median), the same over the first case's; bytes that the forward pass saved for the backward pass, weights not
counted (on any device), the same over plain LoRA's; on a GPU the peak of allocated memory, weights included. Weights may be random: time
and memory do not ask what they are. Without a GPU, quote ratios only; where other jobs share the machine, take them with OMP_NUM_THREADS=1
and `--clock processor`: waiting for a core does not count then (nor does waiting for a disk).
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Set
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

DESIGNS: dict[str, dict[str, Any]] = {
    "lst-cross-attention": {"design": "cross_attention"},
    "lst-adapter": {"design": "adapter", "reduction_factor": 16},
}
LADDERS = ("forward", "lst", "lst-plain", *DESIGNS, "lst-streamed", "transfer")
RIVALS = ("full", "adapters", "lora", "bitfit", "prompt")
METHODS = (*LADDERS, *RIVALS, *(f"{rival}-checkpointed" for rival in RIVALS))
CLOCKS = {"wall": time.perf_counter, "processor": time.process_time}
Step = Callable[[], Tensor]


def make_batch(options: argparse.Namespace, device: torch.device) -> dict[str, Tensor]:
    """Return full rows of random tokens: nothing is padded, so every case does the same work."""
    draw = torch.Generator().manual_seed(0)
    source = torch.randint(3, 4000, (options.batch, options.source), generator=draw)
    labels = torch.randint(3, 4000, (options.batch, options.target), generator=draw)
    return {"input_ids": source.to(device), "attention_mask": torch.ones_like(source).to(device), "labels": labels.to(device)}


def copy_all(conveyor: Any) -> Step:
    """Return a function that brings every block to the device once and computes nothing."""

    def step() -> Tensor:
        for index in range(len(conveyor.blocks)):
            conveyor.source.start(index, conveyor.slots[index % 2], None).wait()
        return conveyor.slots[0][:1].float()

    return step


def ladder_loss(options: argparse.Namespace, method: str, precision: str, device: torch.device, batch: dict[str, Tensor]) -> Any:
    """Return (loss function, trainable parameters, the model's own tensors) of the ladder, or of its backbone's forward pass alone."""
    from lst_scale import distributed
    from lst_scale.backbone.place import load_placed
    from lst_scale.backbone.precision import held_tensors
    from lst_scale.methods.lst import build_side_network
    from lst_scale.recipe import BackboneRecipe, LstRecipe
    from lst_scale.side.loss import cross_entropy_sum, shift_right

    placement = "streamed" if method in ("lst-streamed", "transfer") else "replicated"
    wanted = {"checkpoint": str(options.checkpoint), "precision": precision, "placement": placement}
    backbone = load_placed(BackboneRecipe.model_validate(wanted), distributed.connect())
    if method == "transfer":
        assert backbone.conveyor is not None
        return copy_all(backbone.conveyor), [], backbone.conveyor.slots
    layers = "all" if options.layers == "all" else tuple(int(layer) for layer in options.layers.split(","))
    tree = {"reduction_factor": options.reduction_factor, "precision": "fp32" if precision == "fp32" else "bf16"} | DESIGNS.get(method, {})
    recipe = LstRecipe(name="lst", side_layers=layers, initialization="random", recompute=method != "lst-plain", **tree)
    side = build_side_network(recipe, backbone, seed=0).to(device).train()
    decoder_ids = shift_right(batch["labels"], backbone.spec)

    def loss() -> Tensor:
        taps = backbone(batch["input_ids"], batch["attention_mask"], decoder_ids, side.request)
        if method == "forward":
            return taps.decoder.hidden[-1].float().mean()
        nll, count = cross_entropy_sum(backbone.head, side(taps), batch["labels"])
        return nll / count

    slots = backbone.conveyor.slots if backbone.conveyor is not None else []
    return loss, list(side.parameters()) if method != "forward" else [], [*held_tensors(backbone._model), *slots]


def whole_model_loss(options: argparse.Namespace, method: str, precision: str, device: torch.device, batch: dict[str, Tensor]) -> Any:
    """The same for methods that train inside the backbone."""
    from lst_scale import distributed
    from lst_scale.backbone.place import load_placed
    from lst_scale.data.batches import Batch
    from lst_scale.methods import build_trainee
    from lst_scale.recipe import Recipe

    name, _, checkpointed = method.partition("-")
    tree = {
        "name": "steps",
        "task": {"kind": "text", "train": "-", "validation": "-", "source": ("a",), "target": "b"},
        "backbone": {"checkpoint": str(options.checkpoint), "precision": precision},
        "method": {"name": name, "gradient_checkpointing": bool(checkpointed), "precision": precision},
    }
    recipe = Recipe.model_validate(tree)
    trainee = build_trainee(recipe, load_placed(recipe.backbone, distributed.connect()), zero_stage=0)
    model = trainee.module.to(device).train()
    rows = Batch(input_ids_BS=batch["input_ids"], attention_mask_BS=batch["attention_mask"], labels_BT=batch["labels"], indices=())
    tokens = batch["labels"].numel()
    trained = [p for p in model.parameters() if p.requires_grad]
    return lambda: trainee.nll(model, rows, None) / tokens, trained, list(model.parameters())


def saved_bytes(loss: Step, known: Set[int]) -> int:
    """Return how many bytes one forward pass keeps for its backward pass, each storage once; `known` are the weights' addresses."""
    storages: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in known:
            storages[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        result = loss()
    del result
    return sum(storages.values())


def measure(options: argparse.Namespace, case: str) -> dict[str, Any]:
    """Run one case in this process."""
    method, precision = case.split(":")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.manual_seed(0)
    batch = make_batch(options, device)
    if method in LADDERS:
        loss, trained, weights = ladder_loss(options, method, precision, device, batch)
    else:
        loss, trained, weights = whole_model_loss(options, method, precision, device, batch)
    optimizer = torch.optim.AdamW(trained, lr=1e-4) if trained else None
    seconds = []
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    now = CLOCKS[options.clock]
    for _ in range(options.warmup + options.repeat):
        _synchronize(device)
        start = now()
        value = loss()
        if optimizer is not None:
            value.backward()
            optimizer.step()
            optimizer.zero_grad()
        _synchronize(device)
        seconds.append(now() - start)
    peak = torch.cuda.max_memory_allocated() if device.type == "cuda" else None
    held = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in weights}
    known = held.keys() | {p.untyped_storage().data_ptr() for p in trained}
    return {
        "case": case,
        "seconds": statistics.median(seconds[options.warmup :]),
        "peak_allocated_bytes": peak,
        "saved_bytes": saved_bytes(loss, known) if trained else 0,
        "weight_bytes": sum(held.values()),
        "trainable": sum(p.numel() for p in trained),
        "device": torch.cuda.get_device_name() if device.type == "cuda" else "cpu",
    }


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def table(records: list[dict[str, Any]]) -> str:
    """Return the records as a Markdown table."""
    measured = [r for r in records if "error" not in r]
    first = measured[0]["seconds"] if measured else 1.0
    lora = next((r["saved_bytes"] for r in measured if r["case"].startswith("lora:")), None)
    lines = ["| case | s a step | over the first | saved for backward, MB | over lora | peak allocated, GB | weights, GB | trainable |"]
    lines.append("| --- " * 8 + "|")
    for r in records:
        if "error" in r:
            lines.append(f"| {r['case']} | {r['error']} | | | | | | |")
            continue
        peak = f"{r['peak_allocated_bytes'] / 1e9:.2f}" if r["peak_allocated_bytes"] else "-"
        over_lora = f"{r['saved_bytes'] / lora:.2f}" if lora else "-"
        lines.append(
            f"| {r['case']} | {r['seconds']:.3f} | {r['seconds'] / first:.2f} | {r['saved_bytes'] / 1e6:,.0f} | {over_lora} | {peak} "
            f"| {r['weight_bytes'] / 1e9:.2f} | {r['trainable']:,} |"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--cases", nargs="+", default=["forward:bf16", "lst:bf16", "lora:bf16", "lora-checkpointed:bf16"])
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--source", type=int, default=128)
    parser.add_argument("--target", type=int, default=8)
    parser.add_argument("--layers", default="all", help="side layers, such as 1,3,5 (default: all)")
    parser.add_argument("--reduction-factor", type=int, default=8)
    parser.add_argument("--warmup", type=int, default=2)
    parser.add_argument("--repeat", type=int, default=5)
    parser.add_argument("--clock", choices=CLOCKS, default="wall")
    parser.add_argument("--json", type=Path, help="also write the records here")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    options = parser.parse_args()
    wrong = [case for case in options.cases if case.partition(":")[0] not in METHODS]
    if wrong:
        parser.error(f"{wrong[0]}: write METHOD:PRECISION with METHOD one of {', '.join(METHODS)}")
    if options.one:
        print(json.dumps(measure(options, options.one)))
        return
    records = []
    for case in options.cases:
        done = subprocess.run([sys.executable, *sys.argv, "--one", case], capture_output=True, text=True, check=False)
        lines = [line for line in done.stdout.splitlines() if line.startswith("{")]
        failure = done.stderr.strip().splitlines()[-1:] or ["failed"]
        records.append(json.loads(lines[-1]) if done.returncode == 0 and lines else {"case": case, "error": failure[0][:100]})
        print(json.dumps(records[-1]), file=sys.stderr, flush=True)
    sizes = f"batch {options.batch}, source {options.source}, target {options.target}"
    print(f"{records[0].get('device', '')}, torch {torch.__version__}, {sizes}")
    print(table(records))
    if options.json:
        options.json.write_text(json.dumps(records, indent=2) + "\n")


if __name__ == "__main__":
    main()
