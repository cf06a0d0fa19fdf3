"""`lst-scale slurm status` from a checkout."""

import sys
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parent.parent)  # not this folder: its file names are common words

from lst_scale.cli.slurm import main

if __name__ == "__main__":
    main("status")
