"""Memory of a pass for Fisher information, against one float32 copy of the weights plus one block's gradients.

    python benchmarks/make_checkpoint.py google-t5/t5-large /tmp/t5-large
    python benchmarks/fisher.py /tmp/t5-large

Two cases, each in a process of its own: the pass alone, and the pass with its sums stored and read back, as training does it. The peak is
that of the resident set (VmHWM) above what the imports left resident. Examples are random tokens: memory does not ask what they are.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lst_scale.backbone.weights import assemble
from lst_scale.backbone.weights.checkpoint import open_checkpoint
from lst_scale.backbone.weights.fisher import Example, fisher_importance, stored_importance

CASES = ("pass", "pass, stored and read")


def allowed_bytes(name: str) -> tuple[int, int]:
    """Return the float32 size of all weights and of the largest block."""
    checkpoint = open_checkpoint(name)
    model = assemble.empty_model(checkpoint)
    blocks = [sum(p.numel() for p in ref.get(model).parameters()) for ref in assemble.block_refs(checkpoint)]
    return 4 * assemble.count_parameters(model, checkpoint), 4 * max(blocks)


def make_examples(options: argparse.Namespace) -> list[Example]:
    draw = torch.Generator().manual_seed(0)

    def tokens(length: int) -> Tensor:
        return torch.randint(3, 4000, (length,), generator=draw)

    return [Example(input_ids_S=tokens(options.source), labels_T=tokens(options.target)) for _ in range(options.examples)]


def resident_bytes(field: str) -> int:
    """Return VmRSS (now) or VmHWM (the most so far) of this process."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field))


def measure(options: argparse.Namespace, case: str) -> dict[str, Any]:
    """Run one case in this process."""
    from transformers.models.t5 import modeling_t5  # noqa: F401  # the pass imports it: it belongs to the imports

    checkpoint, examples = open_checkpoint(options.checkpoint), make_examples(options)
    with contextlib.suppress(OSError):  # where the system refuses, the peak is still the pass's: imports need less
        Path("/proc/self/clear_refs").write_text("5")
    before, start = resident_bytes("VmRSS"), time.perf_counter()
    if case == "pass":
        held = fisher_importance(checkpoint, examples)
        size = sum(tensor.nbytes for tensor in held.values())
    else:
        with tempfile.TemporaryDirectory(dir=options.folder) as folder:
            read = stored_importance(Path(folder), {"benchmark": "fisher"}, lambda: fisher_importance(checkpoint, examples))
            size = sum(read(name).clone().nbytes for name in matrices(checkpoint))  # a copy: the pages are read, not only mapped
    return {"case": case, "seconds": time.perf_counter() - start, "bytes": size, "peak_bytes": resident_bytes("VmHWM") - before}


def matrices(checkpoint: Any) -> list[str]:
    """Return the names that pruning asks for."""
    return [name for name in checkpoint.names() if ".block." in name and "norm" not in name and "relative" not in name]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint")
    parser.add_argument("--examples", type=int, default=4)
    parser.add_argument("--source", type=int, default=64)
    parser.add_argument("--target", type=int, default=8)
    parser.add_argument("--folder", type=Path, help="where the sums are stored for a while (default: the temporary folder)")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        print(json.dumps(measure(options, options.one)))
        return
    weights, block = allowed_bytes(options.checkpoint)
    print(f"one float32 copy {weights / 1e6:,.0f} MB, the largest block's gradients {block / 1e6:,.0f} MB")
    print("| case | sums, MB | peak, MB | peak over the two | s |\n" + "| --- " * 5 + "|")
    for case in CASES:
        done = subprocess.run([sys.executable, *sys.argv, "--one", case], capture_output=True, text=True, check=False)
        if done.returncode:
            raise SystemExit(done.stderr[-3000:])
        r = json.loads(done.stdout.splitlines()[-1])
        ratio = r["peak_bytes"] / (weights + block)
        print(f"| {case} | {r['bytes'] / 1e6:,.0f} | {r['peak_bytes'] / 1e6:,.0f} | {ratio:.2f} | {r['seconds']:.0f} |", flush=True)


if __name__ == "__main__":
    main()
