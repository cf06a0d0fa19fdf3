"""Can an answer be right at all? Targets go through a tokenizer and back before they are compared, and not every text survives that.

Two blanks become one, a letter that the vocabulary lacks disappears, a limit cuts. A classification with such a label would train to a
loss of nothing and score nothing, so it is refused; of free text it is told how much of it can't be matched.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from lst_scale.data.columns import by_chunks
from lst_scale.data.encode import AT_ONCE, EncodedSplit, answer_in, target_text
from lst_scale.data.rows import targets_of
from lst_scale.data.tasks import MOST_NUMBERS, TaskData
from lst_scale.errors import DataError, fence, printable
from lst_scale.recipe.schema import DataRecipe, EvaluationRecipe
from lst_scale.recipe.task import method_misfit

TOLD = 3  # labels that a message names


def refuse_unanswerable(task: TaskData, tokenizer: Any, data: DataRecipe, evaluation: EvaluationRecipe) -> None:
    """Refuse labels that no answer could equal, that are cut, or that the tokenizer can't tell apart.

    Raises:
        DataError: names the labels and what to write instead.
    """
    if (misfit := method_misfit(task.kind, evaluation.method)) is not None:
        raise DataError(misfit)
    if evaluation.method == "expectation" and task.numbers is None:
        raise DataError(
            f"evaluation.method=expectation is the mean of the numbers among the training targets, and {task.name} has more than "
            f"{MOST_NUMBERS}: round them in the data, or write evaluation.method=generation"
        )
    labels = task.choices(evaluation.method) or ()
    if not labels:
        return
    ids = _encoded(labels, tokenizer, task.target_prefix)
    _refuse_cut(labels, ids, data, evaluation)
    if evaluation.method == "generation":
        # A completion brings the blank after its prompt along, which is no part of an answer.
        expected = [label.strip() for label in labels] if task.way.as_written else labels
        _refuse_changed(expected, ids, tokenizer, task.target_prefix)
    _refuse_equal(labels, ids)


def unmatchable_share(task: TaskData, tokenizer: Any, method: str = "generation") -> str | None:
    """Return a sentence on the expected answers that no answer of this tokenizer can equal; None: all can be, or need not."""
    if task.choices(method) is not None:
        return None
    expected = [target for name, rows in task.splits().items() if name != "train" for target in targets_of(rows)]
    distinct = list(dict.fromkeys(expected))
    ids = _encoded(distinct, tokenizer, task.target_prefix)
    back = dict(zip(distinct, _decoded(ids, tokenizer, task.target_prefix), strict=True))
    lost = [target for target in expected if not _equal(task.kind, back[target], target.strip())]
    if not lost:
        return None
    return (
        f"{_percent(len(lost), len(expected))} of the expected answers of validation and test can't be matched exactly by any answer: "
        f"{_shown(lost[0])} comes back from the tokenizer as {_shown(back[lost[0]])}"
    )


def cuts(splits: Mapping[str, EncodedSplit], data: DataRecipe) -> str | None:
    """Return a sentence on how many sources and targets were cut; None: none was."""
    sizes = {name: len(split.rows) for name, split in splits.items()}
    parts = []
    for what, limit, counts in (
        ("sources", f"data.max_source_length={data.max_source_length}", {name: split.cut_sources for name, split in splits.items()}),
        ("targets", f"data.max_target_length={data.max_target_length}", {name: split.cut_targets for name, split in splits.items()}),
    ):
        if any(counts.values()):
            parts.append(_cut_sentence(what, limit, counts, sizes))
    return "; ".join(parts) or None


def cut_inputs(count: int, rows: int, data: DataRecipe) -> str | None:
    """The same of inputs without targets."""
    if not count:
        return None
    return _cut_sentence("sources", f"data.max_source_length={data.max_source_length}", {"inputs": count}, {"inputs": rows})


def _cut_sentence(what: str, limit: str, counts: Mapping[str, int], sizes: Mapping[str, int]) -> str:
    each = ", ".join(f"{count:,} of {sizes[name]:,} in {name}" for name, count in counts.items() if count)
    return f"{what} cut at {limit} tokens: {each}"


def _refuse_cut(labels: Sequence[str], ids: Sequence[Sequence[int]], data: DataRecipe, evaluation: EvaluationRecipe) -> None:
    longest = max(range(len(labels)), key=lambda number: len(ids[number]))
    label, needed = _shown(labels[longest]), len(ids[longest])
    if data.max_target_length is not None and needed > data.max_target_length:
        raise DataError(
            f"data.max_target_length={data.max_target_length} cuts the label {label}, which is {needed} tokens long with its end: "
            f"write {needed} or more, or remove it"
        )
    needed -= 1  # a label may be whole without its end
    if evaluation.max_new_tokens is not None and needed > evaluation.max_new_tokens:
        raise DataError(
            f"evaluation.max_new_tokens={evaluation.max_new_tokens} cuts the label {label}, which is {needed} tokens long: "
            f"write {needed + 1} or more, or remove it"
        )


def _refuse_changed(labels: Sequence[str], ids: Sequence[Sequence[int]], tokenizer: Any, prefix: str) -> None:
    back = _decoded(ids, tokenizer, prefix)
    changed = [(label, said) for label, said in zip(labels, back, strict=True) if label != said]
    if not changed:
        return
    alone = _decoded(_encoded(labels, tokenizer, ""), tokenizer, "")
    if prefix and all(label == said for label, said in zip(labels, alone, strict=True)):
        label, said = changed[0]
        raise DataError(
            f"task.target_prefix {_shown(prefix)} does not survive the tokenizer: the label {_shown(label)} comes back as {_shown(said)}; "
            "write the prefix as the tokenizer writes it, or leave it out"
        )
    each = "; ".join(f"label {_shown(label)} comes back as {_shown(said)}" for label, said in changed[:TOLD])
    more = f" (and {len(changed) - TOLD} more)" if len(changed) > TOLD else ""
    label, said = changed[0]
    words = f"write {_shown(said)}" if said and said not in labels else "write the label in letters that the tokenizer knows"
    raise DataError(
        f"no answer could equal what the tokenizer changes: {each}{more}; {words} in the data (and in task.labels), "
        "or evaluation.method=likelihood where labels stay distinct"
    )


def _refuse_equal(labels: Sequence[str], ids: Sequence[Sequence[int]]) -> None:
    first: dict[tuple[int, ...], str] = {}
    for label, tokens in zip(labels, ids, strict=True):
        other = first.setdefault(tuple(tokens), label)
        if other != label:
            raise DataError(
                f"labels {_shown(other)} and {_shown(label)} are the same to the tokenizer, so nothing can tell them apart: "
                "write one of them in other letters, in the data (and in task.labels)"
            )
    stripped: dict[str, str] = {}
    for label in labels:
        if (other := stripped.setdefault(label.strip(), label)) != label:
            raise DataError(f"labels {_shown(other)} and {_shown(label)} differ in blanks alone: write them alike in the data")


def _encoded(targets: Sequence[str], tokenizer: Any, prefix: str) -> list[list[int]]:
    with fence(DataError, "the targets can't be tokenized"):
        parts = by_chunks((target_text(target, prefix) for target in targets), AT_ONCE)
        return [ids for part in parts for ids in tokenizer(text_target=part).input_ids]


def _decoded(ids: Sequence[Sequence[int]], tokenizer: Any, prefix: str) -> list[str]:
    """Return the answers that these tokens are read as, in the way that an evaluation reads them."""
    return [answer_in(text, prefix) for text in tokenizer.batch_decode(list(ids), skip_special_tokens=True)]


def _equal(kind: str, said: str, expected: str) -> bool:
    if kind != "regression":
        return said == expected
    try:
        return float(said) == float(expected)
    except ValueError:
        return False


def _percent(part: int, whole: int) -> str:
    share = 100 * part / whole
    return f"{share:.0f} %" if share >= 1 else f"{share:.2g} %"


def _shown(text: str) -> str:
    shown = printable(repr(text))
    return shown if len(shown) <= 60 else f"{shown[:60]}..."
