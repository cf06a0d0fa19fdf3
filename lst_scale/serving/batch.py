"""`lst-scale predict RUN FILE --beside RUN ...`: several finished runs answer one file, each for itself, on one pass of the backbone."""

from __future__ import annotations

import queue
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from lst_scale.backbone.placement.load import load_alone
from lst_scale.data import files
from lst_scale.data.columns import by_chunks
from lst_scale.data.encode import answer_in
from lst_scale.data.measures import number_in
from lst_scale.errors import ArgumentError, TrainingError
from lst_scale.inference.json_lines import lines_file
from lst_scale.inference.predict import refuse_inputs_as_output, text_of_row, with_room
from lst_scale.inference.scored_run import ScoredRun, read_scored_run
from lst_scale.serving.answers import shares
from lst_scale.serving.engine import Engine
from lst_scale.serving.jobs import Ended, Generation, Scoring
from lst_scale.serving.networks import Network, Networks
from lst_scale.serving.passes import Passes
from lst_scale.serving.sampling import Chosen, Sampling
from lst_scale.system.distributed import World, poll_interruption
from lst_scale.training.evaluation import mean_of
from lst_scale.training.paths import without_needless_end
from lst_scale.training.shared import load_tokenizer_of

ROWS = 64  # that are read, answered by all runs, and written at a time
PREDICTION, PROBABILITIES = "prediction", "probabilities"


def answer_file(runs: Sequence[Path], source: Path, output: Path, *, probabilities: bool = False) -> int:
    """Answer every row of `source` with each run, and write JSON lines; return how many rows there were.

    A line holds the row's fields and, for each run, `prediction_NAME` after its folder's name: what `lst-scale predict` gives of it alone.
    With `probabilities` those of a run's labels stand beside it as `probabilities_NAME`.

    Raises:
        LstScaleError: a run is not finished, has another backbone than the first, or answers by beam search; the file, a row or the
            output can't be used.
    """
    asked = _asked(runs)
    refuse_inputs_as_output(source, output)
    names = [f"{what}_{name}" for name in asked for what in ([PREDICTION, PROBABILITIES] if probabilities else [PREDICTION])]
    world = World(rank=0, size=1, local_rank=0, device=torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    rows = 0
    with lines_file(output) as lines:
        engine, networks, tokenizer = _started(asked, runs, world)
        try:
            for found in by_chunks(files.read_records(str(source), "test", where="inputs"), ROWS):
                poll_interruption(world)
                records = [with_room(each.record, names, each.path, each.number, others_can_be_written=False) for each in found]
                answers = {name: _answers(engine, networks.get(name), run, found, tokenizer, probabilities) for name, run in asked.items()}
                lines.write([record | _columns(answers, number) for number, record in enumerate(records)])
                rows += len(found)
        finally:
            engine.stop()
        lines.finish()
    return rows


def _asked(runs: Sequence[Path]) -> dict[str, ScoredRun]:
    """Return how each run answers, by its folder's name."""
    found: dict[str, ScoredRun] = {}
    for path in runs:
        name, run = path.resolve().name, read_scored_run(path, of_several="ask it alone, with lst-scale predict and task=NAME")
        if name in found:
            raise ArgumentError(f"two runs are called {name}, which would be one column: give each a folder of its own name")
        first = next(iter(found.values()), run).recipe.backbone
        mine = run.recipe.backbone
        if (mine.checkpoint, mine.revision, mine.precision) != (first.checkpoint, first.revision, first.precision):
            raise ArgumentError(f"{path} was trained on {mine.checkpoint} in {mine.precision}, not {first.checkpoint} in {first.precision}")
        if run.evaluation.method == "generation" and (run.evaluation.num_beams > 1 or run.longest is None):
            raise ArgumentError(f"{path} answers by beam search, or does not say how long: ask it alone, with lst-scale predict")
        found[name] = run
    return found


def _started(asked: Mapping[str, ScoredRun], runs: Sequence[Path], world: World) -> tuple[Engine, Networks, Any]:
    recipe = next(iter(asked.values())).recipe.backbone
    tokenizer = load_tokenizer_of(recipe.checkpoint, recipe.revision)
    backbone = load_alone(recipe, world)
    networks = Networks(backbone, tokenizer)
    for name, path in zip(asked, runs, strict=True):
        networks.add(name, path)
    rows = ROWS * len(runs)
    engine = Engine(Passes(backbone), networks, most_rows=rows, most_waiting=2 * rows)  # each may be asked for a text and for labels
    engine.start()
    return engine, networks, tokenizer


def _answers(
    engine: Engine, network: Network, run: ScoredRun, rows: Sequence[files.Found], tokenizer: Any, probabilities: bool
) -> Callable[[int], dict[str, Any]]:
    """Ask one run about some rows; return what gives the columns of each, and waits for them."""
    prompts = [network.prompt(text_of_row(run, row, network.chat)) for row in rows]
    likely = run.evaluation.method == "likelihood"
    if run.evaluation.method == "expectation":
        return _means(engine, network, run.numbers or (), prompts)
    scored = (
        [_score(engine, network, prompt, network.targets) for prompt in prompts] if likely or (probabilities and network.labels) else None
    )
    most = run.evaluation.max_new_tokens or run.longest or 1
    texts = None if likely else [_generate(engine, network, prompt, most) for prompt in prompts]

    def columns(number: int) -> dict[str, Any]:
        found: dict[str, Any] = {}
        labels, each = [label.strip() for label in network.labels or ()], None if scored is None else shares(_event(scored[number]))
        if texts is None:
            assert each is not None
            found[f"{PREDICTION}_{network.name}"] = labels[max(range(len(each)), key=each.__getitem__)]
        else:
            text = answer_in(tokenizer.decode(_tokens(texts[number]), skip_special_tokens=True), run.target_prefix)
            found[f"{PREDICTION}_{network.name}"] = number_in(text) if run.kind == "regression" else text
        if probabilities and each is not None:
            found[f"{PROBABILITIES}_{network.name}"] = dict(zip(labels, each, strict=True))
        return found

    return columns


def _means(engine: Engine, network: Network, numbers: Sequence[str], prompts: Sequence[tuple[int, ...]]) -> Callable[[int], dict[str, Any]]:
    targets = without_needless_end(network.label_ids(numbers))
    scored = [_score(engine, network, prompt, targets) for prompt in prompts]

    def columns(number: int) -> dict[str, Any]:
        (mean,) = mean_of(numbers, torch.tensor([_event(scored[number])]))
        return {f"{PREDICTION}_{network.name}": number_in(mean)}

    return columns


def _columns(answers: Mapping[str, Callable[[int], dict[str, Any]]], number: int) -> dict[str, Any]:
    return {column: value for columns in answers.values() for column, value in columns(number).items()}


def _score(
    engine: Engine, network: Network, prompt: tuple[int, ...], targets: tuple[tuple[int, ...], ...]
) -> queue.Queue[list[float] | Ended]:
    events: queue.Queue[list[float] | Ended] = queue.Queue()
    engine.submit(Scoring(network=network, prompt=prompt, targets=targets, tell=events.put))
    return events


def _generate(engine: Engine, network: Network, prompt: tuple[int, ...], most: int) -> queue.Queue[Chosen | Ended]:
    events: queue.Queue[Chosen | Ended] = queue.Queue()
    engine.submit(Generation(network=network, prompt=prompt, sampling=Sampling(), max_tokens=most, tell=events.put))
    return events


def _event(events: queue.Queue[list[float] | Ended]) -> list[float]:
    found = events.get()
    if isinstance(found, Ended):
        raise TrainingError(f"a pass failed with {found.message}; what happened is told above")
    return found


def _tokens(events: queue.Queue[Chosen | Ended]) -> list[int]:
    tokens = []
    while isinstance(event := events.get(), Chosen):
        tokens.append(event.token)
    if event.reason == "error":
        raise TrainingError(f"a pass failed with {event.message}; what happened is told above")
    return tokens
