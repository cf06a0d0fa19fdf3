"""One fence at every boundary: whatever a damaged file makes a parser raise becomes one line that names the file."""

from __future__ import annotations

import json

import pytest

from lst_scale.errors import LONGEST_REASON, DataError, LstScaleError, RecipeError, fence
from lst_scale.system.preemption import Interrupted, Request


def deep() -> None:
    json.loads("[" * 200_000)


@pytest.mark.parametrize(
    ("raised", "line"),
    [
        (ValueError("first\nsecond"), "f.json: first"),
        (ValueError(), "f.json: ValueError"),
        (KeyError("step"), "f.json: 'step' is missing"),
        (RecursionError("maximum recursion depth exceeded"), "f.json: nested too deeply"),
        (MemoryError(), "f.json: needs more memory than there is"),
        (IsADirectoryError(21, "Is a directory"), "f.json: Is a directory"),
        (TypeError("\x1b[31mred\x07"), "f.json: ?[31mred?"),
        (type("PanicException", (BaseException,), {})("called unwrap"), "f.json: called unwrap"),
        (UnicodeDecodeError("utf-8", b"\xff", 0, 1, "invalid start byte"), "f.json: not UTF-8 text ("),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, BaseException) else "",
)
def test_every_kind_of_failure_becomes_one_line_that_names_the_file(raised: BaseException, line: str) -> None:
    with pytest.raises(DataError) as caught, fence(DataError, "f.json"):
        raise raised
    assert str(caught.value).startswith(line) and "\n" not in str(caught.value)


def test_nesting_without_end_is_told_and_a_long_reason_is_cut() -> None:
    with pytest.raises(DataError, match=r"f\.json: nested too deeply"), fence(DataError, "f.json"):
        deep()
    with pytest.raises(DataError) as caught, fence(DataError, "f"):
        raise ValueError("x" * 5000)
    assert len(str(caught.value)) < LONGEST_REASON + 10


@pytest.mark.parametrize(
    "error", [RecipeError("mine"), Interrupted(Request.STOP), KeyboardInterrupt(), SystemExit(2), GeneratorExit()], ids=repr
)
def test_our_own_errors_and_requests_to_leave_pass_unchanged(error: BaseException) -> None:
    with pytest.raises(type(error)) as caught, fence(DataError, "f.json"):
        raise error
    assert caught.value is error
    assert not isinstance(error, LstScaleError) or not str(caught.value).startswith("f.json")
