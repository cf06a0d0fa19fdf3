"""Metrics of the release's CLIP-T5 tasks. What they compare an answer with is JSON, since it is more than one text.

| metric | of a row it knows | it is |
| --- | --- | --- |
| vqa_accuracy | the answers of ten people | `vqa_accuracy.py` |
| gqa_accuracy | what each answer is worth | the worth of an answer that is exactly one of them |
| consistency | the sentence, and its truth | share of sentences judged right of all their images; told beside accuracy |
| cider | captions that people wrote | CIDEr (Vedantam et al. 2015), by pycocoevalcap |
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Mapping, Sequence

import numpy as np

from lst_scale.data.measures import Measure
from lst_scale.data.vqa_accuracy import accuracy
from lst_scale.errors import StorageError, fence
from lst_scale.system.extras import require

JAVA, PLAIN = "_ptb", "_plain"  # endings of "cider" in results
# What the tokenizer of the Penn Treebank makes words of and CIDEr then leaves out.
_MARKS = re.compile(r"[^\w\s'-]|--|(?<!\w)['-]|['-](?!\w)")
_CLITIC = re.compile(r"(n't|'(?:s|m|re|ve|ll|d))\b")


def _vqa_accuracy(predictions: list[str], references: list[str]) -> float:
    return float(np.mean([accuracy(said, _human(known)) for said, known in zip(predictions, references, strict=True)]))


def _human(known: str) -> list[str]:
    answers: list[str] = json.loads(known)
    return answers


def _gqa_accuracy(predictions: list[str], references: list[str]) -> float:
    return float(np.mean([json.loads(known).get(said, 0.0) for said, known in zip(predictions, references, strict=True)]))


def _consistency(predictions: list[str], references: list[str]) -> float:
    right: dict[str, bool] = {}
    for said, known in zip(predictions, references, strict=True):
        sentence, truth = json.loads(known)
        right[sentence] = right.get(sentence, True) and said == truth
    return float(np.mean(list(right.values())))


def _cider(predictions: list[str], references: list[str]) -> float:
    require("pycocoevalcap", "captions", asked_by="metric cider")
    from pycocoevalcap.cider.cider import Cider

    expected = {number: json.loads(known) for number, known in enumerate(references)}
    said = {number: [text] for number, text in enumerate(predictions)}
    tokenized = _by_java if tokenizer() == JAVA else _plainly
    found, _ = Cider().compute_score(tokenized(expected), tokenized(said))
    return float(found)


def tokenizer() -> str:
    """Return which tokenizer captions go through here, as results name it: that of published figures needs Java."""
    return JAVA if shutil.which("java") else PLAIN


def _by_java(captions: Mapping[int, Sequence[str]]) -> Mapping[int, list[str]]:
    from pycocoevalcap.tokenizer.ptbtokenizer import PTBTokenizer

    with fence(StorageError, "the tokenizer of CIDEr failed"):
        found: Mapping[int, list[str]] = PTBTokenizer().tokenize(
            {number: [{"caption": " ".join(text.split()) or "."} for text in texts] for number, texts in captions.items()}
        )
        return found


def _plainly(captions: Mapping[int, Sequence[str]]) -> Mapping[int, list[str]]:
    return {number: [words_of(text) for text in texts] for number, texts in captions.items()}


def words_of(text: str) -> str:
    """Return a caption's words: in lower case, without punctuation, clitics apart."""
    return " ".join(_CLITIC.sub(r" \1", _MARKS.sub(" ", text.lower())).split())


RELEASE_MEASURES: dict[str, Measure] = {
    "vqa_accuracy": Measure(_vqa_accuracy, "VQA accuracy against ten human answers."),
    "gqa_accuracy": Measure(_gqa_accuracy, "Worth of an answer that is exactly one of the known ones."),
    "consistency": Measure(_consistency, "Share of sentences judged right of all their images.", is_beside=True),
    "cider": Measure(_cider, "CIDEr against human captions.", suffix=tokenizer),
}
