"""A linear probe: the frozen backbone runs forward only, and a linear map reads the labels off one of its states.

Which state of a row, in the words that serve every family:

    answer    the target's first: where the backbone would predict the answer's first token. Of a language model that is the prompt's
              last token; of a T5 what Sentence-T5 (Ni et al. 2022) calls "first"
    source    the mean over the source's: Sentence-T5's "mean"

The first position of a target depends on nothing that follows it, so any target will do, and taps that a ladder's run left in the cache
serve a probe as well.

Shapes: B rows, K blocks, D = d_model, L labels. A map that was fitted to some of the K blocks has zeros for the others (L, K * D).
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from lst_scale.backbone.spec import BackboneSpec
from lst_scale.backbone.taps import Backbone, Replica, TapRequest, Taps, selected_stack
from lst_scale.errors import ArgumentError, LadderError, fence
from lst_scale.inputs.images import Images
from lst_scale.methods.linear import LinearMap
from lst_scale.recipe.method import ProbeRecipe
from lst_scale.side.count import blocks_of
from lst_scale.side.files import read_weights
from lst_scale.system.durable import write_directory

WEIGHTS, CONFIG = "probe.safetensors", "probe.json"
WEIGHT, BIAS = "weight", "bias"


class Probe:
    """A linear map from the states of a backbone held in any placement."""

    FOLDER = "probe"

    def __init__(self, recipe: ProbeRecipe, backbone: Backbone, labels: Sequence[str]) -> None:
        self.labels, self._recipe, self._backbone = tuple(labels), recipe, backbone
        self.layers = blocks_of(recipe, backbone.spec)
        self.request = request_of(recipe, self.layers)
        self.width = len(self.layers) * backbone.spec.d_model

    def states(self, taps: Taps) -> Tensor:
        """Return what is read of each row (B, K * D), in float32 on the CPU."""
        return states_of(taps, self.request, self._recipe.position).cpu()

    def choices(self) -> Iterator[tuple[int, ...]]:
        """Yield the blocks that are read together, in turn: each alone, then all."""
        yield from ((layer,) for layer in self.layers)
        if len(self.layers) > 1:
            yield self.layers

    def columns(self, layers: Sequence[int]) -> Tensor:
        """Return which of the K * D channels are those of some blocks."""
        first = torch.tensor([self.layers.index(layer) for layer in layers])[:, None] * self._backbone.spec.d_model
        return (first + torch.arange(self._backbone.spec.d_model)).flatten()

    def widened(self, fitted: LinearMap, layers: Sequence[int]) -> dict[str, Tensor]:
        """Return a map from some blocks as the weights of one from all, zeros for the others."""
        weight_LF = torch.zeros(len(self.labels), self.width)
        weight_LF[:, self.columns(layers)] = fitted.weight_LF
        return {WEIGHT: weight_LF, BIAS: fitted.bias_L.clone()}

    def read_by(self, weights: Mapping[str, Tensor]) -> tuple[int, ...]:
        """Return the blocks that a map reads; of one that reads nothing the first."""
        by_block_LKD = weights[WEIGHT].reshape(len(self.labels), len(self.layers), -1)
        found = by_block_LKD.ne(0).any(2).any(0).tolist()
        return tuple(layer for layer, is_read in zip(self.layers, found, strict=True) if is_read) or self.layers[:1]

    def narrowed(self, weights: Mapping[str, Tensor]) -> LinearMap:
        """Return a map from the blocks that it reads alone."""
        return LinearMap(weight_LF=weights[WEIGHT][:, self.columns(self.read_by(weights))], bias_L=weights[BIAS])

    @contextlib.contextmanager
    def evaluating(self, weights: Mapping[str, Tensor]) -> Iterator[ProbeModel]:
        request = request_of(self._recipe, self.read_by(weights))
        yield ProbeModel(self._backbone, request, self._recipe.position, self.narrowed(weights))

    def save(self, folder: Path, weights: Mapping[str, Tensor]) -> None:
        layers, fitted = self.read_by(weights), self.narrowed(weights)
        record = {
            "labels": list(self.labels),
            "layers": list(layers),
            "position": self._recipe.position,
            "backbone": self._backbone.identity.as_json(),
        }

        def fill(partial: Path) -> None:
            save_file({WEIGHT: fitted.weight_LF.contiguous(), BIAS: fitted.bias_L}, partial / WEIGHTS)
            (partial / CONFIG).write_text(json.dumps(record, indent=2) + "\n")

        write_directory(folder, fill, lambda whole: load_file(whole / WEIGHTS))

    def load(self, folder: Path) -> dict[str, Tensor]:
        if not (folder / CONFIG).is_file() or not (folder / WEIGHTS).is_file():
            raise LadderError(f"{folder} holds no saved probe: it lacks {CONFIG} or {WEIGHTS}; give the folder of a finished run")
        found = read_weights(folder / WEIGHTS)
        with fence(LadderError, f"{folder / CONFIG} is damaged"):
            record = json.loads((folder / CONFIG).read_bytes())
            layers, labels, fingerprint = tuple(record["layers"]), tuple(record["labels"]), record["backbone"]["fingerprint"]
            position, context = record["position"], tuple(record["backbone"].get("context", ()))
            if not layers or not set(layers) <= set(self.layers) or list(layers) != sorted(set(layers)):
                raise ValueError(f"'layers' are {list(layers)!s:.60}, which are none of the recipe's")
        identity = self._backbone.identity
        differ = {
            "other labels": labels != self.labels,
            "another method.position": position != self._recipe.position,
            f"another backbone, {record['backbone'].get('checkpoint')}": fingerprint != identity.fingerprint,
            "another context before every row": context != identity.context,
        }
        if any(differ.values()):
            raise LadderError(f"{folder} was fitted with {next(what for what, is_so in differ.items() if is_so)}: take the run's own files")
        width = len(layers) * self._backbone.spec.d_model
        if found.keys() != {WEIGHT, BIAS} or found[WEIGHT].shape != (len(labels), width) or found[BIAS].shape != (len(labels),):
            raise LadderError(f"{folder / WEIGHTS} does not fit its {CONFIG}: take the run's own files")
        self.request = request_of(self._recipe, layers)  # what answers read, and no more
        return self.widened(LinearMap(weight_LF=found[WEIGHT], bias_L=found[BIAS]), layers)


class ProbeModel:
    """A fitted probe as evaluation uses it."""

    def __init__(self, backbone: Backbone, request: TapRequest, position: str, fitted: LinearMap) -> None:
        self.spec: BackboneSpec = backbone.spec
        self.replica: Replica = backbone.replica
        self.device: torch.device = backbone.device
        self._request, self._position, self._fitted = request, position, fitted

    @property
    def label_head(self) -> Callable[[Any], Tensor]:
        return self.log_probabilities

    @torch.no_grad()
    def log_probabilities(self, taps: Taps) -> Tensor:
        """Return those of the labels (B, L), in nats."""
        return self._fitted(states_of(taps, self._request, self._position).cpu()).log_softmax(-1)

    def generate(self, input_ids: Tensor, attention_mask: Tensor, **options: Any) -> NoReturn:
        raise ArgumentError("a probe chooses among labels and writes nothing: write evaluation.method=likelihood")

    def scoring(self, input_ids_BS: Tensor, attention_mask_BS: Tensor, images: Images | None = None) -> NoReturn:
        raise ArgumentError("a probe knows its own labels alone: ask `label_head`")

    def text_logits(self, input_ids_BT: Tensor, attention_mask_BT: Tensor) -> NoReturn:
        raise ArgumentError("a probe knows its own labels alone: ask `label_head`")


def request_of(recipe: ProbeRecipe, layers: tuple[int, ...]) -> TapRequest:
    """Return what a probe of these blocks reads."""
    return TapRequest(layers=layers, source=recipe.position == "source")


def states_of(taps: Taps, request: TapRequest, position: str) -> Tensor:
    """Return what a probe reads of each row (B, K * D), in float32."""
    if position == "answer":
        return torch.cat([tap[:, 0].float() for tap in selected_stack(taps.target, request).tensors], -1)
    mask_BS1 = taps.source_mask_BS[..., None].to(torch.float32)
    count_B1 = mask_BS1.sum(1).clamp(min=1)
    return torch.cat([(tap.float() * mask_BS1).sum(1) / count_B1 for tap in selected_stack(taps.source, request).tensors], -1)
