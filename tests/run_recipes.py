"""Run several recipes one after another in one world: starting processes costs more than training these models."""

import sys

from lst_scale import distributed
from lst_scale.recipe import load_recipe
from lst_scale.run import run

for path in sys.argv[1:]:
    if not path.startswith("--local_rank"):
        run(load_recipe(path), overwrite=True)
distributed.disconnect()
