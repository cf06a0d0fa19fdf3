"""Recipes on a decoder-only model: prompts and answers, each method that it takes, the tap cache, members, predictions."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast
from typer.testing import CliRunner

from helpers.llamas import make_llama
from helpers.paths import EMBEDDED
from helpers.recipes import recipe_writer
from helpers.runs import assert_same_weights, final_weights, result
from helpers.training import train
from lst_scale.cli.main import app
from lst_scale.data.prompts import PromptTokenizer
from lst_scale.data.tokenizer import load_tokenizer
from lst_scale.errors import NotReady
from lst_scale.inference.predict import predict_file
from lst_scale.recipe.schema import load_recipe
from lst_scale.training.preflight import check_before_start

METHOD = {
    "name": "lst",
    "reduction_factor": 8,
    "side_layers": [1, 3],
    "initialization": "random",
    "start_as_backbone": True,
    "merge_last": True,
}
ENDS = {"bos_token": "<s>", "eos_token": "</s>"}


def make_tokenizer(**special: str) -> PreTrainedTokenizerFast:
    """Bytes in pairs, learned from the embedded rows, as GPT-2's and its heirs' are."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400, special_tokens=list(special.values()), initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    tokenizer.train_from_iterator((EMBEDDED / "wordnet/train.jsonl").read_text().splitlines()[:500], trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special)


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return make_tokenizer(**ENDS)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory, tokenizer: PreTrainedTokenizerFast) -> Callable[[str], Path]:
    def make(model_type: str) -> Path:
        folder = tmp_path_factory.getbasetemp() / f"checkpoint-{model_type}"
        if not folder.exists():
            make_llama(model_type, vocab_size=len(tokenizer), bos_token_id=0, eos_token_id=1, pad_token_id=None).save_pretrained(folder)
            tokenizer.save_pretrained(folder)
        return folder

    return make


@pytest.fixture
def write(checkpoint: Callable[[str], Path], tmp_path: Path) -> Callable[..., Path]:
    def write(name: str, model_type: str = "llama", **changes: Any) -> Path:
        common = {"method": METHOD, "task__template": "{word}: {definition} It is a kind of", "data__max_source_length": 40}
        common |= {"evaluation__method": "likelihood", "training__evaluate_every": 8, "optimizer__learning_rate": 3e-3}
        return recipe_writer(tmp_path, checkpoint(model_type))(name, **(common | changes))

    return write


def trained(path: Path) -> Path:
    train(path)
    recipe = load_recipe(str(path))
    return Path(recipe.output_dir) / recipe.run_name


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


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"method": METHOD | {"initialization": "pruning"}},
            "side blocks are not carved out of a llama: write method.init",
        ),
        ({"backbone__placement": "streamed"}, "a llama is held whole by each process so far: write backbone.placement=replicated"),
        ({"method": {"name": "bitfit"}}, "method.name: bitfit trains inside encoder-decoders alone so far: write lst, lora or full"),
        ({"method": {"name": "lora", "targets": ["q"]}}, r"blocks of this backbone have no matrix 'q'"),
    ],
    ids=lambda value: str(value)[:30],
)
def test_what_is_not_there_yet_is_said_before_anything_starts(changes: dict[str, Any], message: str, write: Callable[..., Path]) -> None:
    with pytest.raises(NotReady, match=message):
        check_before_start([load_recipe(str(write("no", **changes)))], resume=False)


def test_a_plan_says_that_there_is_none_yet(write: Callable[..., Path]) -> None:
    done = CliRunner().invoke(app, ["plan", "--recipe", str(write("planned"))])
    assert done.exit_code != 0 and "is not planned yet" in done.output + str(done.exception)
