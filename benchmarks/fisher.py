"""Memory of a Fisher pass, against one float32 copy of the backbone plus one block's gradients.

    python benchmarks/make_checkpoint.py google-t5/t5-large /tmp/t5-large
    python benchmarks/fisher.py /tmp/t5-large

The peak is of the resident set (VmHWM, reset after the imports), less what was resident before the pass. `--examples` are random tokens;
32 at a time are walked through, so more of them take time and no memory.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import torch

from lst_scale.backbone import assemble
from lst_scale.backbone.checkpoint import open_checkpoint
from lst_scale.backbone.fisher import Example, fisher_importance


def status_bytes(name: str) -> int:
    """Return a figure of /proc/self/status."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(name))
    return int(line.split()[1]) * 1024


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint")
    parser.add_argument("--examples", type=int, default=4)
    parser.add_argument("--source", type=int, default=128, help="tokens")
    parser.add_argument("--target", type=int, default=8, help="tokens")
    options = parser.parse_args()
    draw = torch.Generator().manual_seed(0)
    examples = [
        Example(
            input_ids_S=torch.randint(3, 4000, (options.source,), generator=draw),
            labels_T=torch.randint(3, 4000, (options.target,), generator=draw),
        )
        for _ in range(options.examples)
    ]
    checkpoint = open_checkpoint(options.checkpoint, None)
    model = assemble.empty_model(checkpoint)
    copy = 4 * assemble.count_parameters(model, checkpoint)
    block = 4 * max(sum(p.numel() for p in place.get(model).parameters()) for place in assemble.places(model))
    del model
    Path("/proc/self/clear_refs").write_text("5")  # start VmHWM anew
    before, start = status_bytes("VmRSS"), time.perf_counter()
    sums = fisher_importance(checkpoint, examples)
    seconds, peak = time.perf_counter() - start, status_bytes("VmHWM") - before
    held = sum(tensor.nbytes for tensor in sums.values())
    print(
        f"one float32 copy {copy / 1e6:,.0f} MB, one block's gradients {block / 1e6:,.0f} MB; peak of the pass {peak / 1e6:,.0f} MB "
        f"(the sums themselves: {held / 1e6:,.0f} MB): {peak / (copy + block):.2f} of the two together; {seconds:.0f} s for "
        f"{len(examples)} examples of {options.source} source and {options.target} target tokens"
    )


if __name__ == "__main__":
    main()
