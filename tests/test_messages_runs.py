"""Recipes on prompts with completions and on conversations: training, scores, the tap cache, a context, members, predictions, a server."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import lst_scale
from helpers.chats import save_chat_model, turns, write_rows
from helpers.llama_runs import METHOD, trained
from helpers.models import make_t5
from helpers.paths import EMBEDDED
from helpers.recipes import recipe_writer
from helpers.runs import assert_same_weights, final_weights, losses, result
from helpers.training import train
from lst_scale import LadderConfig, LadderModel
from lst_scale.backbone import load_backbone
from lst_scale.data.answers import answer_in
from lst_scale.data.batches import evaluation_batches
from lst_scale.data.prompts import in_way
from lst_scale.data.tokenizer import load_tokenizer
from lst_scale.errors import ArgumentError, DataError, NotReady
from lst_scale.inference.predict import predict_file
from lst_scale.recipe.schema import EvaluationRecipe, load_recipe
from lst_scale.runs.logs import Logger
from lst_scale.serving.networks import Networks
from lst_scale.system import distributed
from lst_scale.training.evaluation import generated, label_scores
from lst_scale.training.preflight import check_before_start
from lst_scale.training.sessions import EVALUATION, Moment, run_alone
from lst_scale.training.shared import load_data, load_shared

KINDS = ["act", "artifact", "attribute", "cognition", "communication", "food", "person", "state"]
SYSTEM = "Say what kind of thing it is."


def wordnet(split: str, count: int) -> list[dict[str, str]]:
    return [json.loads(line) for line in (EMBEDDED / f"wordnet/{split}.jsonl").read_text().splitlines()[:count]]


def as_talks(rows: list[dict[str, str]]) -> list[dict[str, Any]]:
    """Return conversations of two questions each."""
    pairs = zip(rows[::2], rows[1::2], strict=True)
    return [{"messages": turns(one["definition"], one["kind"], other["definition"], other["kind"])} for one, other in pairs]


def as_prompts(rows: list[dict[str, str]]) -> list[dict[str, Any]]:
    return [{"prompt": f"{row['definition']} It is a kind of:", "completion": f" {row['kind']}"} for row in rows]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_chat_model(tmp_path_factory.mktemp("chat"))


@pytest.fixture
def write(model: Path, tmp_path: Path) -> Callable[..., Path]:
    def write(name: str, form: str = "messages", checkpoint: Path = model, **changes: Any) -> Path:
        make = as_talks if form == "messages" else as_prompts
        files = {split: str(write_rows(tmp_path / f"{form}-{split}.jsonl", make(wordnet(split, 12)))) for split in ("train", "validation")}
        columns = {"messages": "messages"} if form == "messages" else {"prompt": "prompt", "completion": "completion"}
        blank = "" if form == "messages" else " "
        task = {"name": "kind", "kind": "classification", "labels": [f"{blank}{kind}" for kind in KINDS]} | files | columns
        common = {"task": task, "method": METHOD, "data__max_source_length": 48, "evaluation__method": "likelihood"}
        common |= {"training__evaluate_every": 4, "optimizer__learning_rate": 3e-3}
        return recipe_writer(tmp_path, checkpoint)(name, **(common | changes))

    return write


def test_conversations_from_the_tap_cache_after_a_context_end_as_the_live_run(write: Callable[..., Path], tmp_path: Path) -> None:
    common: dict[str, Any] = {"data__shuffle_seed": 0, "backbone__context": {"text": SYSTEM, "examples": 2}}
    cached = common | {"cache": {"enabled": True, "dtype": "fp32", "folder": str(tmp_path / "taps")}}
    train(write("live", **common), write("first", **cached), write("second", **cached))
    live, first, second = (tmp_path / "runs" / f"{name}-kind-seed0" for name in ("live", "first", "second"))
    for folder in (first, second):
        assert_same_weights(folder, final_weights(live))
        assert result(folder)["scores"] == result(live)["scores"]
    assert result(second)["cache"]["rows_run"] < result(first)["cache"]["rows_run"]
    assert result(live)["context"].startswith(f"<s><|system|>{SYSTEM}<|end|><|user|>") and result(live)["conversational"] is True
    assert "training rows" in (live / "log.txt").read_text()


@pytest.mark.parametrize("form", ["messages", "prompt"])
@pytest.mark.parametrize("answers", ["generation", "likelihood"])
def test_a_finished_run_answers_a_file_as_it_was_scored(form: str, answers: str, write: Callable[..., Path], tmp_path: Path) -> None:
    changes: dict[str, Any] = {"backbone__context": {"text": SYSTEM}} if form == "messages" else {}
    folder = trained(write("scored", form, evaluation__method=answers, training__epochs=6, **changes))
    rows = wordnet("validation", 12)[:7] if form == "prompt" else wordnet("validation", 12)
    if form == "prompt":
        asked, expected = [{"prompt": row["prompt"]} for row in as_prompts(rows)], [row["kind"] for row in rows]
    else:  # the first answer is asked for by a conversation that ends with its question, the second stands at its end and is not looked at
        talks = [talk["messages"] for talk in as_talks(rows)]
        asked = [{"messages": part} for talk in talks for part in (talk[:1], talk)][:7]
        expected = [row["kind"] for row in rows][:7]
    write_rows(tmp_path / "in.jsonl", asked)
    assert predict_file([folder], tmp_path / "in.jsonl", tmp_path / "out.jsonl", probabilities=True) == 7
    said = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert [{key: row[key] for key in asked[0]} for row in said] == asked
    right = 100 * sum(row["prediction"] == kind for row, kind in zip(said, expected, strict=True)) / 7
    assert right == pytest.approx(result(folder)["scores"]["accuracy"], abs=0.01)
    assert set(said[0]["probabilities"]) == set(KINDS)
    card = (folder / "side_network" / "README.md").read_text()
    assert ('{"messages": [{"role": "user", "content": "..."}]}' if form == "messages" else '{"prompt": "..."}') in card
    write_rows(tmp_path / "bad.jsonl", [{"messages": turns("a", "b")[1:]} if form == "messages" else {"prompt": ["a"]}])
    told = r"bad.jsonl: row 1 has no turn of the user" if form == "messages" else "bad.jsonl: row 1: prompt holds a list"
    with pytest.raises(DataError, match=told):
        predict_file([folder], tmp_path / "bad.jsonl", tmp_path / "no.jsonl")


def test_a_served_side_network_reads_a_conversation_as_it_was_trained(write: Callable[..., Path], model: Path) -> None:
    folder = trained(write("served", training__epochs=1, backbone__context={"text": SYSTEM}))
    data = load_data(load_recipe(str(folder / "recipe.yaml")))
    tokenizer = load_tokenizer(str(model))
    networks = Networks(load_backbone(str(model), revision=None, precision="fp32"), tokenizer)
    network = networks.add("kinds", folder)
    talk, split = as_talks(wordnet("validation", 12))[0]["messages"], data.tasks[0].splits["validation"]
    for number, part in enumerate((talk[:1], talk[:3])):
        expected = tuple(split.input_ids[number].tolist())
        assert network.prompt(network.text_of({"messages": part})) == expected
        assert network.conversation(part) == expected
    assert network.context == data.reading.run_once and network.end == tokenizer.convert_tokens_to_ids("<|end|>")
    assert networks.bare.conversation(talk[:1]) == tuple(
        tokenizer.apply_chat_template(talk[:1], add_generation_prompt=True, return_dict=False)
    )


def test_a_pipeline_answers_conversations_as_predict_does(write: Callable[..., Path], tmp_path: Path) -> None:
    task = {"task__kind": "text", "task__labels": None, "evaluation__method": "generation"}
    folder = trained(write("said", training__epochs=6, backbone__context={"text": SYSTEM}, data__max_source_length=120, **task))
    talks = [talk["messages"][:3] for talk in as_talks(wordnet("validation", 12))]
    write_rows(tmp_path / "in.jsonl", [{"messages": talk} for talk in talks])
    predict_file([folder], tmp_path / "in.jsonl", tmp_path / "out.jsonl")
    expected = [json.loads(line)["prediction"] for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    with lst_scale.pipeline(folder) as answer:
        assert answer(talks) == answer([{"messages": talk} for talk in talks]) == expected and answer(talks[0]) == expected[0]
        assert "".join(answer.stream(talks[1])) == expected[1]
        with pytest.raises(ArgumentError, match="this run reads conversations: give a list of messages, or a dictionary with messages"):
            answer("a text")
        with pytest.raises(DataError, match="inputs: row 2 begins with the assistant's turn"):
            answer([talks[0], talks[0][1:]])


def test_members_on_conversations_share_the_pass(write: Callable[..., Path], tmp_path: Path) -> None:
    train(write("both", members=["seed=0", "seed=1"], data__shuffle_seed=0))
    alone = trained(write("alone", seed=1, data__shuffle_seed=0))
    (together,) = (tmp_path / "runs").glob("both*seed1")
    assert_same_weights(together, final_weights(alone))


def test_methods_inside_the_model_and_encoder_decoders_take_them_too(write: Callable[..., Path], tmp_path: Path) -> None:
    """LoRA on conversations after a system message, which begins each row there; prompts with completions beside a T5."""
    lora = write("lora", method={"name": "lora", "rank": 2, "targets": ["q_proj"]}, backbone__context={"text": SYSTEM}, training__epochs=1)
    t5 = make_t5(tmp_path / "t5", dropout_rate=0.0)
    ladder = {"name": "lst", "reduction_factor": 4, "side_layers": [0, 2]}
    completed = write("t5", "prompt", t5, method=ladder, training__epochs=1)
    train(lora, completed)
    for name in ("lora", "t5"):
        folder = tmp_path / "runs" / f"{name}-kind-seed0"
        assert all(torch.isfinite(torch.tensor(loss)) for loss in losses(folder)) and "accuracy" in result(folder)["scores"]
    row = write_rows(tmp_path / "in.jsonl", as_prompts(wordnet("validation", 1)))
    assert predict_file([tmp_path / "runs" / "t5-kind-seed0"], row, tmp_path / "out.jsonl") == 1
    assert json.loads((tmp_path / "out.jsonl").read_text())["prediction"] in KINDS


def test_all_labels_of_several_tokens_are_scored_on_one_reading_of_the_prompt(write: Callable[..., Path]) -> None:
    """And are what transformers computes of the whole conversation, at a ladder that starts as its backbone."""
    recipe = load_recipe(str(write("counted")))
    with Logger(None) as logger:
        shared = load_shared([recipe], distributed.connect(), logger)
    passes: list[int] = []
    shared.backbone.blocks[0][0].register_forward_hook(lambda _block, given, _output: passes.append(given[0].shape[1]))
    model = LadderModel(shared.backbone, LadderConfig(reduction_factor=8, side_layers=[1, 3], start_as_backbone=True)).eval()
    tokenizer, split = shared.tasks[0].tokenizer, shared.tasks[0].splits["validation"]
    (batch, *_) = evaluation_batches(split, batch_size=4, rank=0, world_size=1)
    labels = ["person", "a kind of food", "something that was made"]
    scores = run_alone(label_scores(model, batch, tokenizer, labels), shared.passes)
    lengths = [len(tokenizer(text_target=label).input_ids) for label in labels]
    assert len(set(lengths)) == 3 and min(lengths[1:]) > 3, "labels of several tokens"
    assert passes == [batch.input_ids_BS.shape[1] - 1, *lengths], "the prompt once, then each label"
    llm = AutoModelForCausalLM.from_pretrained(recipe.backbone.checkpoint, dtype=torch.float32).eval()
    talk = as_talks(wordnet("validation", 12))[0]["messages"]
    row = batch.indices.index(0)
    for number, label in enumerate(labels):
        whole = AutoTokenizer.from_pretrained(recipe.backbone.checkpoint).apply_chat_template(
            [talk[0], {"role": "assistant", "content": label}], return_tensors="pt", return_dict=False
        )[:, :-1]
        with torch.no_grad():
            likely = llm(whole).logits.log_softmax(-1)[0, :-1].gather(-1, whole[0, 1:, None])[-lengths[number] :].sum()
        torch.testing.assert_close(scores[row, number], likely, rtol=1e-4, atol=1e-4)


def test_generation_ends_where_the_template_ends_an_answer(write: Callable[..., Path]) -> None:
    """Not at the token that ends a text alone, which such a model never writes."""
    recipe = load_recipe(str(write("ends")))
    with Logger(None) as logger:
        shared = load_shared([recipe], distributed.connect(), logger)
    model = LadderModel(shared.backbone, LadderConfig(reduction_factor=8, side_layers=[1, 3], start_as_backbone=True)).eval()
    tokenizer, split = shared.tasks[0].tokenizer, shared.tasks[0].splits["validation"]
    assert tokenizer.eos_token_id != model.spec.eos_token_id
    (batch, *_) = evaluation_batches(split, batch_size=1, rank=0, world_size=1)

    def said(end: int | None, most: int) -> str:
        way = tokenizer.way.__class__(begins_texts=False, as_written=True, end=end)
        asked = EvaluationRecipe(max_new_tokens=most)
        (text,) = run_alone(generated(model, batch, in_way(tokenizer, way), asked, 1, at=Moment(0, EVALUATION)), shared.passes)
        return text

    ids_BS, mask_BS = batch.input_ids_BS, batch.attention_mask_BS
    free = model.generate(ids_BS, attention_mask=mask_BS, max_new_tokens=12, do_sample=False)[0, ids_BS.shape[1] :].tolist()
    place = next(number for number in range(2, 12) if free[number] not in free[:number])
    assert said(free[place], 12) == answer_in(tokenizer.decode(free[: place + 1], skip_special_tokens=True), "")
    assert said(None, 12) != said(free[place], 12)


@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("model.gguf", r"model.gguf is a GGUF file: write lst-scale from-gguf .*model.gguf FOLDER first, and that folder here"),
        ("mamba", r"mamba is a 'mamba' model: choose a checkpoint of type .*llama"),
        ("qwen3_next", r"qwen3_next is a 'qwen3_next' model: choose a checkpoint of type .*llama"),  # linear attention
        ("gemma3n_text", r"gemma3n_text is a 'gemma3n_text' model: choose a checkpoint of type .*llama"),  # several residual streams
    ],
)
def test_a_gguf_file_or_an_unknown_family_as_a_checkpoint_is_one_line(
    name: str, told: str, write: Callable[..., Path], tmp_path: Path
) -> None:
    path = tmp_path / name
    if not name.endswith(".gguf"):
        save_chat_model(path)
        config = json.loads((path / "config.json").read_text()) | {"model_type": name}
        (path / "config.json").write_text(json.dumps(config))
    else:
        path.write_bytes(b"GGUF")
    with pytest.raises(NotReady, match=told) as caught:
        check_before_start([load_recipe(str(write("no", checkpoint=path)))], resume=False)
    assert "\n" not in str(caught.value)
