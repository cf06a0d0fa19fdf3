"""`lst_scale.pipeline`: text in, text out, from the folder of a finished run or of a saved side network.

A run says all that answers depend on: backbone, tokenizer, template, context, labels, and how it was scored. So answers are those of
`lst-scale predict`, whose parts these are. A side network that was saved by itself knows its backbone, and takes a text as it is.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import torch

from lst_scale.backbone.families import family_of
from lst_scale.data.batches import collate, evaluation_batches, merge_predictions
from lst_scale.errors import ArgumentError
from lst_scale.inference import published
from lst_scale.inference.opened import AnyAnswer, Opened, open_folder
from lst_scale.inference.predict import reply_to
from lst_scale.inference.prompts import Given, Prompts, is_one
from lst_scale.inference.streaming import answer_of, pieces
from lst_scale.system import hub
from lst_scale.training.evaluation import ends_of
from lst_scale.training.sessions import EVALUATION, Moment, run_alone


def pipeline(
    source: str | Path,
    *,
    overrides: Sequence[str] = (),
    backbone: Any = None,
    device: str | None = None,
    labels: Sequence[str] | None = None,
    tokenizer: Any = None,
    revision: str | None = None,
    token: str | bool | None = None,
) -> Pipeline:
    """Return what answers as a finished run, or a saved side network, does.

    Args:
        source: the folder, or a name of the hub, owner/name, that holds one.
        overrides: change a run's recipe as `lst-scale predict` takes it: "evaluation.num_beams=4", "task=NAME" of several tasks.
        backbone: a backbone or a live model that is in memory already; several pipelines may share it. None: loaded by its recorded name.
        device: "cpu", "cuda:1"; None: CUDA where there is one.
        labels: of a side network that was saved without its run: answers are the likeliest of them, with their probabilities.
        tokenizer: of such a one whose backbone has no name.
        revision: a branch, tag or commit of the hub.
        token: of the hub's, in place of the one that it has been told.

    Raises:
        LstScaleError: the folder holds neither, is damaged, or reads pictures.
    """
    folder = hub.folder_of(source, published.WANTED, revision=revision, token=token)
    return Pipeline(open_folder(folder, overrides, device, backbone, labels, tokenizer))


class Pipeline:
    """Answers texts, rows of fields and conversations. Close it, or use it in `with`, to give its memory back.

    Called with one input it returns one answer, with several a list. An input is a text; a dictionary of the fields that the run's
    template names (a text stands for the field of a run that reads only one); or a list of messages ({"role": ..., "content": ...}),
    written by the chat template of the backbone's tokenizer. An answer is

        classification   {"label": "food", "probabilities": {"food": 0.9, "person": 0.1}}
        text             "a text"
        regression       2.5, or None where what was written is no number
    """

    def __init__(self, opened: Opened) -> None:
        self._opened, self.model = opened, opened.model
        self._prompts = Prompts(opened.run, opened.reading, opened.chat)

    @property
    def kind(self) -> str:
        """classification, regression or text."""
        return self._opened.way.kind

    @property
    def labels(self) -> tuple[str, ...] | None:
        """What a classification chooses from."""
        return self._opened.way.labels

    @property
    def tokenizer(self) -> Any:
        """The backbone's, as sources are read with it."""
        return self._opened.reading.tokenizer

    @property
    def columns(self) -> tuple[str, ...]:
        """The fields that a row needs; none where a text is taken as it is."""
        return () if self._opened.run is None else tuple(self._opened.run.columns)

    def __call__(
        self,
        inputs: Given | Iterable[Given],
        *,
        max_new_tokens: int | None = None,
        num_beams: int | None = None,
        batch_size: int | None = None,
    ) -> Any:
        """Return the answer, or those of several inputs in order.

        Args:
            max_new_tokens: of an answer that is written; None: as the run was scored.
            num_beams: of its search; None: as the run was scored.
            batch_size: inputs at once; None: as the run was scored.

        Raises:
            ArgumentError: an input, or an option, is none that can be answered here.
            DataError: a field of a row is missing, or holds no text.
        """
        way = self._way(max_new_tokens=max_new_tokens, num_beams=num_beams, batch_size=batch_size)
        if is_one(inputs):
            return self._answers([inputs], way)[0]
        if not isinstance(inputs, Iterable):
            raise ArgumentError(
                f"an input is a text, a dictionary of fields or a list of messages, or several of them, no {type(inputs).__name__}"
            )
        several: list[Any] = list(inputs)
        return self._answers(several, way) if several else []

    def stream(self, given: Given, *, max_new_tokens: int | None = None) -> Iterator[str]:
        """Yield the answer to one input as it is written, a word or so at a time; closing the iterator ends it.

        Raises:
            ArgumentError: it is no text that is written here: labels are compared, beams are searched to their end.
        """
        way = self._way(max_new_tokens=max_new_tokens)
        if way.kind != "text" or way.evaluation.num_beams != 1:
            what = f"a {way.kind} has" if way.kind != "text" else f"evaluation.num_beams={way.evaluation.num_beams} gives"
            raise ArgumentError(f"{what} no answer that grows word by word: call the pipeline itself")
        batch = collate(self._prompts.encoded([given]), [0])
        device = self.model.device

        @torch.no_grad()
        def generate(**options: Any) -> None:
            family_of(self.model.spec.model_type, "this model").answers(
                self.model.generate,
                batch.input_ids_BS.to(device),
                batch.attention_mask_BS.to(device),
                do_sample=False,
                num_beams=1,
                max_new_tokens=way.evaluation.max_new_tokens or way.longest,
                **ends_of(self.model, self.tokenizer),
                **options,
            )

        return answer_of(pieces(generate, self.tokenizer), way.target_prefix)

    def push_to_hub(
        self,
        name: str,
        *,
        private: bool | None = None,
        revision: str | None = None,
        token: str | bool | None = None,
        commit_message: str = "Upload run",
        create_pr: bool = False,
    ) -> str:
        """Put what `pipeline(name)` needs under owner/name on the hub, and return the commit's address. Arguments are `LadderModel`'s.

        Of a run these are its recipe, its result and what it trained: neither backbone nor rows, of which the recipe names the files.

        Raises:
            ArgumentError: the hub refuses, or can't be reached.
        """
        fill = partial(published.fill, self._opened.folder, name, self._opened.run)
        options: dict[str, Any] = {"private": private, "revision": revision, "token": token, "create_pr": create_pr}
        return hub.push(fill, name, message=commit_message, **options)

    def close(self) -> None:
        """Give back what it holds."""
        self._opened.closing.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def _way(self, **options: int | None) -> AnyAnswer:
        way = self._opened.way
        given = {name: value for name, value in options.items() if value is not None}
        for name, value in given.items():
            if type(value) is not int or value < 1:
                raise ArgumentError(f"{name} {value!r} must be a whole number of at least 1")
            if name != "batch_size" and way.evaluation.method != "generation":
                what = "the likeliest label" if way.evaluation.method == "likelihood" else "the mean of numbers"
                raise ArgumentError(f"{name} has no effect on answers that are {what}: leave it out")
        return replace(way, evaluation=way.evaluation.model_copy(update=given))

    def _answers(self, several: Sequence[Any], way: AnyAnswer) -> list[Any]:
        split, found = self._prompts.encoded(several), list[tuple[int, tuple[Any, ...]]]()
        labelled, tokenizer = way.labels is not None, self.tokenizer
        for batch in evaluation_batches(split, batch_size=way.evaluation.batch_size, rank=0, world_size=1):
            session = reply_to(self.model, batch, tokenizer, way, Moment(0, EVALUATION), probabilities=labelled)
            found += zip(batch.indices, run_alone(session, self._opened.passes), strict=True)
        answers = merge_predictions([found], len(split))
        return [{"label": said[0], "probabilities": said[1]} if labelled else said[0] for said in answers]
