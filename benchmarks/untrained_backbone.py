"""Save the embedded backbone with random weights, to see what its pretraining is worth.

python benchmarks/untrained_backbone.py /tmp/untrained
DS_ACCELERATOR=cpu deepspeed --num_accelerators 2 lst_scale/train.py --recipe quickstart name=untrained backbone.checkpoint=/tmp/untrained
"""

from __future__ import annotations

import argparse
import shutil
from pathlib import Path

import torch
from transformers import T5Config, T5ForConditionalGeneration

from lst_scale.system.assets import resolve


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    folder = parser.parse_args().folder
    trained = Path(resolve("embedded:tiny-t5"))
    torch.manual_seed(0)
    T5ForConditionalGeneration(T5Config.from_pretrained(trained)).save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(trained / name, folder)


if __name__ == "__main__":
    main()
