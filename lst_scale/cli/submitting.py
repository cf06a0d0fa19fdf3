"""What `lst-scale slurm submit`, `sweep` and `resubmit` do once they know what to submit, and how they tell it: in lines, or as JSON."""

from __future__ import annotations

import contextlib
import functools
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import typer

from lst_scale.cli.as_json import print_json
from lst_scale.errors import ArgumentError
from lst_scale.recipe.schema import Recipe
from lst_scale.slurm import runs
from lst_scale.slurm.options import ClusterOptions
from lst_scale.training.preflight import check_before_start

FAILED = "failed"


def submit_or_run(
    groups: Sequence[Sequence[Recipe]],
    options: ClusterOptions,
    *,
    at_most: int,
    local: bool,
    dry_run: bool,
    snapshot: bool,
    as_json: bool,
) -> list[dict[str, Any]]:
    """Submit jobs, or run them here, and say what became of each run, unless that is told as JSON; return the same."""
    from lst_scale.slurm import local as local_jobs
    from lst_scale.slurm import submission

    queue = runs.known_queue([]) if local or dry_run else runs.queue()  # nothing is queued twice where nothing is queued
    plan = submission.plan(groups, queue or {})
    told = [_told(recipe, "skipped", why=why) for recipe, why in plan.skipped]
    say = functools.partial(typer.echo, err=as_json)
    for recipe, why in plan.skipped:
        say(f"{recipe.run_name}: {why}")
    check_before_start([recipe for group in plan.new for recipe in group], resume=True, together=False)
    if not plan.new:
        say("nothing to submit")
    elif dry_run:
        say("\n".join(f"# {', '.join(recipe.run_name for recipe in group)}" for group in plan.new))
        say(submission.script(plan.new, options, at_most=at_most, use_snapshot=snapshot))
        told += [_told(recipe, "not submitted") for group in plan.new for recipe in group]
    elif local:
        with contextlib.redirect_stdout(sys.stderr) if as_json else contextlib.nullcontext():
            failed = local_jobs.run(plan.new, options, at_most=at_most)
        whys = {folder: runs.first_failure(folder) or "failed" for folder in failed}
        for folder, why in whys.items():
            typer.echo(f"{folder.name}: {why}", err=True)
        for recipe in (recipe for group in plan.new for recipe in group):
            why = whys.get(runs.folder_of(recipe), "")
            told.append(_told(recipe, FAILED if why else "done", why=why))
    else:
        jobs = submission.submit(plan.new, options, at_most=at_most, use_snapshot=snapshot)
        for group, job in zip(plan.new, jobs, strict=True):
            for recipe in group:
                say(f"{recipe.run_name}: job {job}")
                told.append(_told(recipe, "submitted", job=str(job)))
    return told


def _told(recipe: Recipe, state: str, *, job: str | None = None, why: str = "") -> dict[str, Any]:
    return {"run": recipe.run_name, "folder": runs.folder_of(recipe), "state": state, "job": job, "why": why}


def end(told: list[dict[str, Any]], as_json: bool) -> None:
    """Print what was told where it is JSON, and leave with 1 when a run failed here, as `--local` runs can."""
    if as_json:
        print_json(told)
    if any(one["state"] == FAILED for one in told):
        raise typer.Exit(1)


def submit_prediction(
    run: Path,
    inputs: Path,
    output: Path,
    overrides: Sequence[str],
    options: ClusterOptions,
    *,
    dry_run: bool,
    snapshot: bool,
    as_json: bool,
) -> None:
    from lst_scale.inference.scored_run import read_scored_run
    from lst_scale.slurm import prediction

    read_scored_run(run, overrides)  # what is wrong with it is told now, and not by the job
    if not inputs.is_file():
        raise ArgumentError(f"--inputs {inputs}: there is no such file")
    place, source, answers = (str(path.resolve()) for path in (run, inputs, output))
    job = prediction.PredictJob(place, source, answers, overrides, cpu=options.gpus_per_node == 0, threads=options.cpus_per_task)
    told = {"run": run.name, "folder": place, "output": answers, "state": "not submitted", "job": None, "log": None}
    if dry_run:
        typer.echo(prediction.script(job, options), err=as_json)
    else:
        number, log = prediction.submit(job, options, use_snapshot=snapshot)
        typer.echo(f"{output}: job {number}, which says how it goes in {log}", err=as_json)
        told |= {"state": "submitted", "job": str(number), "log": str(log)}
    if as_json:
        print_json([told])
