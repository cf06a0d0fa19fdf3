"""Run several recipes one after another in one world: starting processes costs more than training these models."""

import sys

from lst_scale import distributed
from lst_scale.recipe import load_recipe
from lst_scale.run import run

resume = "--resume" in sys.argv
for path in sys.argv[1:]:
    if not path.startswith("--"):
        run(load_recipe(path), resume=resume, overwrite=not resume)
distributed.disconnect()
