"""`lst-scale slurm ...`, and the scripts in slurm/ of a checkout, which are these commands one by one."""

from __future__ import annotations

import dataclasses
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from lst_scale.cli.as_json import AsJson, print_json
from lst_scale.cli.complete import recipe_names
from lst_scale.cli.job_options import AGAIN, Given, as_written, asks_for_a_job
from lst_scale.cli.submitting import end, submit_or_run, submit_prediction
from lst_scale.errors import ArgumentError, LstScaleError, fence
from lst_scale.recipe.grid import expand
from lst_scale.recipe.members import expand_members, load_members, read_list, share_passes
from lst_scale.recipe.schema import Recipe, load_recipe
from lst_scale.runs.compare import compare, values
from lst_scale.runs.folder import RECIPE, RESULT
from lst_scale.slurm import runs
from lst_scale.slurm.options import CODE, ClusterOptions, load_options
from lst_scale.system.names import shown

app = typer.Typer(
    help="Submit recipes to Slurm, watch them, resubmit what failed, collect the table.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

RecipeOption = Annotated[str, typer.Option("--recipe", help="a shipped recipe's name or a YAML file", autocompletion=recipe_names)]
Overrides = Annotated[list[str] | None, typer.Argument(metavar="[key=value]...")]
Cluster = Annotated[Path | None, typer.Option("--cluster", help="a site's defaults (YAML); ~/.config/lst_scale/slurm.yaml when it exists")]
Names = Annotated[list[str] | None, typer.Argument(help="parts of run names; all runs when none is given")]
Output = Annotated[Path, typer.Option("--output-dir", help="where the runs are")]

MOST_RUNS = 10_000  # of a sweep

Local = Annotated[bool, typer.Option("--local", help="run on this machine, without Slurm")]
DryRun = Annotated[bool, typer.Option("--dry-run", help="print what would be submitted, and stop")]
Snapshot = Annotated[bool, typer.Option("--snapshot/--no-snapshot", help="run a copy of the code as it is now")]
AtMost = Annotated[int, typer.Option("--at-most", min=1, help="how many may run at once")]


@app.command("submit")
@asks_for_a_job()
def submit_command(
    given: Given,
    recipe: Annotated[
        str | None, typer.Option("--recipe", help="a shipped recipe's name or a YAML file", autocompletion=recipe_names)
    ] = None,
    overrides: Overrides = None,
    predict: Annotated[
        Path | None, typer.Option("--predict", help="a finished run that is to answer --inputs, in place of --recipe")
    ] = None,
    inputs: Annotated[Path | None, typer.Option("--inputs", help="with --predict: a .csv, .jsonl or .parquet file")] = None,
    output: Annotated[Path, typer.Option("--output", help="with --predict: where to write JSON lines")] = Path("predictions.jsonl"),
    cluster: Cluster = None,
    local: Local = False,
    dry_run: DryRun = False,
    snapshot: Snapshot = True,
    as_json: AsJson = False,
) -> None:
    """Submit one recipe, its members in one job: one Slurm task a GPU, resumed after preemption, time limits and node failures.

    Or, with --predict, the answers of a finished run to a file, which go on in the same way.
    """
    options = load_options(given, cluster)
    if predict is not None:
        if recipe is not None or inputs is None or local:
            raise ArgumentError(
                "--predict RUN stands beside --inputs FILE, without --recipe and --local: on this machine it is lst-scale predict"
            )
        submit_prediction(predict, inputs, output, overrides or [], options, dry_run=dry_run, snapshot=snapshot, as_json=as_json)
        return
    if recipe is None:
        raise ArgumentError("what is to be submitted? write --recipe NAME, or --predict RUN --inputs FILE")
    groups = [expand_members(load_recipe(recipe, overrides or ()))]
    end(submit_or_run(groups, options, at_most=1, local=local, dry_run=dry_run, snapshot=snapshot, as_json=as_json), as_json)


@app.command("sweep")
@asks_for_a_job()
def sweep_command(
    given: Given,
    recipe: RecipeOption,
    overrides: Overrides = None,
    list_file: Annotated[Path | None, typer.Option("--list", help="a file with one member's overrides a line")] = None,
    at_most: AtMost = 8,
    together: Annotated[int, typer.Option("--together", min=1, help="how many members one job trains, on one backbone pass")] = 1,
    cluster: Cluster = None,
    local: Local = False,
    dry_run: DryRun = False,
    snapshot: Snapshot = True,
    as_json: AsJson = False,
) -> None:
    """Submit every combination of `key=a,b key2=c,d` as a job array. What is finished or in the queue is left alone.

    Each is a job of its own, or, with --together, up to so many share one job and its backbone passes.
    """
    options = load_options(given, cluster)
    lines = [[]] if list_file is None else _read_list(list_file)
    _refuse_too_many(overrides or [], len(lines))
    members = [[*line, *rest] for line in lines for rest in expand(overrides or [])]
    loaded = load_members(recipe, members)
    if together > 1 and any(each.members for each in loaded):
        raise ArgumentError(f"--together {together}: the recipe has members of its own, which train in one job: leave one of the two out")
    groups = share_passes(loaded, together) if together > 1 else [expand_members(each) for each in loaded]
    end(submit_or_run(groups, options, at_most=at_most, local=local, dry_run=dry_run, snapshot=snapshot, as_json=as_json), as_json)


def _read_list(path: Path) -> list[list[str]]:
    if not path.is_file():
        raise ArgumentError(f"--list {path}: there is no such file")
    with fence(ArgumentError, f"--list {path}"):
        return read_list(path.read_text(encoding="utf-8"))


def _refuse_too_many(overrides: Sequence[str], lines: int) -> None:
    """Count a sweep before it is written out.

    Raises:
        ArgumentError: no cluster would take it, and naming it would take minutes.
    """
    count = lines
    for override in overrides:
        count *= len(expand([override]))
        if count > MOST_RUNS:
            raise ArgumentError(f"the sweep has more than {MOST_RUNS:,} members: sweep fewer values, or in parts")


@app.command("status")
def status_command(
    names: Names = None,
    output_dir: Output = Path("runs"),
    watch: Annotated[float | None, typer.Option("--watch", help="look again every so many seconds")] = None,
    logs: Annotated[bool, typer.Option("--logs", help="show where each run's log is")] = False,
    as_json: AsJson = False,
) -> None:
    """Show every run: state, step, loss, score, time left, node, and why it failed."""
    from rich.console import Console
    from rich.live import Live

    from lst_scale.slurm.status import look, printable, table

    if as_json and watch is not None:
        raise ArgumentError("--json prints once, and --watch goes on: leave one of the two out")
    folders, odd = runs.find_runs(output_dir, names or []), list[str]()
    if logs:
        jobs = {folder: runs.last_job(folder, odd) for folder in folders}
        paths = {folder: str(job["log"] if job else folder / "log.txt") for folder, job in jobs.items()}
        if as_json:
            print_json([{"run": folder, "log": path} for folder, path in paths.items()])
        for folder, path in () if as_json else paths.items():
            typer.echo(f"{printable(folder.name)}\t{printable(path)}")
        _tell_odd(odd)
        return
    if as_json:
        print_json([dataclasses.asdict(status) for status in look(folders, odd)])
        _tell_odd(odd)
        return
    # Piped into a file or another program, lines must not be cut at 80 columns.
    console = Console() if sys.stdout.isatty() else Console(width=250)
    if watch is None:
        console.print(table(look(folders, odd)))
        _tell_odd(odd)
        return
    with Live(table(look(folders)), console=console) as live:
        while True:
            time.sleep(watch)
            live.update(table(look(runs.find_runs(output_dir, names or []))))


@app.command("resubmit")
@asks_for_a_job(*AGAIN)
def resubmit_command(
    given: Given,
    names: Names = None,
    output_dir: Output = Path("runs"),
    at_most: AtMost = 8,
    cluster: Cluster = None,
    dry_run: DryRun = False,
    snapshot: Snapshot = True,
    as_json: AsJson = False,
) -> None:
    """Submit again what failed, ran out of time or was lost; it continues from its newest checkpoint. Options can be changed.

    Setup commands, the way to start Python and further sbatch options are the site's and the command line's, never a run folder's.
    """
    from lst_scale.slurm.status import look

    odd: list[str] = []
    lost = [status.run for status in look(runs.find_runs(output_dir, names or []), odd) if status.needs_resubmission]
    groups: dict[ClusterOptions, dict[str, list[Recipe]]] = {}
    for run in lost:
        job = runs.last_job(run)
        assert job is not None, "only submitted runs are lost"
        try:
            options = _again(job["options"], given, cluster, run)
            recipe = load_recipe(str(run / RECIPE))
        except LstScaleError as error:
            odd.append(f"{run} left out: {error}")
            continue
        if runs.folder_of(recipe) != run.resolve():
            odd.append(f"{run} left out: its output_dir {recipe.output_dir} leads elsewhere from here: start this where it was submitted")
            continue
        # What shared a job shares one again.
        groups.setdefault(options, {}).setdefault(job["job"], []).append(recipe)
    _tell_odd(odd)
    if not groups:
        typer.echo("nothing to resubmit", err=as_json)
    told: list[dict[str, Any]] = []
    for options, by_job in groups.items():
        told += submit_or_run(
            list(by_job.values()), options, at_most=at_most, local=False, dry_run=dry_run, snapshot=snapshot, as_json=as_json
        )
    end(told, as_json)


def _again(recorded: dict[str, Any], changes: dict[str, Any], cluster: Path | None, run: Path) -> ClusterOptions:
    """Return a submission's options with `changes`. What is code in them comes from the site's file and the command line alone.

    Raises:
        LstScaleError: the options in the run's folder, or the site's, are none.
    """
    needs = {key: value for key, value in as_written(recorded).items() if key not in CODE}
    options = load_options(needs | changes, cluster)
    for key in CODE:
        now, then = getattr(options, key), as_written(recorded).get(key)
        if then and then != now:
            typer.echo(
                f"{run.name}: {key} at submission, {shown(str(then))}, is not taken from the run's folder: "
                f"write it into the cluster file{' or on the command line' if key != 'python' else ''}",
                err=True,
            )
    return options


@app.command("cancel")
def cancel_command(names: Names = None, output_dir: Output = Path("runs")) -> None:
    """Cancel the jobs of these runs, pending and running. Runs that share a job end together."""
    queue = runs.queue()
    folders = runs.find_runs(output_dir, names or [])
    jobs = sorted({job["job"] for run in folders if (job := runs.last_job(run)) and job["job"] in queue})
    others = [run for run in runs.find_runs(output_dir, []) if run not in folders and (runs.last_job(run) or {}).get("job") in jobs]
    if others:
        raise ArgumentError(f"these jobs train {', '.join(run.name for run in others)} too: name them as well")
    if jobs:
        subprocess.run(["scancel", *jobs], check=True)
    typer.echo(f"cancelled {len(jobs)} job{'' if len(jobs) == 1 else 's'}")


@app.command("collect")
def collect_command(
    names: Names = None,
    output_dir: Output = Path("runs"),
    style: Annotated[str, typer.Option("--format", help="text, markdown or csv")] = "text",
    as_json: AsJson = False,
) -> None:
    """Make the table of all finished runs: mean and deviation over seeds."""
    odd: list[str] = []
    folders = [run for run in runs.find_runs(output_dir, names or []) if (run / RESULT).exists()]
    if as_json:
        print_json(values(folders, odd))
    else:
        typer.echo(compare(folders, style, odd))
    _tell_odd(odd)


def _tell_odd(odd: list[str]) -> None:
    """Name on stderr what was left out of a table, and why."""
    for line in dict.fromkeys(odd):
        typer.echo(line, err=True)


def main(command: str | None = None) -> None:
    """Run `app`, or one command of it for a script in slurm/."""
    arguments = [command, *sys.argv[1:]] if command else sys.argv[1:]
    try:
        app(arguments, prog_name=f"slurm/{command}.py" if command else "lst-scale slurm")
    except LstScaleError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(1)
