"""Side networks by name: read from the folders of finished runs or of saved side networks, replaced and let go while others answer.

Weights of those that were not asked for longest leave memory at a limit and are read again when they are asked for. A row keeps the
network that it began with, whatever happens to the name meanwhile.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from lst_scale.backbone.taps import Backbone, BackboneSpec
from lst_scale.data.chat import Chat
from lst_scale.data.context import Reading, reading_after, reading_of
from lst_scale.data.encode import target_text
from lst_scale.data.files import Found
from lst_scale.data.prompts import chat_text, going_on, in_way
from lst_scale.data.tasks import way_of
from lst_scale.errors import ArgumentError, LadderError
from lst_scale.inference.predict import text_of_row
from lst_scale.inference.scored_run import ScoredRun, read_scored_run, refuse_changed_weights
from lst_scale.runs.folder import RECIPE
from lst_scale.side import files
from lst_scale.side.network import SideNetwork

SIDE = "side_network"  # the folder of a run that holds what it trained
BACKBONE = "backbone"  # the name of the backbone's own answers


@dataclass(frozen=True, eq=False, kw_only=True)
class Network:
    """One side network with what it was trained to answer. None as `side`: the backbone itself."""

    name: str
    side: SideNetwork | None
    reading: Reading
    labels: tuple[str, ...] | None = None
    targets: tuple[tuple[int, ...], ...] = ()  # the token ids of each label
    run: ScoredRun | None = None
    chat: Chat | None = None  # of a run on conversations

    @property
    def context(self) -> tuple[int, ...]:
        """What the backbone has read before every prompt."""
        return self.reading.run_once

    @cached_property
    def shape(self) -> Hashable:
        """What networks have in common that answer together; None for the backbone itself."""
        return None if self.side is None else shape_of(self.side)

    @property
    def end(self) -> int:
        """The token that ends an answer; that of a chat template may be another than what ends a text."""
        found: int = self.reading.tokenizer.eos_token_id
        return found

    def prompt(self, text: str, *, is_begun: bool = False) -> tuple[int, ...]:
        """Return the token ids of a prompt, written, and cut where it is too long, as sources are in training.

        Args:
            is_begun: what begins a text stands in it already, as a chat template writes it.
        """
        most = None if self.run is None else self.run.recipe.data.max_source_length
        tokenizer = going_on(self.reading.tokenizer) if is_begun else self.reading.tokenizer
        return (*self.reading.before, *tokenizer([text], truncation=most is not None, max_length=most).input_ids[0])

    def conversation(self, messages: Sequence[Mapping[str, str]]) -> tuple[int, ...]:
        """Return the token ids of a conversation up to the answer that it asks for, as in training where that was on conversations.

        Raises:
            LstScaleError: the tokenizer has no chat template, or that refuses these messages.
        """
        asked = chat_text(self.reading.tokenizer, messages) if self.chat is None else self.chat.asked(messages, "the request")
        return self.prompt(asked, is_begun=True)

    def text_of(self, record: Mapping[str, Any]) -> str:
        """Return the prompt of a row of fields, as the run wrote it.

        Raises:
            LstScaleError: there is no run, or a field is missing, empty, or can't be meant.
        """
        if self.run is None:
            raise ArgumentError(f"{self.name} was saved without the fields of a task: give a text")
        return text_of_row(self.run, Found(record, f"a row for {self.name}", 1), self.chat)

    def label_ids(self, labels: Sequence[str]) -> tuple[tuple[int, ...], ...]:
        """Return the token ids of labels as targets are in training."""
        prefix = "" if self.run is None else self.run.target_prefix
        return tuple(tuple(self.reading.tokenizer(text_target=target_text(label, prefix)).input_ids) for label in labels)


class Networks:
    """All that can be asked, by name. Safe to use from several threads.

    Args:
        most_bytes: of weights that are kept in memory, beside those that answer at the moment; None: no limit.
    """

    def __init__(self, backbone: Backbone, tokenizer: Any, most_bytes: int | None = None) -> None:
        refuse_unserved(backbone.spec)
        self._backbone, self._tokenizer, self._most_bytes = backbone, tokenizer, most_bytes
        self._folders: dict[str, Path] = {}
        self._there: OrderedDict[str, Network] = OrderedDict()  # the one that was asked for last comes last
        self._lock = threading.RLock()
        self.bare = Network(name=BACKBONE, side=None, reading=reading_after(None, tokenizer, beside_backbone=True))

    @property
    def names(self) -> list[str]:
        with self._lock:
            return [BACKBONE, *self._folders]

    @property
    def sides(self) -> list[SideNetwork]:
        """What is in memory."""
        with self._lock:
            return [network.side for network in self._there.values() if network.side is not None]

    def add(self, name: str, folder: Path) -> Network:
        """Read a side network and answer by it from now on, in place of one of that name.

        Raises:
            LstScaleError: the name is taken by the backbone, or the folder holds no whole side network of this backbone.
        """
        if name == BACKBONE or not name:
            raise ArgumentError(f"{name!r} is no name for a side network: write another")
        network = self._read(name, folder)
        with self._lock:
            self._folders[name] = folder
            self._keep(network)
        return network

    def remove(self, name: str) -> None:
        """Forget a name.

        Raises:
            ArgumentError: there is none.
        """
        with self._lock:
            if name not in self._folders:
                raise ArgumentError(f"there is no side network {name!r}")
            del self._folders[name]
            self._there.pop(name, None)

    def get(self, name: str) -> Network:
        """Return what answers under a name, read again where its weights had left memory.

        Raises:
            ArgumentError: there is none.
            LstScaleError: its folder has been damaged since.
        """
        if name == BACKBONE:
            return self.bare
        with self._lock:
            if name not in self._folders:
                raise ArgumentError(f"there is no model {name!r}: /v1/models lists those that there are")
            if name in self._there:
                self._there.move_to_end(name)
                return self._there[name]
            folder = self._folders[name]
        network = self._read(name, folder)  # without the lock, which every round of the engine takes
        with self._lock:
            if self._folders.get(name) == folder:
                self._keep(network)
        return network

    def _keep(self, network: Network) -> None:
        self._there[network.name] = network
        self._there.move_to_end(network.name)
        while self._most_bytes is not None and len(self._there) > 1 and sum(map(_bytes_of, self._there.values())) > self._most_bytes:
            self._there.popitem(last=False)

    def _read(self, name: str, folder: Path) -> Network:
        alone = f"serve its folder {SIDE}/ by itself, which answers texts"
        run = read_scored_run(folder, of_several=alone) if (folder / RECIPE).is_file() else None
        if run is not None:
            if run.recipe.method.name != "lst":
                raise ArgumentError(f"{folder} trained by method {run.recipe.method.name}: what is served beside a backbone is method lst")
            refuse_changed_weights(folder, SIDE)
        saved = files.read(folder / SIDE if run is not None else folder)
        self._refuse_misfit(saved)
        side = SideNetwork(self._backbone.spec, replace(saved.config, recompute=False))
        files.load_weights(side, saved)
        side = side.to(self._backbone.device).eval().requires_grad_(False)
        side.beside(self._backbone)
        chat = None
        if run is not None and run.conversational:
            chat = Chat(self._tokenizer, run.recipe.backbone.checkpoint, run.recipe.backbone.context)
        reading = self._reading(run, saved, chat)
        network = Network(name=name, side=side, reading=reading, labels=None if run is None else run.labels, run=run, chat=chat)
        return replace(network, targets=network.label_ids(network.labels or ()))

    def _reading(self, run: ScoredRun | None, saved: files.Saved, chat: Chat | None) -> Reading:
        if run is None:
            return reading_of(saved.identity.context, self._tokenizer)
        return reading_after(run.context, in_way(self._tokenizer, way_of(run.task, chat)), beside_backbone=True)

    def _refuse_misfit(self, saved: files.Saved) -> None:
        mine, theirs = self._backbone.identity, saved.identity
        if mine.fingerprint != theirs.fingerprint:
            raise LadderError(
                f"{saved.folder} was trained on {theirs.checkpoint} with fingerprint {theirs.fingerprint[:12]}; the backbone that is "
                f"served, {mine.checkpoint}, has {mine.fingerprint[:12]}: serve it beside its own"
            )
        if saved.config.vision is not None or saved.config.design not in ("transformer", "pointwise", "tail"):
            what = "pictures" if saved.config.vision is not None else f"design {saved.config.design}"
            raise LadderError(f"{saved.folder} has {what}, which is not served: use lst-scale predict")


def shape_of(side: SideNetwork) -> Hashable:
    """Return what side networks that are stacked have in common."""
    ours = asdict(side.config)
    return tuple(sorted((name, repr(value)) for name, value in ours.items() if name not in ("dropout", "recompute")))


def refuse_unserved(spec: BackboneSpec) -> None:
    """Refuse a kind of backbone that the engine can't run.

    Raises:
        ArgumentError: it can't.
    """
    if not spec.served:
        raise ArgumentError(f"a {spec.model_type} is not served: use lst-scale predict, or lst_scale.pipeline")


def _bytes_of(network: Network) -> int:
    return 0 if network.side is None else sum(weight.numel() * weight.element_size() for weight in network.side.parameters())
