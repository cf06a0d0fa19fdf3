"""Rows of the release's CLIP-T5 tasks, read from its own files (recipe/release.py says which). An answer that is drawn anew each epoch is a
row for each answer that may be drawn; rows of one question follow one another and have its number.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from lst_scale.data import files
from lst_scale.data.pictures import picture_of
from lst_scale.data.rows import Row, keep_rows, known_rows
from lst_scale.errors import DataError, fence, printable
from lst_scale.recipe.release import COCO_SPLITS, FORMAT, ReleaseTask
from lst_scale.recipe.vision import STORED, VisionRecipe

LEAST_BYTES = 200_000  # of a file that may hold as many rows as are kept in a table
PICTURES = (".jpg", ".jpeg", ".png")
FEATURES = (".h5",)
ANNOTATIONS = "v2_mscoco_*2014_annotations.json"


def endings_of(vision: VisionRecipe | None) -> tuple[str, ...]:
    """Return how the names of images' files may end."""
    return FEATURES if vision is not None and vision.image_model == STORED else PICTURES


def release_rows(task: ReleaseTask, split: str, endings: Sequence[str], at_most: int | None = None) -> Sequence[Row] | None:
    """Return the rows of a split, those of its first `at_most` questions; None: the release has no such split. Many are kept in a table.

    Raises:
        DataError: a file is missing or is no such file, or a row is wrong; names it.
    """
    if split not in task.of.files:
        return None
    rows = _rows(task, split, endings)
    if at_most is not None:
        return list(_of_first_questions(rows, at_most))
    paths = [_path(task, name) for name in task.of.files[split]]
    states = files.states_of(paths)
    beside = ("images", *(("scores", "questions") if _draws(task, split) else ("references",) if split != "train" else ()))
    key = {"release": task.model_dump(mode="json"), "split": split, "files": states, "endings": list(endings), "folder": os.getcwd()}
    size = sum(state[1] for state in states)
    known = known_rows(key, beside) if size > LEAST_BYTES else None
    tally = task.of.kind == "classification"
    return known or keep_rows(rows, lambda: key, tally=tally, likely_bytes=size, beside=beside)


def _of_first_questions(rows: Iterator[Row], count: int) -> Iterator[Row]:
    for number, row in enumerate(rows):
        if (number if row.question is None else row.question) >= count:
            return
        yield row


def _draws(task: ReleaseTask, split: str) -> bool:
    return split == "train" and task.format in ("vqa", "gqa")


def _rows(task: ReleaseTask, split: str, endings: Sequence[str]) -> Iterator[Row]:
    reader = _READERS[task.format](task, split)
    images = ImageFiles(_folder(task, split), endings)
    first = 0  # rows of the files before
    for name in task.of.files[split]:
        path = _path(task, name)
        for number, record in enumerate(_records(path, task, split), start=1):
            where = f"{path}: row {number}"
            with fence(DataError, where):
                if not isinstance(record, dict):
                    raise DataError(f'{where} is no object; write {{"field": value, ...}}')
                found = tuple(images.of(_text(record, field, where), where) for field in task.of.image_fields)
                yield from reader.rows(record, found, where, first + number - 1)
        first += number


def _folder(task: ReleaseTask, split: str) -> Path:
    return Path(task.folder if task.images is None else task.images).expanduser() / (task.of.images[split] if task.images is None else "")


def _path(task: ReleaseTask, name: str) -> Path:
    path = Path(task.folder).expanduser() / name
    if not path.is_file():
        raise DataError(f"task {task.format}: {path} is not there: put the release's file there, or write task.folder")
    return path


def _records(path: Path, task: ReleaseTask, split: str) -> list[Any]:
    records = _json(path)
    if task.format == "caption":
        with fence(DataError, f"{path} is no dataset_coco.json"):
            records = _captions(records["images"], split)
    if not isinstance(records, list) or not records:
        raise DataError(f"{path} holds no list of rows: write [{{...}}, ...]")
    return records


def _json(path: Path) -> Any:
    with fence(DataError, f"{path} is not valid JSON"):
        return json.loads(path.read_bytes())


def _captions(images: Sequence[Mapping[str, Any]], split: str) -> list[dict[str, Any]]:
    """Return a row for each caption to learn from, and for each image to be scored, as the release makes them of Karpathy's file."""
    found: list[dict[str, Any]] = []
    for image in images:
        if image["split"] in COCO_SPLITS[split]:
            captions = [str(sentence["raw"]).strip() for sentence in image["sentences"]]
            row = {"img_id": str(image["filename"]).partition(".")[0], "captions": captions}
            found += [row | {"caption": caption} for caption in captions] if split == "train" else [row | {"caption": captions[0]}]
    return found


class ImageFiles:
    """The files of images in one folder, each found by its name without the ending; the folder is listed once."""

    def __init__(self, folder: Path, endings: Sequence[str]) -> None:
        self._folder, self._endings = folder, endings
        with fence(DataError, f"the folder of images {folder} can't be read"):
            names = [entry.name for entry in os.scandir(folder)]
        self._files = {Path(name).stem: name for name in names if Path(name).suffix.lower() in endings}

    def of(self, name: str, where: str) -> str:
        """Return an image's file.

        Raises:
            DataError: there is none; names the row.
        """
        found = self.find(name)
        if found is None:
            raise DataError(f"{where}: {self._folder} holds no file {printable(name)}{' or '.join(self._endings)}: put it there")
        return found

    def find(self, name: str) -> str | None:
        """Return an image's file; None: there is none."""
        return str((self._folder / self._files[name]).absolute()) if name in self._files else None


class NamedImages:
    """The images of rows to be answered: files, as in one's own data, or names, as in the release's."""

    def __init__(self, task: ReleaseTask, endings: Sequence[str]) -> None:
        self._task, self._endings = task, endings
        self._known: list[ImageFiles] | None = None

    def of(self, record: Mapping[str, Any], path: str, number: int) -> tuple[str, ...]:
        """Return the file of each image of a row.

        Raises:
            DataError: a column is missing, or there is no such file; names file and row.
        """
        return tuple(self._of(record, field, path, number) for field in self._task.of.image_fields)

    def _of(self, record: Mapping[str, Any], field: str, path: str, number: int) -> str:
        if field not in record:
            raise DataError(files.missing_field(path, number, field, record))
        name = record[field]
        if isinstance(name, str):
            for known in self._folders():
                if (found := known.find(name)) is not None:
                    return found
        return picture_of(name, field, path, number)

    def _folders(self) -> list[ImageFiles]:
        if self._known is None:
            folders = dict.fromkeys(_folder(self._task, split) for split in self._task.of.files)
            self._known = [ImageFiles(folder, self._endings) for folder in folders if folder.is_dir()]
        return self._known


class _Question:
    """VQA and GQA: a question, and what each answer is worth."""

    def __init__(self, task: ReleaseTask, split: str) -> None:
        self._task, self._draws = task, _draws(task, split)
        self._human = _human_answers(task) if task.format == "vqa" and split != "train" else None

    def rows(self, record: dict[str, Any], images: tuple[str, ...], where: str, number: int) -> Iterator[Row]:
        source, scores = question_text(self._task, record, where), _scores(record, where)
        if self._draws:
            drawn = {answer: score for answer, score in scores.items() if score > 0} or {"": 0.0}  # no answer: the loss counts nothing
            for answer, score in drawn.items():
                yield Row(source, answer, images, score, question=number)
            return
        likeliest = max(scores, key=lambda answer: scores[answer], default="")
        yield Row(source, likeliest, images, reference=json.dumps(scores if self._human is None else self._answers(record, where)))

    def _answers(self, record: dict[str, Any], where: str) -> list[str]:
        assert self._human is not None
        question = record.get("question_id")
        if question not in self._human:
            asked = printable(repr(question))
            raise DataError(f"{where}: no human answers to question {asked} in {ANNOTATIONS}: add them, or remove the row")
        return self._human[question]


def question_text(task: ReleaseTask, record: Mapping[str, Any], where: str) -> str:
    """Return the text of a row."""
    prompt = task.of.prompt if task.prompt is None else task.prompt
    if task.format == "caption":
        return prompt
    return prompt + _text(record, "question" if "sent" not in record and "question" in record else "sent", where)


def _scores(record: Mapping[str, Any], where: str) -> dict[str, float]:
    scores = record.get("label", {})
    if not isinstance(scores, dict) or not all(_is_worth(score) for score in scores.values()):
        raise DataError(f'{where}: label is {printable(repr(scores))[:60]}, no answers with their scores: write {{"answer": 1.0}}')
    if any(not answer.strip() and score > 0 for answer, score in scores.items()):
        raise DataError(f"{where}: label scores an empty answer: fill it in or remove it")
    return {answer: float(score) for answer, score in scores.items()}


def _is_worth(score: Any) -> bool:
    return isinstance(score, int | float) and 0 <= score <= 1e6


def _human_answers(task: ReleaseTask) -> dict[Any, list[str]]:
    """Return the ten answers that people gave to each question."""
    folder = _path(task, task.of.files["validation"][0]).parent
    found: dict[Any, list[str]] = {}
    for path in sorted(folder.glob(ANNOTATIONS)):
        with fence(DataError, f"{path} is no file of annotations"):
            for each in _json(path)["annotations"]:
                found[each["question_id"]] = [str(answer["answer"]) for answer in each["answers"]]
    if not found:
        raise DataError(f"task vqa: {folder}/{ANNOTATIONS} is not there: answers are scored on what people said")
    return found


class _Statement:
    """NLVR2: whether a sentence is true of two images."""

    def __init__(self, task: ReleaseTask, split: str) -> None:
        self._task = task

    def rows(self, record: dict[str, Any], images: tuple[str, ...], where: str, number: int) -> Iterator[Row]:
        label = record.get("label")
        if label not in (0, 1):
            raise DataError(f"{where}: label is {printable(repr(label))}, neither 0 (false) nor 1 (true)")
        answer = "true" if label else "false"
        parts = _text(record, "identifier", where).split("-")
        if len(parts) < 3:
            raise DataError(f"{where}: identifier is {printable(repr(record['identifier']))}, and should be like dev-850-0-0")
        of = "-".join([*parts[:2], "", *parts[3:]])  # the sentence, whichever its images
        yield Row(question_text(self._task, record, where), answer, images, reference=json.dumps([of, answer]))


class _Caption:
    """COCO: what people said of an image."""

    def __init__(self, task: ReleaseTask, split: str) -> None:
        self._task = task

    def rows(self, record: dict[str, Any], images: tuple[str, ...], where: str, number: int) -> Iterator[Row]:
        source = question_text(self._task, record, where)
        yield Row(source, _text(record, "caption", where), images, reference=json.dumps(record["captions"]))


_READERS: Mapping[str, Any] = {"vqa": _Question, "gqa": _Question, "nlvr2": _Statement, "caption": _Caption}
assert set(_READERS) == set(FORMAT)


def _text(record: Mapping[str, Any], field: str, where: str) -> str:
    if field not in record:
        raise DataError(f"{where} has no {field}")
    value = record[field]
    if not isinstance(value, str) or not value.strip():
        raise DataError(f"{where}: {field} is {printable(repr(value))[:60]}, no text")
    return value
