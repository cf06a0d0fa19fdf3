"""Time and memory of one training step: a ladder against LoRA and full fine-tuning, side by side, each in a process of its own.

    python benchmarks/make_checkpoint.py google-t5/t5-3b /tmp/t5-3b
    python benchmarks/steps.py /tmp/t5-3b --batch 100 --source 128 --target 8 --layers 23 \
        --cases forward:bf16 lst:bf16 forward:int8 lst:int8 forward:nf4 lst:nf4 lora:bf16 lora-checkpointed:bf16 qlora-checkpointed:nf4

A case is METHOD:PRECISION. Of the ladder: -plain does not run side blocks again; -bf16-taps and -int8-taps hold taps in fewer bits;
-cached reads taps from a tap cache on disk, -cold with its files out of the page cache before every step; -8-members, or -32-members,
trains as many side networks on one pass; -cross-attention and -adapter are the paper's other designs; -streamed keeps the backbone's
blocks in host memory, and transfer only copies them to the device, the floor of its time. qlora is LoRA as people write it, with
transformers and peft on their own quantized backbone (Dettmers et al. 2023). Columns: seconds a step (median; on the CPU of processor
time, all threads), the same over the first case's; bytes that the forward pass leaves alive for the backward pass, weights not counted,
the same over plain LoRA's; on a GPU the peak of allocated memory, weights included. Weights may be random: time and memory do not ask what
they are. Without a GPU, quote ratios only.
"""

from __future__ import annotations

import argparse
import atexit
import gc
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

VARIANTS: dict[str, dict[str, Any]] = {
    "lst": {},
    "lst-plain": {"recompute": False},
    "lst-bf16-taps": {"tap_storage": "bf16"},
    "lst-int8-taps": {"tap_storage": "int8"},
    "lst-cross-attention": {"design": "cross_attention"},
    "lst-adapter": {"design": "adapter", "reduction_factor": 16},
    "lst-8-members": {},
    "lst-32-members": {},
    "lst-cached-8-members": {},
    "lst-cached-32-members": {},
    "lst-cached": {},
    "lst-cached-plain": {"recompute": False},
    "lst-cached-plain-cold": {"recompute": False},
    "lst-plain-8-members": {"recompute": False},
    "lst-cached-cold": {},
    "lst-streamed": {},
    "forward": {},
    "transfer": {},
}
LADDERS = tuple(VARIANTS)
RIVALS = ("full", "adapters", "lora", "bitfit", "prompt")
RUN_BY_PEFT = ("qlora", "qlora-checkpointed")
METHODS = (*LADDERS, *RIVALS, *(f"{rival}-checkpointed" for rival in RIVALS), *RUN_BY_PEFT)
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
        first: Tensor = conveyor.slots[0][:1].float()
        return first

    return step


def ladder_loss(options: argparse.Namespace, method: str, precision: str, device: torch.device, batch: dict[str, Tensor]) -> Any:
    """Return (loss function, trainable parameters, the model's own tensors) of the ladder, or of its backbone's forward pass alone."""
    from lst_scale.backbone.taps import Inputs
    from lst_scale.backbone.weights.precision import held_tensors
    from lst_scale.methods.lst import build_side_network
    from lst_scale.recipe.method import LstRecipe
    from lst_scale.side.loss import cross_entropy_sum, shift_right

    layers = "all" if options.layers == "all" else tuple(int(layer) for layer in options.layers.split(","))
    tree = {"reduction_factor": options.reduction_factor, "precision": "fp32" if precision == "fp32" else "bf16"} | VARIANTS[method]
    recipe = LstRecipe(name="lst", side_layers=layers, initialization="random", **tree)
    backbone, before = open_backbone(options, method, precision, recipe)
    if method == "transfer":
        return copy_all(backbone.conveyor), [], backbone.conveyor.slots
    members = int(method.split("-")[-2]) if method.endswith("-members") else 1
    sides = [build_side_network(recipe, backbone, seed=seed).to(device).train() for seed in range(members)]
    request = sides[0].request
    target_BT = shift_right(batch["labels"], backbone.spec)
    inputs = Inputs(source_BS=batch["input_ids"], source_mask_BS=batch["attention_mask"], target_BT=target_BT)

    def loss() -> Tensor:
        before()
        taps = backbone(inputs, request)
        if method == "forward":
            mean: Tensor = taps.target.tensors[-1].float().mean()
            return mean
        for side in sides:
            nll, count = cross_entropy_sum(backbone.head, side(taps), batch["labels"])
            if side is not sides[-1]:
                torch.autograd.backward(nll / count)  # one after the other, as members do; the caller runs the last one's
        return nll / count

    if method.startswith("lst-cached"):
        loss()  # writes the taps down
        backbone.cache.flush()
        backbone.unload()
        held = [backbone.head.weight_VD, backbone._embedding_VD]
    else:
        held = [*held_tensors(backbone._model), *(backbone.conveyor.slots if backbone.conveyor is not None else [])]
    return loss, [parameter for side in sides for parameter in side.parameters()] if method != "forward" else [], held


def open_backbone(options: argparse.Namespace, method: str, precision: str, recipe: Any) -> tuple[Any, Callable[[], None]]:
    """Return the backbone as a case holds it, and what to do before each step."""
    from lst_scale.backbone.cache.load import load_caching
    from lst_scale.backbone.placement.load import load_placed
    from lst_scale.methods.lst import ladder_config
    from lst_scale.recipe.backbone import BackboneRecipe
    from lst_scale.recipe.schema import CacheRecipe
    from lst_scale.side.network import SideNetwork
    from lst_scale.system import distributed

    placement = "streamed" if method in ("lst-streamed", "transfer") else "replicated"
    wanted = BackboneRecipe.model_validate({"checkpoint": str(options.checkpoint), "precision": precision, "placement": placement})
    if not method.startswith("lst-cached"):
        return load_placed(wanted, distributed.connect()), lambda: None
    folder = Path(tempfile.mkdtemp(prefix="taps-", dir=options.folder))
    atexit.register(shutil.rmtree, folder)
    cache = CacheRecipe(enabled=True, dtype="fp32" if precision == "fp32" else "bf16", folder=str(folder))
    backbone = load_caching(
        wanted, cache, distributed.connect(), lambda spec: SideNetwork.request_of(ladder_config(recipe, spec)), no_check
    )
    return backbone, (lambda: forget_pages(folder)) if method.endswith("cold") else lambda: None


def no_check(_backbone: Any) -> None:
    """Quantization is not what is measured here."""


def forget_pages(folder: Path) -> None:
    """Drop the taps' pages from the page cache, so that the next read is from the disk."""
    for file in folder.rglob("*.taps"):
        descriptor = os.open(file, os.O_RDONLY)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(descriptor)


def whole_model_loss(options: argparse.Namespace, method: str, precision: str, device: torch.device, batch: dict[str, Tensor]) -> Any:
    """The same for methods that train inside the backbone."""
    from lst_scale.backbone.placement.load import load_placed
    from lst_scale.data.batches import Batch
    from lst_scale.methods import build_trainee
    from lst_scale.recipe.schema import Recipe
    from lst_scale.system import distributed

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


def qlora_loss(options: argparse.Namespace, method: str, precision: str, device: torch.device, batch: dict[str, Tensor]) -> Any:
    """The same for LoRA on a backbone that transformers has quantized: r 32 on q and v, computed in bf16, with peft's own preparation."""
    from peft import LoraConfig, get_peft_model, prepare_model_for_kbit_training
    from transformers import AutoModelForSeq2SeqLM, BitsAndBytesConfig

    quantized: dict[str, dict[str, Any]] = {
        "nf4": {
            "load_in_4bit": True,
            "bnb_4bit_quant_type": "nf4",
            "bnb_4bit_use_double_quant": True,
            "bnb_4bit_compute_dtype": torch.bfloat16,
        },
        "int8": {"load_in_8bit": True},
    }
    model = AutoModelForSeq2SeqLM.from_pretrained(
        options.checkpoint, quantization_config=BitsAndBytesConfig(**quantized[precision]), dtype=torch.bfloat16, device_map={"": device}
    )
    checkpointed = {
        "use_gradient_checkpointing": method.endswith("-checkpointed"),
        "gradient_checkpointing_kwargs": {"use_reentrant": False},
    }
    model = prepare_model_for_kbit_training(model, **checkpointed)
    model = get_peft_model(model, LoraConfig(task_type="SEQ_2_SEQ_LM", r=32, lora_alpha=32, target_modules=["q", "v"])).train()
    model.config.use_cache = False

    def loss() -> Tensor:
        with torch.autocast(device.type, torch.bfloat16):
            value: Tensor = model(**batch).loss
        return value

    return loss, [p for p in model.parameters() if p.requires_grad], list(model.parameters())


def kept_bytes(loss: Step, weights: list[Tensor]) -> int:
    """Return how many bytes one forward pass leaves alive for its backward pass, each storage once, weights not counted."""
    from lst_scale.plan.live import LiveBytes

    live = LiveBytes()
    with live:
        for weight in weights:
            live.see(weight)
        live.forget()
        result = loss()
        kept = live.now
    del result
    return kept


def measure(options: argparse.Namespace, case: str) -> dict[str, Any]:
    """Run one case in this process."""
    method, precision = case.split(":")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.manual_seed(0)
    batch = make_batch(options, device)
    build = ladder_loss if method in LADDERS else qlora_loss if method in RUN_BY_PEFT else whole_model_loss
    loss, trained, weights = build(options, method, precision, device, batch)
    optimizer = torch.optim.AdamW(trained, lr=1e-4, fused=True) if trained else None
    seconds = []
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    for _ in range(options.warmup + options.repeat):
        _synchronize(device)
        start = clock(device)
        value = loss()
        if optimizer is not None:
            value.backward()
            optimizer.step()
            optimizer.zero_grad()
        _synchronize(device)
        seconds.append(clock(device) - start)
    peak, reserved = (torch.cuda.max_memory_allocated(), torch.cuda.max_memory_reserved()) if device.type == "cuda" else (None, None)
    held = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in weights}
    return {
        "case": case,
        "seconds": statistics.median(seconds[options.warmup :]),
        "peak_allocated_bytes": peak,
        "peak_reserved_bytes": reserved,
        "kept_bytes": kept_bytes(loss, [*weights, *trained, *batch.values()]) if trained else 0,
        "weight_bytes": sum(held.values()),
        "trainable": sum(p.numel() for p in trained),
        "device": torch.cuda.get_device_name() if device.type == "cuda" else "cpu",
    }


def clock(device: torch.device) -> float:
    """Return seconds: of the wall on a GPU, of the processor on the CPU, where others' work would count otherwise."""
    return time.perf_counter() if device.type == "cuda" else time.process_time()


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def table(records: list[dict[str, Any]]) -> str:
    """Return the records as a Markdown table."""
    measured = [r for r in records if "error" not in r]
    first = measured[0]["seconds"] if measured else 1.0
    lora = next((r["kept_bytes"] for r in measured if r["case"].startswith("lora:")), None)
    lines = ["| case | s a step | over the first | kept for backward, MB | over lora | peak allocated, GB | weights, GB | trainable |"]
    lines.append("| --- " * 8 + "|")
    for r in records:
        if "error" in r:
            lines.append(f"| {r['case']} | {r['error']} | | | | | | |")
            continue
        peak = f"{r['peak_allocated_bytes'] / 1e9:.2f}" if r["peak_allocated_bytes"] else "-"
        over_lora = f"{r['kept_bytes'] / lora:.2f}" if lora else "-"
        lines.append(
            f"| {r['case']} | {r['seconds']:.3f} | {r['seconds'] / first:.2f} | {r['kept_bytes'] / 1e6:,.0f} | {over_lora} | {peak} "
            f"| {r['weight_bytes'] / 1e9:.2f} | {r['trainable']:,} |"
        )
    return "\n".join(lines)


def measure_apart(case: str) -> dict[str, Any]:
    """Run one case in a process of its own."""
    done = subprocess.run([sys.executable, *sys.argv, "--one", case], capture_output=True, text=True, check=False)
    lines = [line for line in done.stdout.splitlines() if line.startswith("{")]
    failure = done.stderr.strip().splitlines()[-1:] or ["failed"]
    return json.loads(lines[-1]) if done.returncode == 0 and lines else {"case": case, "error": failure[0][:100]}


def measure_here(options: argparse.Namespace, case: str) -> dict[str, Any]:
    """Run one case in this process, and leave nothing of it on the device."""
    try:
        return measure(options, case)
    except Exception as error:
        return {"case": case, "error": f"{type(error).__name__}: {str(error).splitlines()[0]}"[:160]}
    finally:
        gc.collect()
        torch.cuda.empty_cache()


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
    parser.add_argument("--folder", type=Path, help="on the disk that tap caches are to be read from (default: the temporary folder)")
    parser.add_argument("--json", type=Path, help="also write the records here")
    parser.add_argument("--together", action="store_true", help="all cases in this process, one after another: no imports between them")
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
        records.append(measure_here(options, case) if options.together else measure_apart(case))
        print(json.dumps(records[-1]), file=sys.stderr, flush=True)
    sizes = f"batch {options.batch}, source {options.source}, target {options.target}"
    print(f"{records[0].get('device', '')}, torch {torch.__version__}, {sizes}")
    print(table(records))
    if options.json:
        options.json.write_text(json.dumps(records, indent=2) + "\n")


if __name__ == "__main__":
    main()
