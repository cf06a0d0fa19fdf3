"""The command `deepspeed lst_scale/train.py --recipe t5-3b [key=value ...]`; also `python -m lst_scale.train` and `torchrun`.

`--local_rank=N`, which the deepspeed launcher inserts, is accepted and unused: ranks come from the environment.
"""

from __future__ import annotations

import sys
from pathlib import Path

# Run as a file, Python puts this folder first on sys.path, where our module names could hide others'. Put its parent there instead.
if sys.path and Path(sys.path[0]).resolve() == Path(__file__).resolve().parent:
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

from lst_scale.system import preemption

if __name__ == "__main__":
    preemption.leave_on_ctrl_c()

import argparse
import contextlib
import gc
import os
from collections.abc import Callable, Iterator, Sequence

from lst_scale import __version__
from lst_scale.errors import ArgumentError, LstScaleError, print_error
from lst_scale.recipe.members import expand_members
from lst_scale.recipe.schema import Recipe, load_recipe
from lst_scale.system.assets import available_recipes
from lst_scale.training.preflight import check_before_start


def parse_arguments(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="lst_scale/train.py", description="Train, score and save a side network.", allow_abbrev=False)
    parser.add_argument("--recipe", help="a shipped recipe's name or a YAML file; it may also stand alone, before the key=values")
    parser.add_argument("--version", action="version", version=__version__)
    parser.add_argument("--resume", action="store_true", help="continue from the newest whole checkpoint, or start")
    parser.add_argument("--overwrite", action="store_true", help="throw away what the run's folder holds")
    parser.add_argument("--print-recipe", action="store_true", help="print the resolved recipe and the trainable count, and stop")
    parser.add_argument("--local_rank", type=int, help=argparse.SUPPRESS)
    parser.add_argument("overrides", nargs="*", metavar="[recipe] key=value", help="for instance task=mrpc method.reduction_factor=4")
    return parser.parse_intermixed_args(arguments)  # options may stand between overrides


def main(arguments: list[str] | None = None) -> int:
    """Run one recipe and return the exit status: 0; 1: a mistake, which the one printed line explains; 2: wrong usage; 130: Ctrl-C."""
    options = parse_arguments(sys.argv[1:] if arguments is None else arguments)
    try:
        start(options.recipe, options.overrides, resume=options.resume, overwrite=options.overwrite, print_recipe=options.print_recipe)
    except LstScaleError as error:
        print_error(error)
        return preemption.exit_status(error)
    return 0


def start(recipe: str | None, words: Sequence[str], *, resume: bool, overwrite: bool, print_recipe: bool) -> None:
    """Do what the command line asks: `words` are overrides, after the recipe where it has no option of its own.

    Raises:
        LstScaleError: anything the user can fix, in one line.
    """
    loaded = load_recipe(*_recipe_and_overrides(recipe, words))
    if print_recipe:
        print(describe(loaded))
        return
    run_recipes(expand_members(loaded), resume=resume, overwrite=overwrite)


def _recipe_and_overrides(recipe: str | None, words: Sequence[str]) -> tuple[str, list[str]]:
    if recipe is not None:
        return recipe, list(words)
    alone = [word for word in words if "=" not in word or Path(word).is_file()]
    if not alone:
        raise ArgumentError(f"no recipe is named: write a YAML file's name, or one of {', '.join(available_recipes())}")
    return alone[0], [word for word in words if word is not alone[0]]


@contextlib.contextmanager
def _importing() -> Iterator[None]:
    """Import torch and all above it without the garbage collector: modules stay, and to look through them takes a sixth of the time."""
    if "torch" in sys.modules:  # a process of somebody else's
        yield
        return
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()  # nor are they looked through later
        gc.enable()


def run_recipes(recipes: Sequence[Recipe], *, resume: bool, overwrite: bool = False, requeue: Callable[[], None] | None = None) -> None:
    """Run one recipe, or several on one backbone pass, in this process, and leave in time when a signal asks for it.

    Args:
        requeue: puts the job back into its queue; None: `scontrol requeue` inside a Slurm job, nothing elsewhere.

    Raises:
        LstScaleError: anything the user can fix, in one line.
    """
    check_before_start(recipes, resume=resume, overwrite=overwrite)
    preemption.listen()
    with _importing():
        from lst_scale.system import distributed
        from lst_scale.training.run import run_together

    rank = os.environ.get("RANK", "0")
    if "RANK" not in os.environ:  # alone, and nothing is begun
        preemption.leave_if(preemption.requested())
    try:
        run_together(recipes, resume=resume, overwrite=overwrite)
        distributed.disconnect()
    except preemption.Interrupted as interrupted:
        distributed.disconnect()
        inside_slurm = "SLURM_JOB_ID" in os.environ
        requeue = requeue or (preemption.requeue_by_scontrol if inside_slurm else None)
        preemption.leave(interrupted, is_main=rank == "0", requeue=requeue)
        raise
    except LstScaleError as error:
        distributed.disconnect(together=error.same_on_all_ranks)
        raise
    except RuntimeError as error:
        if not distributed.is_lost_contact(error):
            raise
        reason = str(error).strip().split("\n")[0]
        raise LstScaleError(f"rank {rank} lost contact with another rank, which says why if it could ({reason})") from error


def describe(recipe: Recipe) -> str:
    """Return the resolved recipe as YAML with the trainable count as a comment; needs no weights and no torch."""
    from lst_scale.recipe.schema import to_yaml
    from lst_scale.side.count import describe_count

    return f"{to_yaml(recipe)}# {describe_count(recipe)}"


if __name__ == "__main__":
    status = main()
    sys.stdout.flush()
    sys.stderr.flush()
    sys.exit(status)
