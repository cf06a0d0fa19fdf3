"""Recipes on a decoder-only model: prompts and answers, each method that it takes, the tap cache, members, predictions."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import PreTrainedTokenizerFast

from helpers import llama_runs, programs, ranks
from helpers.llama_runs import ENDS, METHOD, make_tokenizer, trained
from helpers.paths import EMBEDDED
from helpers.runs import assert_same_weights, final_weights, result
from helpers.training import train
from lst_scale.data.prompts import PromptTokenizer
from lst_scale.data.tokenizer import load_tokenizer
from lst_scale.errors import DataError, NotReady
from lst_scale.inference.predict import predict_file
from lst_scale.recipe.schema import load_recipe
from lst_scale.training.preflight import check_before_start
from lst_scale.training.shared import load_data

tokenizer, checkpoint, write = llama_runs.tokenizer, llama_runs.checkpoint, llama_runs.write


def test_a_prompt_stays_open_and_keeps_its_end_and_a_target_ends(tokenizer: PreTrainedTokenizerFast) -> None:
    prompts = PromptTokenizer(make_tokenizer(**ENDS))
    whole = tokenizer("a big red dog is", add_special_tokens=False).input_ids
    assert prompts(["a big red dog is"], truncation=True, max_length=4).input_ids == [whole[-4:]]
    assert prompts(["a big red dog is"]).input_ids == [whole]
    target = prompts(text_target="person").input_ids
    assert target == [*tokenizer("is person", add_special_tokens=False).input_ids[len(tokenizer("is").input_ids) :], 1]
    assert prompts(text_target=["person", "a dog"], truncation=True, max_length=2).input_ids[1][-1] == 1
    assert len(prompts(text_target=["a dog that barks"], truncation=True, max_length=3).input_ids[0]) == 3
    assert [len(ids) for ids in prompts(["", "a"]).input_ids] == [2, 2], "a source has a token, and one that begins the target"
    assert prompts.pad_token_id == prompts.eos_token_id == 1 and len(prompts) == len(tokenizer)


def test_a_tokenizer_that_ends_texts_itself_is_left_as_it_is(checkpoint: Callable[[str], Path]) -> None:
    assert not isinstance(load_tokenizer("embedded:tiny-t5"), PromptTokenizer)
    assert isinstance(load_tokenizer(str(checkpoint("llama"))), PromptTokenizer)


@pytest.mark.parametrize("model_type", ["llama", "gemma2", "qwen3"])
def test_a_run_from_the_tap_cache_ends_as_the_live_one(model_type: str, write: Callable[..., Path], tmp_path: Path) -> None:
    cached: dict[str, Any] = {"cache": {"enabled": True, "dtype": "fp32", "folder": str(tmp_path / "taps")}}
    cached |= {"training__epochs": 1}
    live = trained(write("live", model_type, data__shuffle_seed=0, training__epochs=1))
    first = trained(write("first", model_type, data__shuffle_seed=0, **cached))
    second = trained(write("second", model_type, data__shuffle_seed=0, **cached))
    for folder in (first, second):
        assert_same_weights(folder, final_weights(live))
        assert result(folder)["scores"] == result(live)["scores"]
    assert result(second)["cache"]["rows_run"] < result(first)["cache"]["rows_run"]


def test_members_on_one_pass_end_as_each_would_alone(write: Callable[..., Path], tmp_path: Path) -> None:
    changes = {"data__shuffle_seed": 0}
    train(write("both", members=["seed=0", "seed=1"], **changes))
    for seed in (0, 1):
        alone = trained(write(f"alone{seed}", seed=seed, **changes))
        (together,) = (tmp_path / "runs").glob(f"both*seed{seed}")
        assert_same_weights(together, final_weights(alone))


@pytest.mark.parametrize("answers", ["generation", "likelihood"])
def test_a_finished_run_answers_a_file_as_it_was_scored(answers: str, write: Callable[..., Path], tmp_path: Path) -> None:
    folder = trained(write("scored", evaluation__method=answers, training__epochs=4))
    rows = [json.loads(line) for line in (EMBEDDED / "wordnet/validation.jsonl").read_text().splitlines()[:7]]
    (tmp_path / "in.jsonl").write_text("".join(json.dumps({k: row[k] for k in ("word", "definition")}) + "\n" for row in rows))
    assert predict_file([folder], tmp_path / "in.jsonl", tmp_path / "out.jsonl") == 7
    said = [json.loads(line)["prediction"] for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    right = 100 * sum(answer == row["kind"] for answer, row in zip(said, rows, strict=True)) / 7
    assert right == pytest.approx(result(folder)["scores"]["accuracy"], abs=0.01)
    assert not any("kind of" in answer for answer in said), "the prompt is no part of the answer"


@pytest.mark.parametrize(
    "method", [{"name": "lora", "rank": 2, "targets": ["q_proj", "v_proj"]}, {"name": "full"}], ids=lambda m: m["name"]
)
def test_methods_inside_the_model_train_too(method: dict[str, Any], write: Callable[..., Path]) -> None:
    folder = trained(write("inside", method=method))
    assert result(folder)["trainable_parameters"] == sum(tensor.numel() for tensor in final_weights(folder).values())


@pytest.mark.parametrize("precision", ["bf16", "int8", "nf4"])
def test_a_packed_backbone_trains_a_side_network(precision: str, write: Callable[..., Path]) -> None:
    folder = trained(write("packed", backbone__precision=precision))
    assert all(torch.isfinite(tensor).all() for tensor in final_weights(folder).values())


@pytest.mark.parametrize("initialization", ["pruning", "fisher"])
def test_a_side_network_that_was_carved_out_of_the_backbone_trains(initialization: str, write: Callable[..., Path]) -> None:
    method = METHOD | {"initialization": initialization} | ({"fisher_samples": 5} if initialization == "fisher" else {})
    weights = final_weights(trained(write("carved", "mistral", method=method)))
    drawn = final_weights(trained(write("drawn", "mistral")))
    assert weights.keys() == drawn.keys() and all(torch.isfinite(tensor).all() for tensor in weights.values())
    name = "stack.blocks.1.mlp.down_proj.weight"
    assert weights[name].std() != pytest.approx(drawn[name].std().item(), rel=0.05), "it starts elsewhere"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"method": METHOD | {"initialization": "pruning"}},
            "side blocks are not carved out of this llama, whose blocks hold more than a side block has a place for: write method.init",
        ),
        (
            {"backbone__placement": {"name": "tensor_parallel", "size": 4}},
            "4 heads, 2 heads of keys and values and 96 feed-forward channels can't be divided over 4 ranks: "
            "backbone.placement.size can be 1, 2",
        ),
        ({"method": {"name": "lora", "targets": ["wo"]}}, r"blocks of this backbone have no matrix 'wo'"),
    ],
    ids=lambda value: str(value)[:30],
)
def test_what_is_not_there_yet_is_said_before_anything_starts(changes: dict[str, Any], message: str, write: Callable[..., Path]) -> None:
    with pytest.raises(NotReady, match=message):
        check_before_start([load_recipe(str(write("no", **changes)))], resume=False)


def test_a_limit_that_leaves_no_answer_is_one_line_before_the_backbone_is_loaded(write: Callable[..., Path]) -> None:
    with pytest.raises(DataError, match=r"^data\.max_target_length=1 leaves nothing of the target '\w+' but its end: write 2 or more"):
        load_data(load_recipe(str(write("no", task__kind="text", task__labels=None, evaluation={}, data__max_target_length=1))))


@pytest.mark.parametrize(
    ("model_type", "reason"),
    [
        ("phi3", "qkv_proj and gate_up_proj are several matrices in one"),
        ("olmo2", "it norms queries and keys over all heads at once"),
        ("olmo3", "it norms queries and keys over all heads at once"),
    ],
)
def test_blocks_that_can_not_be_divided_are_refused_before_anything_is_loaded(
    model_type: str, reason: str, write: Callable[..., Path]
) -> None:
    path = write("no", model_type, backbone__placement="tensor_parallel")
    message = f"a {model_type} can't be divided over ranks ({reason}): write backbone.placement=zero3 or backbone.placement=streamed"
    with pytest.raises(NotReady, match=re.escape(message)):
        check_before_start([load_recipe(str(path))], resume=False)
    for placement in ("zero3", "streamed"):
        check_before_start([load_recipe(str(path), [f"backbone.placement={placement}"])], resume=False)
    planned = ranks.run(programs.command, "plan", "--cpu", "--gpus", "2", "--recipe", path)
    assert planned.returncode != 0 and message in planned.stderr and "Traceback" not in planned.stderr


@pytest.mark.slow
@pytest.mark.parametrize("model_type", ["llama", "gemma3_text"])
@pytest.mark.parametrize(
    "method",
    [METHOD, {"name": "lora", "rank": 4, "gradient_checkpointing": True}, {"name": "prompt", "num_vectors": 20}],
    ids=lambda method: method["name"],
)
def test_a_real_step_needs_what_was_planned(method: dict[str, Any], model_type: str, write: Callable[..., Path]) -> None:
    path = write("planned", model_type, method=method)
    for rows in ("2", "16"):
        done = ranks.run(programs.script, "benchmarks/planned.py", "--one", path, rows)
        assert done.returncode == 0, done.stderr[-2000:]
        found = json.loads(next(line for line in done.stdout.splitlines() if line.startswith("{")))
        assert found["planned"] == pytest.approx(found["measured"], rel=0.05), found


def test_a_plan_sets_rivals_beside_and_says_that_a_context_is_not_counted(write: Callable[..., Path]) -> None:
    done = ranks.run(programs.command, "plan", "--cpu", "--recipe", write("planned", backbone__context={"text": "Kinds:"}))
    assert done.returncode == 0, done.stderr
    assert "QLoRA, nf4" in done.stdout and "backbone.context is not counted" in done.stdout


def test_the_score_before_training_is_the_backbone_s_own_and_outlives_a_resume(write: Callable[..., Path]) -> None:
    """Beside a ladder that starts as its backbone; a run that is not asked has none."""
    changes = {"evaluation": {"method": "likelihood", "score_start": True}}
    folder = trained(write("started", **changes))
    before = result(folder)["start_scores"]
    still = trained(write("still", optimizer__learning_rate=1e-30, training__epochs=1, **changes))
    assert before == result(still)["start_scores"] == result(still)["scores"]
    (folder / "result.json").unlink()
    train(write("started", **changes), "--resume")
    assert result(folder)["start_scores"] == before
    assert result(trained(write("unasked")))["start_scores"] is None
