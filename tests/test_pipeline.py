"""`lst_scale.pipeline`: answers are those of `lst-scale predict`, in memory."""

from __future__ import annotations

import json
import math
import subprocess
import sys
import threading
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

import lst_scale
from helpers.finished import VALIDATION, finished_runs
from helpers.launchers import fresh
from helpers.llama_runs import ENDS, METHOD, make_tokenizer
from helpers.llamas import make_llama
from helpers.recipes import recipe_writer
from lst_scale import LadderConfig, LadderModel
from lst_scale.backbone import load_backbone
from lst_scale.data.encode import answer_in
from lst_scale.data.files import load_records
from lst_scale.errors import ArgumentError, DataError, LstScaleError
from lst_scale.inference.pipeline import Pipeline
from lst_scale.inference.predict import predict_file
from lst_scale.inference.streaming import answer_of
from lst_scale.recipe.schema import load_recipe
from lst_scale.training.run import run

ROWS = [{"word": row["word"], "definition": row["definition"]} for row in list(load_records(VALIDATION, "validation"))[:9]]
CHAT = "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}\n{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"
TALK = [{"role": "user", "content": "is a film about a cat any good?"}]


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return finished_runs(tmp_path_factory.mktemp("pipeline"))


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A language model with a chat template."""
    folder, tokenizer = tmp_path_factory.mktemp("llama"), make_tokenizer(**ENDS)
    make_llama("llama", vocab_size=len(tokenizer), bos_token_id=0, eos_token_id=1, pad_token_id=None).save_pretrained(folder)
    tokenizer.chat_template = CHAT
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def in_context(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of the language model after a context, with one field."""
    folder = tmp_path_factory.mktemp("context")
    changes: dict[str, Any] = {"backbone__context": {"text": "Kinds of words.", "examples": 2}, "task__source": ["definition"]}
    changes |= {"task__template": "{definition} It is a kind of", "evaluation__method": "likelihood", "training__max_steps": 3}
    path = recipe_writer(folder, checkpoint)("after", method=METHOD, training__evaluate_every=3, data__max_source_length=40, **changes)
    run(load_recipe(str(path)))
    return folder / "runs" / "after-kind-seed0"


@pytest.fixture
def side(checkpoint: Path, tmp_path: Path) -> Path:
    """A side network by itself, far from its start."""
    torch.manual_seed(0)
    model = LadderModel(str(checkpoint), LadderConfig(reduction_factor=8, side_layers=[1, 3], start_as_backbone=True))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    model.save_pretrained(tmp_path / "side")
    return tmp_path / "side"


@pytest.fixture
def predicted(tmp_path: Path) -> Callable[..., list[dict[str, Any]]]:
    def predicted(folder: Path, rows: list[dict[str, Any]], *overrides: str, **options: Any) -> list[dict[str, Any]]:
        (tmp_path / "in.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        predict_file([folder], tmp_path / "in.jsonl", tmp_path / "out.jsonl", overrides, **options)
        return [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]

    return predicted


@pytest.mark.parametrize("name", ["class", "number", "text", "lora"])
def test_answers_are_those_of_predict(name: str, finished: dict[str, Path], predicted: Any) -> None:
    labelled = name in ("class", "lora")
    lines = predicted(finished[name], ROWS, probabilities=labelled)
    with lst_scale.pipeline(finished[name]) as pipe, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of sources that are cut
        assert pipe.kind == {"number": "regression", "text": "text"}.get(name, "classification")
        assert pipe.columns == ("word", "definition") and pipe.labels == (("artifact", "food") if labelled else None)
        answers = pipe(ROWS)
        alone = pipe(ROWS[4])
    if not labelled:
        assert answers == [line["prediction"] for line in lines] and alone == answers[4]
        return
    assert [answer["label"] for answer in answers] == [line["prediction"] for line in lines]
    assert [answer["probabilities"] for answer in answers] == [line["probabilities"] for line in lines]
    assert alone["label"] == answers[4]["label"]
    for label, share in alone["probabilities"].items():  # float32 sums in batches of other shapes
        assert math.isclose(share, answers[4]["probabilities"][label], rel_tol=1e-4)


def test_a_process_in_which_nothing_was_trained_answers(finished: dict[str, Path], predicted: Any) -> None:
    """Training leaves a group of ranks in a process, without which a backbone must load as well."""
    runs = {name: str(finished[name]) for name in ("class", "text", "lora")}
    program = (
        "import json, sys, warnings, lst_scale; warnings.simplefilter('ignore'); runs, rows = json.loads(sys.argv[1]);"
        "print(json.dumps({name: lst_scale.pipeline(run)(rows) for name, run in runs.items()}))"
    )
    command = [sys.executable, "-c", program, json.dumps([runs, ROWS])]
    done = subprocess.run(command, env=fresh(), capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["text"] == [line["prediction"] for line in predicted(finished["text"], ROWS)]
    for name in ("class", "lora"):
        assert [answer["label"] for answer in found[name]] == [line["prediction"] for line in predicted(finished[name], ROWS)]


def test_a_placement_of_several_processes_is_refused(finished: dict[str, Path]) -> None:
    with pytest.raises(ArgumentError, match=r"^placement zero3 needs several processes, and a pipeline is one"):
        lst_scale.pipeline(finished["class"], overrides=["backbone.placement=zero3"])


def test_overrides_change_answers_as_predict_s_do(finished: dict[str, Path], predicted: Any) -> None:
    override = "evaluation.num_beams=1"
    lines = predicted(finished["text"], ROWS, override)
    with lst_scale.pipeline(finished["text"], overrides=[override]) as pipe, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert pipe(ROWS) == [line["prediction"] for line in lines] == lst_scale.pipeline(finished["text"])(ROWS, num_beams=1)
        assert len(pipe.tokenizer(pipe(ROWS[0], max_new_tokens=1)).input_ids) <= 2
        streamed = "".join(pipe.stream(ROWS[0]))
        assert streamed.strip() == pipe(ROWS[0])
    with pytest.raises(LstScaleError, match="has no effect on predictions"):
        lst_scale.pipeline(finished["text"], overrides=["optimizer.learning_rate=1"])


def test_a_context_and_a_template_come_with_the_run_and_a_text_stands_for_its_one_field(in_context: Path, predicted: Any) -> None:
    rows = [{"definition": row["definition"]} for row in ROWS]
    lines = predicted(in_context, rows, probabilities=True)
    with lst_scale.pipeline(in_context) as pipe, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        answers = pipe(rows)
        assert [answer["probabilities"] for answer in answers] == [line["probabilities"] for line in lines]
        assert pipe([row["definition"] for row in rows]) == answers and pipe(tuple(rows)) == answers
        assert pipe([]) == []


def test_pipelines_share_a_backbone(in_context: Path, side: Path, checkpoint: Path) -> None:
    backbone = load_backbone(str(checkpoint), revision=None, precision="fp32")
    row = {"definition": "a cat"}
    with lst_scale.pipeline(in_context, backbone=backbone) as first, lst_scale.pipeline(side, backbone=backbone) as second:
        assert first.model.backbone.give_model() is second.model.backbone.give_model() is backbone.give_model()
        assert first(row) == lst_scale.pipeline(in_context)(row)
        assert second("a cat") == lst_scale.pipeline(side)("a cat")


def test_a_side_network_by_itself_takes_texts_as_they_are(side: Path, checkpoint: Path) -> None:
    pipe = lst_scale.pipeline(side)
    model, tokenizer = LadderModel.from_pretrained(side), pipe.tokenizer
    ids = torch.tensor([tokenizer("a fine film").input_ids])
    expected = model.generate(ids, max_new_tokens=8, do_sample=False)[0, ids.shape[1] :]
    assert pipe("a fine film", max_new_tokens=8) == tokenizer.decode(expected, skip_special_tokens=True).strip()
    assert pipe.columns == () and pipe.labels is None and pipe.kind == "text"
    chooses = lst_scale.pipeline(side, labels=["good", "bad"])
    answer = chooses("a fine film")
    assert answer["label"] == max(answer["probabilities"], key=answer["probabilities"].__getitem__)
    costs = {}
    for label in ("good", "bad"):
        whole = torch.tensor([[*ids[0].tolist(), *tokenizer(text_target=label).input_ids]])
        labels = whole.clone()
        labels[:, : ids.shape[1]] = -100
        costs[label] = model(input_ids=whole, labels=labels).loss.item() * (whole.shape[1] - ids.shape[1])
    shares = torch.tensor([-costs["good"], -costs["bad"]]).softmax(0).tolist()
    assert [answer["probabilities"][label] for label in ("good", "bad")] == pytest.approx(shares, rel=1e-4)  # float32, two ways


def test_conversations_are_written_by_the_chat_template(side: Path, checkpoint: Path) -> None:
    pipe = lst_scale.pipeline(side)
    answer = pipe(TALK, max_new_tokens=12)
    whole = pipe.tokenizer.apply_chat_template(TALK, tokenize=False, add_generation_prompt=True)
    assert whole == "<user>is a film about a cat any good?\n<assistant>"
    ids = torch.tensor([make_tokenizer(**ENDS)(whole, add_special_tokens=False).input_ids])
    model = LadderModel.from_pretrained(side, AutoModelForCausalLM.from_pretrained(checkpoint))
    expected = model.generate(ids, max_new_tokens=12, do_sample=False)[0, ids.shape[1] :]
    assert answer == pipe.tokenizer.decode(expected, skip_special_tokens=True).strip()
    longer = [*TALK, {"role": "assistant", "content": "yes"}, {"role": "user", "content": "why?"}]
    assert pipe([TALK, longer], max_new_tokens=12)[0] == answer
    pieces = list(pipe.stream(TALK, max_new_tokens=12))
    assert "".join(pieces).strip() == answer


@pytest.mark.parametrize("text", ["An", "Answer: yes", "Answer: An", " yes", "Answer: Ann"])
@pytest.mark.parametrize("size", [1, 3, 100])
def test_a_streamed_answer_is_the_whole_one_without_its_prefix(text: str, size: int) -> None:
    pieces = (text[first : first + size] for first in range(0, len(text), size))
    assert "".join(answer_of(pieces, "Answer: ")) == answer_in(text, "Answer: ")


def test_a_stream_that_is_left_ends_generation(side: Path) -> None:
    pipe = lst_scale.pipeline(side)
    stream = pipe.stream("a fine film", max_new_tokens=100_000)
    next(stream)
    stream.close()  # waits for the thread, which would go on for minutes
    assert threading.active_count() < 4


def test_a_failure_while_streaming_reaches_whoever_listens(side: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pipe = lst_scale.pipeline(side)

    def broken(*_: Any, **__: Any) -> Any:
        raise RuntimeError("the device is gone")

    monkeypatch.setattr(pipe.model, "generate", broken)
    with pytest.raises(RuntimeError, match="the device is gone"):
        list(pipe.stream("a fine film"))


def test_sources_that_are_cut_are_told(finished: dict[str, Path]) -> None:
    with pytest.warns(UserWarning, match=r"^sources cut at data.max_source_length=24 tokens: 1 of 1 in inputs"):
        lst_scale.pipeline(finished["class"])({"word": "w", "definition": "long " * 60})


@pytest.mark.parametrize(
    ("name", "ask", "error", "message"),
    [
        ("class", lambda pipe: pipe("cat"), ArgumentError, r"^this run reads the fields word, definition: give a dictionary of them"),
        ("class", lambda pipe: pipe({"word": "cat"}), DataError, r"^inputs: row 1 has no field 'definition'"),
        ("class", lambda pipe: pipe([ROWS[0], {"word": "cat", "definition": None}]), DataError, r"^inputs: row 2 has no definition"),
        ("class", lambda pipe: pipe(7), ArgumentError, r"^an input is a text, a dictionary of fields or a list of messages"),
        ("class", lambda pipe: pipe([7]), ArgumentError, r"^input 1 is of type int: give a text, a dictionary"),
        ("class", lambda pipe: pipe(TALK), ArgumentError, r"^this backbone's tokenizer has no chat template"),
        ("class", lambda pipe: pipe([TALK, ROWS[0]]), ArgumentError, r"^conversations and other inputs are told apart"),
        ("class", lambda pipe: pipe(ROWS[0], num_beams=2), ArgumentError, r"^num_beams has no effect on answers that are the likeliest"),
        ("text", lambda pipe: pipe(ROWS[0], max_new_tokens=0), ArgumentError, r"^max_new_tokens 0 must be a whole number of at least 1"),
        ("class", lambda pipe: pipe.stream(ROWS[0]), ArgumentError, r"^a classification has no answer that grows word by word"),
        ("text", lambda pipe: pipe.stream(ROWS[0]), ArgumentError, r"^evaluation.num_beams=2 gives no answer that grows"),
    ],
)
def test_what_can_not_be_answered_is_one_line(
    name: str, ask: Callable[[Pipeline], Any], error: type[LstScaleError], message: str, finished: dict[str, Path]
) -> None:
    with pytest.raises(error, match=message) as refusal:
        ask(lst_scale.pipeline(finished[name]))
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"labels": ["a"]}, r"is a run, which has its own labels: leave labels out"),
        ({"tokenizer": 1}, r"is a run, which has its own tokenizer: leave tokenizer out"),
        ({"overrides": ["task=other"]}, r"was trained on kind: say which of them is asked"),
    ],
)
def test_what_a_run_knows_is_not_given(options: dict[str, Any], message: str, finished: dict[str, Path]) -> None:
    with pytest.raises(ArgumentError, match=message):
        lst_scale.pipeline(finished["class"], **options)


def test_folders_that_hold_nothing_that_answers_are_one_line(
    finished: dict[str, Path], side: Path, checkpoint: Path, tmp_path: Path
) -> None:
    with pytest.raises(LstScaleError, match="holds no saved side network"):
        lst_scale.pipeline(tmp_path)
    with pytest.raises(ArgumentError, match=r"without a recipe, of which evaluation.num_beams=4 would change something"):
        lst_scale.pipeline(side, overrides=["evaluation.num_beams=4"])
    with pytest.raises(ArgumentError, match=r"knows no template: give a text"):
        lst_scale.pipeline(side)({"word": "cat"})
    with pytest.raises(ArgumentError, match=r"which changes the backbone: leave backbone out"):
        lst_scale.pipeline(finished["lora"], backbone=str(checkpoint))
    with pytest.raises(ArgumentError, match=r"stays where it is, so device='cpu' has no effect"):
        lst_scale.pipeline(side, backbone=str(checkpoint), device="cpu")
