"""Finished runs, served: their fields, template, labels and context are those of their training."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch

from helpers.llama_runs import ENDS, checkpoint, make_tokenizer, tokenizer, trained, write
from helpers.llamas import make_llama
from helpers.paths import EMBEDDED
from helpers.served import save_sides
from lst_scale.backbone import as_backbone
from lst_scale.data import files
from lst_scale.data.context import reading_after
from lst_scale.data.prompts import PromptTokenizer
from lst_scale.errors import ArgumentError, DataError
from lst_scale.inference.json_lines import as_json
from lst_scale.inference.predict import predict_file
from lst_scale.inference.scored_run import ScoredRun
from lst_scale.recipe.schema import load_recipe, parse_recipe
from lst_scale.serving.batch import answer_file
from lst_scale.serving.networks import Network, Networks
from lst_scale.serving.start import Options, build
from lst_scale.serving.watch import Watcher

__all__ = ["checkpoint", "tokenizer", "write"]


def predicted(run: Path, tmp_path: Path) -> list[dict[str, Any]]:
    predict_file([run], EMBEDDED / "wordnet/test.jsonl", tmp_path / "answers.jsonl", probabilities=True)
    found = (as_json(each.record, "answers") for each in files.read_records(str(tmp_path / "answers.jsonl"), "test", where="answers"))
    return list(found)[:6]


async def ask(options: Options, body: Any) -> Any:
    app, _ = build(options, print)
    transport = httpx.ASGITransport(app=app)  # type: ignore[arg-type]
    inner = app._app  # type: ignore[attr-defined]
    async with inner.router.lifespan_context(inner), httpx.AsyncClient(transport=transport, base_url="http://here") as client:
        return (await client.post("/v1/classify", json=body, timeout=60)).json()


@pytest.mark.slow
@pytest.mark.parametrize("context", [None, {"examples": 4}])
def test_rows_are_labelled_as_predict_labels_them(context: Any, write: Callable[..., Path], tmp_path: Path) -> None:
    run = trained(write("served", backbone__context=context))
    rows = predicted(run, tmp_path)
    recipe = str(next((tmp_path).glob("*.yaml")))
    options = Options(checkpoint=load_recipe(recipe).backbone.checkpoint, sides={"kinds": run}, precision="fp32")
    fields = [{name: row[name] for name in ("word", "definition")} for row in rows]
    found = asyncio.run(ask(options, {"model": "kinds", "input": fields}))["results"][0]["rows"]
    refused = asyncio.run(ask(options, {"model": "kinds", "input": {"word": "finch"}}))
    assert "a row for kinds" in refused["error"]["message"] and "definition" in refused["error"]["message"]
    for row, answer in zip(rows, found, strict=True):
        assert answer["label"] == row["prediction"]
        assert answer["probabilities"] == pytest.approx(row["probabilities"], abs=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("answers", ["generation", "likelihood"])
def test_several_runs_answer_a_file_as_each_does_alone(answers: str, write: Callable[..., Path], tmp_path: Path) -> None:
    runs = [trained(write(name, evaluation__method=answers, method__reduction_factor=r)) for name, r in (("one", 8), ("two", 4))]
    source = tmp_path / "rows.jsonl"
    source.write_text("".join((EMBEDDED / "wordnet/test.jsonl").read_text().splitlines(keepends=True)[:70]))
    assert answer_file(runs, source, tmp_path / "all.jsonl", probabilities=True) == 70
    found = [json.loads(line) for line in (tmp_path / "all.jsonl").read_text().splitlines()]
    for run in runs:
        predict_file([run], source, tmp_path / "alone.jsonl", probabilities=True)
        for line, mine in zip((tmp_path / "alone.jsonl").read_text().splitlines(), found, strict=True):
            alone = json.loads(line)
            assert mine[f"prediction_{run.name}"] == alone["prediction"]
            assert mine[f"probabilities_{run.name}"] == pytest.approx(alone["probabilities"], abs=1e-5)


@pytest.mark.slow
def test_a_mean_of_numbers_beside_a_label_is_the_mean_alone(write: Callable[..., Path], tmp_path: Path) -> None:
    rows = [json.loads(line) for line in (EMBEDDED / "wordnet/train.jsonl").read_text().splitlines()[:40]]
    numbered = tmp_path / "numbered.jsonl"
    numbered.write_text("".join(json.dumps(row | {"length": f"{len(row['definition']) % 7 / 2 - 1:.1f}"}) + "\n" for row in rows))
    files = {f"task__{split}": str(numbered) for split in ("train", "validation", "test")}
    task: dict[str, Any] = {"task__kind": "regression", "task__target": "length", "task__labels": None}
    means, labels = trained(write("means", evaluation__method="expectation", **task, **files)), trained(write("labels"))
    assert answer_file([means, labels], numbered, tmp_path / "all.jsonl") == 40
    predict_file([means], numbered, tmp_path / "alone.jsonl")
    both = [json.loads(line) for line in (tmp_path / "all.jsonl").read_text().splitlines()]
    alone = [json.loads(line) for line in (tmp_path / "alone.jsonl").read_text().splitlines()]
    for one, other in zip(both, alone, strict=True):
        assert one[f"prediction_{means.name}"] == pytest.approx(other["prediction"], abs=1e-4) and one[f"prediction_{labels.name}"]
        assert -1 < other["prediction"] < 2


def test_a_run_on_several_tasks_is_refused_with_what_can_be_done(tmp_path: Path) -> None:
    model, tokenizer = make_llama("llama"), make_tokenizer(**ENDS)
    folder = save_sides(model, tmp_path / "run", 1, start_as_backbone=True, merge_last=True)["side0"].rename(tmp_path / "run/side_network")
    recipe = "{name: two, tasks: [rte, mrpc], backbone: {checkpoint: x}, method: {name: lst}}"
    (tmp_path / "run/recipe.yaml").write_text(recipe)
    networks = Networks(as_backbone(model), PromptTokenizer(tokenizer))
    with pytest.raises(ArgumentError, match=r"was trained on rte, mrpc: serve its folder side_network/ by itself, which answers texts$"):
        networks.add("two", tmp_path / "run")
    networks.add("two", folder)
    assert "two" in networks.names
    with pytest.raises(ArgumentError, match=r"was trained on rte, mrpc: ask it alone, with lst-scale predict and task=NAME$"):
        answer_file([tmp_path / "run"], tmp_path / "rows.jsonl", tmp_path / "all.jsonl")


def test_a_run_that_is_seen_before_its_result_is_served_once_that_is_there(tmp_path: Path) -> None:
    model, folder, said = make_llama("llama"), tmp_path / "runs/one", list[str]()
    save_sides(model, folder, 1, start_as_backbone=True, merge_last=True)["side0"].rename(folder / "side_network")
    (folder / "recipe.yaml").write_text("{name: one, task: rte, backbone: {checkpoint: x}, method: {name: lst}}")
    networks = Networks(as_backbone(model), PromptTokenizer(make_tokenizer(**ENDS)))
    watcher = Watcher(folder.parent, networks, said.append)
    watcher.look()
    (folder / "result.json").write_text("{}")
    for _ in range(2):
        watcher.look()
    assert said == [f"one is not served: {folder} is no finished run: it holds no result.json", "one is served"]


def test_one_that_there_is_no_memory_for_is_told_and_the_others_are_served(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, said = make_llama("llama"), list[str]()
    sides = save_sides(model, tmp_path, 2, start_as_backbone=True, merge_last=True)
    networks = Networks(as_backbone(model), PromptTokenizer(make_tokenizer(**ENDS)))
    read = networks._read

    def read_but_the_first(name: str, folder: Path) -> Network:
        if name == "side0":
            raise torch.OutOfMemoryError("CUDA out of memory")
        return read(name, folder)

    monkeypatch.setattr(networks, "_read", read_but_the_first)
    Watcher(sides["side0"].parent, networks, said.append).look()
    assert said == ["side0 is not served: OutOfMemoryError: CUDA out of memory", "side1 is served"]


def test_rows_of_glue_are_written_as_in_training(tokenizer: Any) -> None:
    recipe = parse_recipe("{name: t, task: rte, backbone: {checkpoint: x}, method: {name: lst}}", "t.yaml")
    run = ScoredRun(
        recipe=recipe, task="rte", kind="classification", labels=None, numbers=None, context=None, conversational=False, longest=None
    )
    reading = reading_after(None, PromptTokenizer(tokenizer), beside_backbone=True)
    network = Network(name="pairs", side=None, reading=reading, run=run)
    row = {"sentence1": "A cat sleeps.", "sentence2": "An animal rests."}
    assert network.text_of(row) == "rte sentence1: A cat sleeps. sentence2: An animal rests."
    with pytest.raises(DataError, match="a row for pairs: row 1 has no field 'sentence2'"):
        network.text_of({"sentence1": "A cat sleeps."})


@pytest.mark.slow
def test_runs_that_can_not_answer_beside_each_other_are_named(write: Callable[..., Path], tmp_path: Path) -> None:
    run = trained(write("one", evaluation__method="generation", evaluation__num_beams=2))
    source = EMBEDDED / "wordnet/test.jsonl"
    with pytest.raises(ArgumentError, match="answers by beam search"):
        answer_file([run], source, tmp_path / "all.jsonl")
    other = trained(write("other", model_type="qwen3"))
    plain = trained(write("plain"))
    with pytest.raises(ArgumentError, match="was trained on"):
        answer_file([plain, other], source, tmp_path / "all.jsonl")
    with pytest.raises(ArgumentError, match="two runs are called"):
        answer_file([plain, plain], source, tmp_path / "all.jsonl")
    assert not (tmp_path / "all.jsonl").exists()
    rows = tmp_path / "rows.jsonl"
    taken = f"prediction_{plain.name}"
    rows.write_text(json.dumps({"word": "finch", "definition": "a bird", taken: "something"}) + "\n")
    with pytest.raises(ArgumentError, match="is the file of inputs"):
        answer_file([plain], rows, rows)
    with pytest.raises(DataError, match=f"row 1 has a field '{taken}' already, .*: rename {taken}"):
        answer_file([plain], rows, tmp_path / "all.jsonl")
    assert not (tmp_path / "all.jsonl").exists()
