"""A tokenizer that does not fit, and answers that can't be right: told before the backbone is loaded, never trained on in silence."""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from transformers import ByT5Tokenizer

from helpers.models import make_t5
from lst_scale.data.answers import cuts, refuse_unanswerable, unmatchable_share
from lst_scale.data.encode import encode
from lst_scale.data.tasks import Row, TaskData
from lst_scale.data.tokenizer import known_share, load_tokenizer, refuse_misfit, refuse_unknown_text
from lst_scale.errors import DataError, LstScaleError
from lst_scale.recipe.schema import DataRecipe, EvaluationRecipe, Recipe, load_recipe
from lst_scale.training import shared

BASE = "embedded:tiny-t5"


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return load_tokenizer(BASE)


def task_of(labels: Sequence[str] | None, *, kind: str = "classification", prefix: str = "", test: Sequence[str] | None = None) -> TaskData:
    rows = [Row("a source", label) for label in labels or ()]
    return TaskData(
        name="t",
        kind=kind,
        labels=tuple(labels) if labels is not None and kind == "classification" else None,
        target_prefix=prefix,
        metrics=("accuracy",),
        epochs=1,
        train=rows,
        validation=rows,
        test=None if test is None else [Row("a", target) for target in test],
    )


def refusal(labels: Sequence[str], tokenizer: Any, *, prefix: str = "", data: dict[str, Any] | None = None, **evaluation: Any) -> str:
    with pytest.raises(DataError) as caught:
        refuse_unanswerable(
            task_of(labels, prefix=prefix),
            tokenizer,
            DataRecipe.model_validate(data or {}),
            EvaluationRecipe.model_validate(evaluation),
        )
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize(
    ("label", "back"),
    [
        ("New  York", "write 'New York' in the data"),
        ("act ", "write 'act' in the data"),
        (" act", "write 'act' in the data"),
        ("a\nb", "write 'a b' in the data"),
        ("a\tb", "write 'a b' in the data"),
        ("\N{LATIN SMALL LIGATURE FI}t", "write 'fit' in the data"),
        ("e\N{COMBINING ACUTE ACCENT}", "write 'é' in the data"),
        ("Ä", "write the label in letters that the tokenizer knows"),
        ("日", "write the label in letters that the tokenizer knows"),
        ("</s>", "write the label in letters that the tokenizer knows"),
        ("<pad>", "write the label in letters that the tokenizer knows"),
        ("<extra_id_0>", "write the label in letters that the tokenizer knows"),
        ("\u200b", "write the label in letters that the tokenizer knows"),
    ],
)
def test_a_label_that_the_tokenizer_changes_is_refused_by_name(label: str, back: str, tokenizer: Any) -> None:
    line = refusal(["artifact", label], tokenizer)
    assert f"label {label!r} comes back as" in line and back in line


def test_labels_that_survive_are_taken(tokenizer: Any) -> None:
    labels = ["artifact", "New York", "<=50K", ">50K", "0", "1", "3.5", "very positive", "don't know", "A.B", "é", "True"]
    for prefix in ("", "<extra_id_0>", "answer:"):
        refuse_unanswerable(task_of(labels, prefix=prefix), tokenizer, DataRecipe(), EvaluationRecipe())


def test_a_changed_label_beside_its_image_is_not_told_to_become_it(tokenizer: Any) -> None:
    assert "in letters that the tokenizer knows" in refusal(["New York", "New  York"], tokenizer)


def test_many_changed_labels_are_told_in_one_short_line(tokenizer: Any) -> None:
    line = refusal([f"label  {number}" + "x" * 100 for number in range(50)], tokenizer)
    assert "(and 47 more)" in line and len(line) < 800


@pytest.mark.parametrize("labels", [("日", "本"), ("New York", "New  York"), ("act", "act ")])
def test_labels_with_the_same_tokens_are_refused_for_likelihood_too(labels: tuple[str, str], tokenizer: Any) -> None:
    line = refusal(labels, tokenizer, method="likelihood")
    assert f"labels {labels[0]!r} and {labels[1]!r} are the same to the tokenizer" in line


def test_likelihood_takes_a_label_that_generation_could_not_write(tokenizer: Any) -> None:
    refuse_unanswerable(task_of(["Ä", "b"]), tokenizer, DataRecipe(), EvaluationRecipe(method="likelihood"))


@pytest.mark.parametrize("prefix", ["answer  is", "a\nb", " answer "])
def test_a_target_prefix_that_the_tokenizer_changes_is_named(prefix: str, tokenizer: Any) -> None:
    assert f"task.target_prefix {prefix!r} does not survive the tokenizer" in refusal(["act", "food"], tokenizer, prefix=prefix)


def test_a_label_that_a_limit_cuts_is_refused(tokenizer: Any) -> None:
    labels = ["red apple pie", "red apple cake"]
    needed = max(len(tokenizer(label).input_ids) for label in labels)
    for limit in (1, 2, needed - 1):
        assert f"write {needed} or more" in refusal(labels, tokenizer, data={"max_target_length": limit})
        assert f"write {needed} or more" in refusal(labels, tokenizer, data={"max_target_length": limit}, method="likelihood")
    assert "evaluation.max_new_tokens=1 cuts the label 'red apple" in refusal(labels, tokenizer, max_new_tokens=1)
    refusal(labels, tokenizer, max_new_tokens=needed - 2)
    refuse_unanswerable(task_of(labels), tokenizer, DataRecipe(max_target_length=needed), EvaluationRecipe(max_new_tokens=needed - 1))


def test_the_prefix_counts_where_a_limit_cuts(tokenizer: Any) -> None:
    needed = len(tokenizer("<extra_id_0> act").input_ids)
    assert f"write {needed} or more" in refusal(["act"], tokenizer, prefix="<extra_id_0>", data={"max_target_length": needed - 1})


def test_cut_sources_and_targets_are_counted_by_split(tokenizer: Any) -> None:
    rows = [Row("word " * count, "target " * count) for count in (1, 5, 6, 7, 40)]
    lengths = [len(tokenizer(row.source).input_ids) for row in rows]
    split = encode(rows, tokenizer, lengths[1], lengths[2])
    assert [len(ids) for ids in split.input_ids] == [min(length, lengths[1]) for length in lengths]
    expected = sum(len(tokenizer(row.target).input_ids) > lengths[2] for row in rows)
    assert (split.cut_sources, split.cut_targets) == (3, expected) and expected
    data = DataRecipe(max_source_length=lengths[1], max_target_length=lengths[2])
    whole = encode(rows[:1], tokenizer, 100, None)
    assert cuts({"train": split, "validation": whole}, data) == (
        f"sources cut at data.max_source_length={lengths[1]} tokens: 3 of 5 in train; "
        f"targets cut at data.max_target_length={lengths[2]} tokens: {expected} of 5 in train"
    )
    assert cuts({"validation": whole}, data) is None


def test_counting_what_is_cut_warns_of_nothing(tokenizer: Any, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        encode([Row("word " * 900, "b")], tokenizer, 8, 8)
    assert not caplog.records


def test_a_limit_that_leaves_no_target_is_named() -> None:
    with pytest.raises(DataError, match=r"data\.max_target_length=1 leaves nothing of the target 'b' but its end: write 2 or more"):
        encode([Row("a", "b")], load_tokenizer(BASE), 8, 1)


def test_free_text_that_can_not_be_matched_is_told_by_its_share(tokenizer: Any) -> None:
    task = task_of(["a b", "a  b"], kind="text", test=["fine", "日本"])
    assert unmatchable_share(task, tokenizer) == (
        "50 % of the expected answers of validation and test can't be matched exactly by any answer: 'a  b' comes back from the tokenizer "
        "as 'a b'"
    )
    assert unmatchable_share(task_of(["a b"], kind="text"), tokenizer) is None
    assert unmatchable_share(task_of(["a  b"]), tokenizer) is None


def test_regression_targets_are_matched_as_numbers(tokenizer: Any) -> None:
    assert unmatchable_share(task_of(["0.20", " 1", "-3e5", "7"], kind="regression"), tokenizer) is None


class Without:
    """A tokenizer that lacks some letters."""

    def __init__(self, whole: Any, letters: str) -> None:
        self.whole, self.letters, self.unk_token, self.unk_token_id = whole, letters, "<unk>", -1

    def __call__(self, texts: list[str], **_: Any) -> Any:
        kept = ["".join(letter for letter in text if letter not in self.letters) for text in texts]
        return self.whole(kept, add_special_tokens=False)

    def decode(self, ids: list[int]) -> str:
        return str(self.whole.decode(ids))


def test_a_tokenizer_that_knows_next_to_nothing_of_the_sources_is_refused(tokenizer: Any) -> None:
    assert known_share(tokenizer, ["an English sentence, 12 letters", "<extra_id_0> is one too"]) == 1.0
    for texts in (["日本語の文章"], ["text: 日本語の文章ですとても長い文章です日本語の文章ですとても長い文章です"], ["ประโยคภาษาไทย"]):
        with pytest.raises(DataError, match=r"knows \d+ % of the letters in the training sources, the rest is <unk> to it"):
            refuse_unknown_text(tokenizer, texts * 3, BASE)
    said = refuse_unknown_text(Without(tokenizer, "eat"), ["an easy text at hand"], BASE)
    assert said is not None and "of the letters in the training sources are unknown to the tokenizer of" in said
    assert refuse_unknown_text(tokenizer, ["fine"] * 3, BASE) is None
    assert refuse_unknown_text(tokenizer, ["", "  "], BASE) is None


class Sized:
    def __init__(self, entries: int, largest: int | None = None) -> None:
        self.entries, self.largest = entries, entries - 1 if largest is None else largest

    def __len__(self) -> int:
        return self.entries

    def get_vocab(self) -> dict[str, int]:
        return {"last": self.largest}


@pytest.mark.parametrize(
    ("entries", "embeddings"), [(32100, 32128), (250100, 250112), (384, 384), (32100, 32100), (4096, 4096), (100, 128)]
)
def test_the_sizes_of_t5_mt5_and_byt5_fit(entries: int, embeddings: int) -> None:
    refuse_misfit(Sized(entries), embeddings, "c")


@pytest.mark.parametrize(
    ("entries", "largest", "embeddings", "message"),
    [
        (104, None, 4096, "has 104 entries, but its model has 4096 embeddings"),
        (104, None, 384, "has 104 entries, but its model has 384 embeddings"),
        (32100, None, 250112, "has 32100 entries, but its model has 250112 embeddings"),
        (250100, None, 32128, "has token 250099, but its model has embeddings for 0 to 32127 alone"),
        (100, 128, 128, "has token 128, but its model has embeddings for 0 to 127 alone"),
    ],
)
def test_a_tokenizer_of_another_model_is_refused_by_its_size(entries: int, largest: int | None, embeddings: int, message: str) -> None:
    with pytest.raises(DataError) as caught:
        refuse_misfit(Sized(entries, largest), embeddings, "c")
    assert message in str(caught.value) and "\n" not in str(caught.value)


def test_a_folder_without_a_vocabulary_is_refused_and_one_of_byt5_needs_none(tiny_t5_dir: Path, tmp_path: Path) -> None:
    bare = tmp_path / "bare"
    shutil.copytree(tiny_t5_dir, bare)
    (bare / "tokenizer.json").unlink()
    for _ in ("with its settings", "without them"):
        with pytest.raises(DataError, match=r"bare holds no tokenizer \(tokenizer.json or spiece.model\): copy the tokenizer's files"):
            load_tokenizer(str(bare))
        (bare / "tokenizer_config.json").unlink(missing_ok=True)
    for damage in ("[1]", "{", '"x"'):
        (bare / "tokenizer_config.json").write_text(damage)
        with pytest.raises(DataError):
            load_tokenizer(str(bare))
    ByT5Tokenizer().save_pretrained(bare)
    (bare / "config.json").write_text(json.dumps({"model_type": "t5", "vocab_size": 384}))
    assert load_tokenizer(str(bare))("hé").input_ids == [107, 198, 172, 1]


@pytest.mark.parametrize(
    "damage", ["", "{", "[]", '"x"', "{}", '{"model": 3}', '{"model": {"type": "Unigram", "vocab": [[1, 2]]}}', "\0" * 100]
)
def test_a_damaged_tokenizer_is_one_line(damage: str, tiny_t5_dir: Path, tmp_path: Path) -> None:
    folder = tmp_path / "damaged"
    shutil.copytree(tiny_t5_dir, folder)
    (folder / "tokenizer.json").write_text(damage)
    with pytest.raises(DataError, match=r"the tokenizer of .*damaged could not be loaded: .+") as caught:
        load_tokenizer(str(folder))
    assert "\n" not in str(caught.value)


def prepared(recipe: Recipe, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Load the data as a run does, up to the backbone, and return what was said; loading the backbone is a mistake."""
    said: list[str] = []

    class Reached(Exception):
        pass

    def backbone(*_: Any) -> Any:
        raise Reached

    monkeypatch.setattr(shared, "load_placed", backbone)
    monkeypatch.setattr(shared.distributed, "poll_interruption", lambda world: None)

    class Voice:
        say = staticmethod(said.append)

    with pytest.raises(Reached):
        shared.load_shared([recipe], None, Voice())  # type: ignore[arg-type]
    return said


def test_what_does_not_fit_is_refused_before_the_backbone_is_loaded(
    write_recipe: Callable[..., Path], tiny_t5_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert prepared(load_recipe(str(write_recipe("whole", data__max_source_length=128))), monkeypatch) == []
    bare = tmp_path / "bare"
    shutil.copytree(tiny_t5_dir, bare)
    (bare / "tokenizer.json").unlink()
    small = make_t5(tmp_path / "small", vocab_size=512, num_layers=1, d_model=8, d_ff=8)
    large = make_t5(tmp_path / "large", vocab_size=32128, num_layers=1, d_model=8, d_ff=8)
    japanese = tmp_path / "japanese.jsonl"
    japanese.write_text("".join(json.dumps({"word": "日本", "definition": "日本語の文章です", "kind": "act"}) + "\n" for _ in range(5)))
    cases: list[tuple[dict[str, Any], str]] = [
        ({"backbone__checkpoint": str(bare)}, "holds no tokenizer"),
        ({"backbone__checkpoint": str(small)}, "embeddings for 0 to 511 alone"),
        ({"backbone__checkpoint": str(large)}, "has 4096 entries, but its model has 32128 embeddings"),
        ({"task__train": str(japanese), "task__template": "{word}{definition}"}, "% of the letters in the training sources"),
        ({"data__max_target_length": 1}, "data.max_target_length=1 cuts the label"),
        ({"evaluation__max_new_tokens": 1}, "evaluation.max_new_tokens=1 cuts the label"),
    ]
    for number, (changes, message) in enumerate(cases):
        with pytest.raises(LstScaleError) as caught:
            prepared(load_recipe(str(write_recipe(f"r{number}", **changes))), monkeypatch)
        assert message in str(caught.value) and "\n" not in str(caught.value)


def test_means_of_numbers_are_of_few_that_fit_and_of_numbers_alone(
    write_recipe: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "numbers.jsonl"
    path.write_text("".join(json.dumps({"x": "word " * 4, "y": number / 8}) + "\n" for number in range(300)))
    task = {"train": str(path), "validation": str(path), "source": ["x"], "target": "y"}
    cases: list[tuple[dict[str, Any], str, str]] = [
        ({"kind": "regression"}, "expectation", "and t has more than 256: round them in the data, or write evaluation.method=generation"),
        ({"kind": "text"}, "expectation", "is the mean of numbers, which kind text lacks: write evaluation.method=generation"),
        ({"kind": "classification"}, "expectation", "which kind classification lacks: write evaluation.method=likelihood"),
        (
            {"kind": "regression"},
            "likelihood",
            "needs labels, which kind regression lacks: write evaluation.method=expectation, or generation",
        ),
    ]
    for number, (kind, method, message) in enumerate(cases):
        recipe = load_recipe(
            str(write_recipe(f"m{number}", task={"name": "t"} | task | kind, data__max_train_rows=300, evaluation={"method": method}))
        )
        with pytest.raises(LstScaleError) as caught:
            prepared(recipe, monkeypatch)
        assert message in str(caught.value) and "\n" not in str(caught.value)
    few = {"max_train_rows": 200, "max_source_length": 16}
    named = {"name": "t", "kind": "regression"} | task
    assert prepared(load_recipe(str(write_recipe("few", task=named, data=few, evaluation={"method": "expectation"}))), monkeypatch) == []
    cut = few | {"max_target_length": 2}
    with pytest.raises(LstScaleError, match=r"max_target_length=2 cuts the label"):
        prepared(load_recipe(str(write_recipe("cut", task=named, data=cut, evaluation={"method": "expectation"}))), monkeypatch)


def test_what_is_cut_and_what_can_not_be_matched_is_said_at_the_start(
    write_recipe: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "text.jsonl"
    path.write_text("".join(json.dumps({"x": "word " * 50, "y": target}) + "\n" for target in ("a b", "a  b")))
    task = {"kind": "text", "train": str(path), "validation": str(path), "source": ["x"], "target": "y"}
    said = prepared(load_recipe(str(write_recipe("text", task=task, data={"max_source_length": 8}))), monkeypatch)
    assert said == [
        "sources cut at data.max_source_length=8 tokens: 2 of 2 in train, 2 of 2 in validation",
        "50 % of the expected answers of validation and test can't be matched exactly by any answer: 'a  b' comes back from the tokenizer "
        "as 'a b'",
    ]
