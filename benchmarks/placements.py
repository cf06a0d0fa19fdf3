"""What each rank holds under every placement of the backbone, while it loads and while it trains: the main job, two steps of it.

    python benchmarks/make_checkpoint.py google-t5/t5-large /tmp/t5-large
    python benchmarks/placements.py /tmp/t5-large [--cases zero3:2:bf16 disk:1:int8]

On the CPU the peak is that of the resident set, less that of the same job on the embedded backbone (Python, torch and DeepSpeed; 20 MB of
weights): what the backbone costs. Blocks streamed from host memory are resident on the CPU, so there `disk` is the row to read.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from lst_scale.side.count import shape_of

TASK = {
    "name": "kind",
    "kind": "classification",
    "train": "embedded:wordnet/train.jsonl",
    "validation": "embedded:wordnet/validation.jsonl",
    "source": ["word", "definition"],
    "target": "kind",
}
# (placement, ranks, precision)
CASES = [
    ("replicated", 1, "bf16"),
    ("tensor_parallel", 2, "bf16"),
    ("tensor_parallel", 4, "bf16"),
    ("zero3", 2, "bf16"),
    ("disk", 1, "bf16"),
    ("replicated", 1, "int8"),
    ("tensor_parallel", 2, "int8"),
    ("disk", 1, "int8"),
]


def case_of(text: str) -> tuple[str, int, str]:
    placement, ranks, precision = text.split(":")
    return placement, int(ranks), precision


def run(checkpoint: str, placement: str, ranks: int, precision: str, folder: Path) -> dict[str, Any]:
    """Train two steps and return result.json."""
    placed: Any = {"name": "streamed", "source": "disk", "folder": str(folder / "blocks")} if placement == "disk" else placement
    values = {
        "name": f"{placement}-{ranks}-{precision}",
        "task": TASK,
        "backbone.checkpoint": checkpoint,
        "backbone.precision": precision,
        "backbone.placement": placed,
        "method.side_layers": "all",
        "method.initialization": "random",
        "training.max_steps": 2,
        "training.global_batch_size": 4,
        "data.max_eval_rows": 4,
        "evaluation.method": "likelihood",
        "output_dir": str(folder),
    }
    overrides = [f"{key}={json.dumps(value)}" for key, value in values.items()]
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(ranks)]
    command += ["-m", "lst_scale.train", "--recipe", "t5-large", "--overwrite", *overrides]
    done = subprocess.run(command, env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(done.stderr[-3000:])
    result: dict[str, Any] = json.loads((folder / f"{values['name']}-kind-seed0" / "result.json").read_text())
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint")
    parser.add_argument("--cases", nargs="+", type=case_of, default=CASES, metavar="PLACEMENT:RANKS:PRECISION")
    options = parser.parse_args()
    shape = shape_of(options.checkpoint)
    assert shape is not None
    print(
        "| placement | ranks | precision | weights a rank, MB | of all | peak while loading, MB | peak over all, MB |\n"
        + "| --- " * 7
        + "|"
    )
    with tempfile.TemporaryDirectory() as name:
        base = run("embedded:tiny-t5", "replicated", 1, "bf16", Path(name))
        whole: dict[str, float] = {}
        for placement, ranks, precision in options.cases:
            result = run(options.checkpoint, placement, ranks, precision, Path(name))
            held = max(result["backbone_bytes_by_rank"])
            whole.setdefault(precision, held)
            loading = max(result["peak_memory_bytes_after_loading_by_rank"]) - base["peak_memory_bytes_after_loading_by_rank"][0]
            peak = result["peak_memory_bytes"] - base["peak_memory_bytes"]
            print(
                f"| {placement} | {ranks} | {precision} | {held / 1e6:,.0f} | {held / whole[precision]:.2f} | {loading / 1e6:,.0f} "
                f"| {peak / 1e6:,.0f} |",
                flush=True,
            )


if __name__ == "__main__":
    main()
