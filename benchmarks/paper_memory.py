"""The paper's memory column as planned: each row of its tables at batch 100 and 128 source tokens, float32 and bf16.

    python benchmarks/paper_memory.py [--recipes t5-base-lst]

The paper's "GB" are MiB / 1000 of torch.cuda.max_memory_allocated. Planned are tensors alone, with attention kernels that store no dropout
masks, which the paper's transformers 4.6 did not have: its figures for methods that run backward through the backbone hold score maps too.
"""

from __future__ import annotations

import argparse
from dataclasses import replace

from lst_scale.plan.footprint import footprint
from lst_scale.plan.report import setting_of
from lst_scale.recipe.schema import load_recipe
from lst_scale.side.count import shape_of

# Sung et al. 2022, tables 1 and 2 and the supplement: training memory, in the paper's "GB".
PUBLISHED = {
    "t5-base-full": 17.6,
    "t5-base-adapters": 13.0,
    "t5-base-lora": 12.6,
    "t5-base-bitfit": 10.7,
    "t5-base-prompt": 22.2,
    "t5-base-lst": 5.5,
    "t5-base-lst-all-layers": 7.0,
    "t5-large-lst": 12.2,
    "t5-3b-lst": 22.4,
}
UNIT = 2**20 * 1000


def planned(name: str, precision: str, *, on_gpu: bool) -> float:
    """Return a recipe's peak in the paper's unit."""
    frozen = "fp32" if name == "t5-base-full" else precision  # full fine-tuning trains float32 weights and computes in bf16
    recipe = load_recipe(name, [f"backbone.precision={frozen}", f"method.precision={precision}", "training.deepspeed=zero0"])
    shape = shape_of(recipe.backbone.checkpoint)
    assert shape is not None
    setting = setting_of(recipe, world_size=1, on_gpu=on_gpu, target=None)
    return footprint(recipe, shape, replace(setting, rows=100, source=128)).peak / UNIT


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipes", nargs="+", default=list(PUBLISHED), choices=list(PUBLISHED))
    options = parser.parse_args()
    print("| recipe | published | fp32, masks stored | fp32 | bf16 |\n| --- | --- | --- | --- | --- |")
    for name in options.recipes:
        cells = [planned(name, "fp32", on_gpu=False), planned(name, "fp32", on_gpu=True), planned(name, "bf16", on_gpu=True)]
        print(f"| {name} | {PUBLISHED[name]} | " + " | ".join(f"{cell:.1f}" for cell in cells) + " |", flush=True)


if __name__ == "__main__":
    main()
