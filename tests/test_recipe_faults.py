"""What a recipe may not say, however it is written: one line each, and at once."""
# ruff: noqa: E501, tables of cases

from __future__ import annotations

import json
import time
from pathlib import Path

import pytest

from lst_scale.errors import RecipeError
from lst_scale.recipe.grid import expand
from lst_scale.recipe.members import load_members, members_of, read_list
from lst_scale.recipe.schema import load_recipe, parse_recipe
from lst_scale.system.assets import load_ds_config
from lst_scale.system.names import LONGEST_NAME, fitting_name

RECIPE = """
name: t
task: rte
backbone: {checkpoint: x}
method: {name: lst}
"""
TASK = "task: {kind: classification, train: t.csv, validation: v.csv, source: [x], target: y, labels: [a, b]}"
OWN_DATA = RECIPE.replace("task: rte", TASK)
NO_NAMES = ["", ".", "..", "../victim", "a/b", "/etc", "-rf", ".hidden", "a b", "a\nb", "a\n", "\x00", "<img src=x>", "ä", "x" * 300]
NO_PATHS = ["", " ", "/x/o\ntouch FILE #", "a\x00b", "a\x1b[2J", "a\u2028b", "a\x85b", "/" + "x" * 300, "/tmp/" + "x/" * 2500]
PATHS = ["output_dir", "backbone.checkpoint", "cache.folder", "training.deepspeed", "task.train", "task.validation", "task.test"]


def mistake(text: str, *overrides: str) -> str:
    """Return the message of a recipe that is refused."""
    with pytest.raises(RecipeError) as caught:
        parse_recipe(text, "t.yaml", overrides)
    return str(caught.value)


@pytest.mark.parametrize("name", NO_NAMES, ids=repr)
@pytest.mark.parametrize("key", ["name", "task.name"])
def test_what_names_a_folder_can_not_leave_it(key: str, name: str) -> None:
    message = mistake(OWN_DATA, f"{key}={json.dumps(name)}")
    assert message.startswith(f"{key}: ") and "\n" not in message and len(message) < 250


@pytest.mark.parametrize("path", NO_PATHS, ids=lambda path: repr(path[:12]))
@pytest.mark.parametrize("key", PATHS)
def test_a_path_holds_no_control_character_and_fits_a_file_system(key: str, path: str) -> None:
    message = mistake(OWN_DATA, f"{key}={json.dumps(path)}")
    assert message.startswith(f"{key}: ") and "\n" not in message and len(message) < 250


@pytest.mark.parametrize("path", ["runs", "/a b/ü/日本", "../x", "~/y", "a'b\"c;d$(e)", "C:\\x"])
def test_a_path_may_be_any_plain_text(path: str) -> None:
    assert parse_recipe(RECIPE, "t.yaml", [f"output_dir={json.dumps(path)}"]).output_dir == path


@pytest.mark.parametrize("name", NO_NAMES, ids=repr)
def test_a_recipe_is_not_renamed_to_what_it_could_not_be_called(name: str) -> None:
    with pytest.raises(RecipeError, match=r"^name: "):
        parse_recipe(RECIPE, "t.yaml").renamed(name)


def test_the_name_of_a_member_is_fit_for_a_folder_whatever_its_values(tmp_path: Path) -> None:
    (tmp_path / "t.yaml").write_text(RECIPE)
    values = ["../x", "/" + "y" * 200, "/" + "y" * 201, "ü"]
    members = load_members(str(tmp_path / "t.yaml"), [[f"backbone.checkpoint={value}"] for value in values])
    names = [each.renamed(each.name).name for each in members]
    assert len(set(names)) == len(values) and max(map(len, names)) <= LONGEST_NAME


@pytest.mark.parametrize("text", ["a/../../b", "x" * 400, "__a__", "..a", "a=b,c"])
def test_a_fitting_name_is_a_name(text: str) -> None:
    assert parse_recipe(RECIPE, "t.yaml").renamed(fitting_name(text)).name == fitting_name(text)


BOMB = "a0: &a0 [1, 1, 1, 1, 1, 1, 1, 1, 1, 1]\n" + "".join(f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 10)}]\n" for i in range(1, 9))
NESTED = "[" * 3000 + "]" * 3000
BROKEN = {
    "an alias bomb": BOMB,
    "an alias within itself": "a: &a [*a]",
    "a mapping within itself": "a: &a {b: *a}",
    "nested too deeply": f"a: {NESTED}",
    "nested mappings": "{a: " * 2000 + "1" + "}" * 2000,
    "a merge key": "x: &x {a: 1}\ny: {<<: *x, b: 2}",
    "a merge of nothing": "<<: 1",
    "a list as a key": "? [a]\n: 1",
    "a mapping as a key": "? {a: 1}\n: 1",
    "a number as a key": "1: 2",
    "true as a key": "true: 2",
    "a date as a key": "2020-01-01: 2",
    "null as a key": "~: 2",
    "NUL": "a: 'x\x00y'",
    "a control character": "a: \x07",
    "no date": "a: 2020-13-45",
    "no time": "a: 2020-01-01 99:99:99",
    "half a number": "a: 0b_",
    "a tag that does not fit": "a: !!int abc",
    "a float that does not fit": "a: !!float x",
    "bytes that do not fit": "a: !!binary x",
    "a foreign tag": "a: !!python/object/apply:os.system [true]",
    "an unknown tag": "a: !x 1",
    "5000 digits": f"a: {'9' * 5000}",
    "two documents": "a: 1\n---\nb: 2",
    "an unknown alias": "a: *b",
    "a tab": "a:\n\t- 1",
    "an open quote": 'a: "x',
    "text alone": "x",
    "nothing": "",
    "a comment": "# x",
    "a long one": "# " + "x" * 300_000,
    "a set": "!!set {a}",
}


@pytest.mark.parametrize("text", BROKEN.values(), ids=BROKEN)
def test_broken_yaml_is_one_line_at_once(text: str) -> None:
    start = time.process_time()
    message = mistake(text)
    assert message.startswith("t.yaml:") and "\n" not in message and len(message) < 400, message
    assert time.process_time() - start < 5  # tenths of a second; an alias bomb followed takes minutes


@pytest.mark.parametrize("text", [text[3:] for text in BROKEN.values() if text.startswith("a: ")], ids=lambda text: text[:20])
def test_a_broken_value_on_the_command_line_is_one_line(text: str) -> None:
    message = mistake(RECIPE, f"seed={text}")
    assert message.startswith("seed: ") and "\n" not in message and len(message) < 400, message


@pytest.mark.parametrize(
    "override", ["method.name.x=1", "task.name.x=1", "backbone.placement.name.x=1", "seed.x=1", "a..b=1", ".=1", "=1", "a", "x" * 9999, "é\n=1",
                 "method.name={a: 1}", "method=[1]", "method.name=[lst]", "method.name=1", "method=", "name={a: 1}", "task=[1]", "task={}", "members={}",
                 "members={1: [2]}", "members={seed: 1}", "members=[]", "members=[1]", "members=x", "seed=true", "name=1", "name=2020-01-01",
                 'task.prefix="\\ud800"', "backbone={checkpoint: x, ? [1] : 2}", f"method.side_layers={[*range(5000), 1]}"]
)  # fmt: skip
def test_a_mistaken_override_is_one_line_a_mistake(override: str) -> None:
    lines = mistake(OWN_DATA, override).split("\n       ")
    assert all("\n" not in line and len(line) < 400 and line.isprintable() for line in lines)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("näme: x".encode("latin-1"), "byte 2 is not UTF-8 text: save the file as UTF-8"),
        (RECIPE.encode("utf-16"), "byte 1 is not UTF-8 text: save the file as UTF-8"),
        (b"\x80" * 100, "byte 1 is not UTF-8 text"),
        (b"#" * 1_000_000, "1,000,000 bytes, and 200,000 characters are read"),
    ],
)
def test_a_recipe_that_is_no_text_is_one_line_that_names_it(content: bytes, message: str, tmp_path: Path) -> None:
    (tmp_path / "r.yaml").write_bytes(content)
    with pytest.raises(RecipeError) as caught:
        load_recipe(str(tmp_path / "r.yaml"))
    assert str(caught.value).startswith(f"{tmp_path / 'r.yaml'}: {message}") and "\n" not in str(caught.value)


def test_a_recipe_that_windows_marked_as_utf_8_is_read(tmp_path: Path) -> None:
    (tmp_path / "r.yaml").write_text(RECIPE, encoding="utf-8-sig")
    assert load_recipe(str(tmp_path / "r.yaml")).name == "t"


@pytest.mark.parametrize("name", ["x" * 5000, "a\x00b", "\n", "", "/proc/self/mem/x"], ids=repr)
def test_a_recipe_of_an_impossible_name_is_one_line(name: str) -> None:
    with pytest.raises(RecipeError) as caught:
        load_recipe(name)
    assert str(caught.value).startswith("--recipe: ") and "\n" not in str(caught.value) and len(str(caught.value)) < 600


TOO_MUCH = [
    *((key, value) for key in ("seed", "data.shuffle_seed") for value in ("4294967296", str(2**62), str(2**64), "9" * 4000, "1e30", ".nan")),
    *((f"optimizer.{key}", value) for key in ("learning_rate", "epsilon", "weight_decay", "max_grad_norm") for value in (".inf", ".nan", "1e38")),
    *(("optimizer.warmup", value) for value in (".nan", ".inf", "-.inf", "1e30", "10000000000", "-1")),
    *(("optimizer.betas", value) for value in ("[.nan, 0.9]", "[0.9, .inf]", "[0.9, 1]")),
    *((f"data.{key}", value) for key in ("max_source_length", "max_target_length", "max_train_rows") for value in ("1e30", "1" + "0" * 30, ".inf")),
    *((f"method.{key}", "1000000000") for key in ("side_heads", "downsample_rank", "reduction_factor")),
    *(("method.dropout", value) for value in (".nan", "-0.1", ".inf")),
    *(("evaluation.num_beams", value) for value in ("5000", "100000")),
    *(("evaluation.max_new_tokens", value) for value in ("1e30", "1" + "0" * 30, "1000000000")),
    *((f"training.{key}", "1" + "0" * 30) for key in ("epochs", "max_steps", "global_batch_size", "micro_batch_size", "keep_checkpoints", "save_every_steps", "evaluate_every", "patience")),
    ("backbone.precision", "1"),
    ("logging.log_every_steps", "1" + "0" * 30),
]  # fmt: skip


@pytest.mark.parametrize(("key", "value"), TOO_MUCH, ids=[f"{key}={value[:12]}" for key, value in TOO_MUCH])
def test_a_number_without_sense_is_refused_with_what_would_have(key: str, value: str) -> None:
    message = mistake(RECIPE, f"{key}={value}")
    assert message.startswith(f"{key}") and "\n" not in message and len(message) < 300, message


def test_the_greatest_number_is_said() -> None:
    assert mistake(RECIPE, "evaluation.num_beams=5000") == "evaluation.num_beams: 5000 should be less than or equal to 256"
    assert mistake(RECIPE, "optimizer.learning_rate=.inf") == "optimizer.learning_rate: inf should be a finite number"


@pytest.mark.parametrize(
    "choice", [{"seed": list(range(100)), "data.max_train_rows": list(range(1, 101)), "data.max_eval_rows": list(range(1, 101))}]
)
def test_a_million_members_are_refused_without_being_made(choice: dict[str, list[int]]) -> None:
    assert "members: 1,000,000 members, and 1,000 are the most" in mistake(RECIPE, f"members={json.dumps(choice)}")
    with pytest.raises(RecipeError, match="1,000,000 members, and 1,000 are the most"):
        expand([f"{key}={','.join(map(str, values))}" for key, values in choice.items()])
    with pytest.raises(RecipeError, match=r"1,001 of them, and 1,000 are the most"):
        members_of(parse_recipe(RECIPE, "t.yaml", ["members=" + json.dumps(["seed=1"] * 1001)]))


@pytest.mark.parametrize(
    ("members", "message"),
    [
        (["members=[seed=1]"], "a member has no members of its own"),
        (["'members={seed: [1, 2]}'"], "a member has no members of its own"),
        (['seed="0'], "no closing quotation"),
        (["seed"], "'seed' is no override"),
        (["name=../x"], "name: '../x' names a folder"),
    ],
)
def test_a_mistaken_member_is_one_line(members: list[str], message: str) -> None:
    with pytest.raises(RecipeError) as caught:
        members_of(parse_recipe(RECIPE, "t.yaml", [f"members={json.dumps(members)}"]))
    assert message in str(caught.value) and "\n" not in str(caught.value)
    with pytest.raises(RecipeError, match=r"line 2: .seed='0.: no closing quotation"):
        read_list("seed=1\nseed='0")


def test_a_comment_begins_where_it_begins_in_a_shell() -> None:
    lines = "# one\ntraining.start_from=runs/a#2/x seed=1  # two 'three\nname='b # c' seed=2\n\nname=\"d #\" # e\n  #"
    assert read_list(lines) == [["training.start_from=runs/a#2/x", "seed=1"], ["name=b # c", "seed=2"], ["name=d #"]]


@pytest.mark.parametrize(
    "content",
    [b"", b"{", b"[]", b"3", b"\xff\xfe", b"[" * 100_000, b'{"a": ' + b"9" * 5000 + b"}", b'{"zero_optimization": 3}', b'{"zero_optimization": {"stage": "banana"}}',
     b'{"zero_optimization": {"stage": 4}}', b'{"zero_optimization": {"stage": true}}', b'{"zero_optimization": null}', b'{"zero_optimization": {"stage": 2.0}}'],
)  # fmt: skip
def test_a_deepspeed_file_that_can_not_be_meant_is_one_line(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "ds.json").write_bytes(content)
    with pytest.raises(RecipeError) as caught:
        load_ds_config(str(tmp_path / "ds.json"))
    assert str(caught.value).startswith(f"training.deepspeed: {tmp_path / 'ds.json'}") and "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["lora", "full", "prompt", "adapters", "bitfit"])
def test_another_method_by_name_drops_what_only_the_old_one_has(name: str) -> None:
    text = RECIPE.replace("{name: lst}", "{name: lst, side_layers: [1, 2], normalize_taps: true, precision: bf16}")
    method = parse_recipe(text, "t.yaml", ["method.gradient_checkpointing=true", f"method.name={name}"]).method
    assert (method.name, method.precision) == (name, "bf16")
    assert parse_recipe(text, "t.yaml", ["method.name=lst"]).method == parse_recipe(text, "t.yaml").method
    assert mistake(text, f"method.name={name}", "method.side_layers=[1]").startswith("method.side_layers: there is no such key")


def test_another_placement_by_name_drops_what_only_the_old_one_has() -> None:
    text = RECIPE.replace("{checkpoint: x}", "{checkpoint: x, placement: {name: streamed, source: disk, folder: /x}}")
    assert parse_recipe(text, "t.yaml", ["backbone.placement.name=zero3"]).backbone.placement.name == "zero3"
