"""VQA accuracy as the release's evaluator has it (VL-T5's copy of GT-Vision-Lab's vqaEval.py): an answer is cleaned, then compared with
what ten people said. Its two regular expressions are kept as they are, slips included: `(?!<=\\d)` looks ahead where it should look
behind, and the last argument of the full stop's is a count of 32, not a flag.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

_PERIOD, _MOST_PERIODS = re.compile(r"(?!<=\d)(\.)(?!\d)"), 32
_COMMA = re.compile(r"(\d)(\,)(\d)")
_MARKS = (";", "/", "[", "]", '"', "{", "}", "(", ")", "=", "+", "\\", "_", "-", ">", "<", "@", "`", ",", "?", "!")
_ARTICLES = ("a", "an", "the")
_NUMBERS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
_DIGITS = {word: str(digit) for digit, word in enumerate(_NUMBERS)} | {"none": "0"}
# Words as they are written without an apostrophe, by those that they stand for; what the official table says otherwise comes after.
_PLAIN = """
ain't aren't can't could've couldn't didn't doesn't don't hadn't hasn't haven't he'd he's how'd how'll how's I'm I've
isn't it'd it'll ma'am mightn't might've mustn't must've needn't not've o'clock oughtn't shan't should've shouldn't
that's there'd there're there's they'd they'll they're they've 'twas wasn't we've weren't what'll what're what's what've
when's where'd where's where've who'd who'll who's who've why'll why're why's won't would've wouldn't y'all you'd you'll
you're you've
"""
_TWICE = "couldn't've hadn't've he'd've I'd've it'd've mightn't've shouldn't've there'd've they'd've we'd've who'd've wouldn't've you'd've"
_ODD = {
    "let's": "let's",
    "she's": "she's",
    "ow's'at": "'ow's'at",
    "'ows'at": "'ow's'at",
    "'ow'sat": "'ow's'at",
    "shed've": "she'd've",
    "she'dve": "she'd've",
    "somebody'd": "somebodyd",
    "somebodyd've": "somebody'd've",
    "somebody'dve": "somebody'd've",
    "somebodyll": "somebody'll",
    "somebodys": "somebody's",
    "someoned": "someone'd",
    "someoned've": "someone'd've",
    "someone'dve": "someone'd've",
    "someonell": "someone'll",
    "someones": "someone's",
    "somethingd": "something'd",
    "somethingd've": "something'd've",
    "something'dve": "something'd've",
    "somethingll": "something'll",
    "yall'll": "y'all'll",
    "y'allll": "y'all'll",
    "yall'd've": "y'all'd've",
    "y'alld've": "y'all'd've",
    "y'all'dve": "y'all'd've",
}


def _contractions() -> Mapping[str, str]:
    found = {word.replace("'", ""): word for word in _PLAIN.split()}
    for word in _TWICE.split():  # each may lack either apostrophe
        stem = word.removesuffix("'ve")
        found |= {f"{stem.replace(chr(39), '')}'ve": word, f"{stem}ve": word}
    return found | _ODD


CONTRACTIONS = _contractions()


def cleaned(answer: str) -> str:
    """Return an answer of a model as it is compared."""
    words = without_marks(answer.replace("\n", " ").replace("\t", " ").strip()).lower().split()
    kept = [_DIGITS.get(word, word) for word in words]
    return " ".join(CONTRACTIONS.get(word, word) for word in kept if word not in _ARTICLES)


def without_marks(text: str) -> str:
    """Return a text without punctuation: a mark beside a blank goes, one within a word becomes a blank."""
    out = text
    for mark in _MARKS:
        beside_blank = f"{mark} " in text or f" {mark}" in text
        out = out.replace(mark, "" if beside_blank or _COMMA.search(text) else " ")
    return _PERIOD.sub("", out, count=_MOST_PERIODS)


def accuracy(answer: str, human: Sequence[str]) -> float:
    """Return what an answer is worth: for each person a third for every other one who said it, 1 at most; the mean over people."""
    said = cleaned(answer)
    if len(set(human)) > 1:
        human = [without_marks(each) for each in human]
    matching = sum(each == said for each in human)
    return sum(min(1.0, (matching - (each == said)) / 3) for each in human) / len(human)
