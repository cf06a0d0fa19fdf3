"""A saved side network: side_network.safetensors, ladder_config.json, README.md. The backbone is named in it, never stored.

The first two are read back after writing. Only safetensors and JSON are read: nothing in such a folder can run. A config.json beside them
tells others what it is (`hub_config.py`).

transformers' Trainer saves `model.state_dict()` alone, as model.safetensors. So what ladder_config.json says travels in every state
dict, as bytes under one more name (`as_bytes`), and a Trainer's checkpoint reads like a folder of ours.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from lst_scale.backbone.families import numbers_of
from lst_scale.backbone.taps import BackboneIdentity, BackboneSpec
from lst_scale.errors import LadderError, fence
from lst_scale.side import hub_config
from lst_scale.side.card import card_of_side_network
from lst_scale.side.config import LadderConfig
from lst_scale.system.durable import write_directory

FORMAT = 1
WEIGHTS, CONFIG, CARD = "side_network.safetensors", "ladder_config.json", "README.md"
TRAINERS_WEIGHTS, RECORD, PREFIX = "model.safetensors", "ladder_config", "side."
DESIGN = "design"  # in the weights' metadata: a digest of the design they were trained in
# What a design may differ in and still compute the same from the same weights.
_NO_MATTER = ("dropout", "precision", "recompute", "tap_storage")


@dataclass(frozen=True, kw_only=True)
class Saved:
    """A saved side network as read from disk."""

    config: LadderConfig
    identity: BackboneIdentity
    spec: BackboneSpec
    weights: dict[str, Tensor]
    folder: Path
    design: str | None  # a digest of the one that the weights were trained in; None: they don't tell


def wanted(subfolder: str) -> tuple[str, ...]:
    """Return patterns of the files that are read below a folder of the hub."""
    return tuple(f"{subfolder}/{file}" if subfolder else file for file in (WEIGHTS, CONFIG, CARD, TRAINERS_WEIGHTS))


def write(
    folder: Path,
    weights: Mapping[str, Tensor],
    config: LadderConfig,
    identity: BackboneIdentity,
    spec: BackboneSpec,
    *,
    called: str | None = None,
) -> None:
    """Write the folder at once and read it back.

    Args:
        called: where others will find it, for the card; None: in this folder.
    """
    contiguous = {name: tensor.detach().to("cpu").contiguous() for name, tensor in weights.items()}
    record = record_of(config, identity, spec)

    def fill(partial: Path) -> None:
        save_file(contiguous, partial / WEIGHTS, metadata={"format": "pt", DESIGN: _design_digest(record["config"])})
        (partial / CONFIG).write_text(json.dumps(record, indent=2) + "\n")
        (partial / hub_config.FILE).write_text(hub_config.hub_config(record["config"], identity, spec))
        count = sum(tensor.numel() for tensor in contiguous.values())
        (partial / CARD).write_text(card_of_side_network(called or str(folder.resolve()), config, identity, count))

    def check(whole: Path) -> None:
        found = read(whole).weights
        assert found.keys() == contiguous.keys()
        for name, tensor in contiguous.items():
            if not torch.equal(found[name].view(torch.uint8), tensor.view(torch.uint8)):
                raise LadderError(f"{whole / WEIGHTS}: {name} reads back different from what was written: check the disk")

    write_directory(folder, fill, check)


def record_of(config: LadderConfig, identity: BackboneIdentity, spec: BackboneSpec) -> dict[str, Any]:
    """Return what has to be known beside the weights."""
    return {"format": FORMAT, "config": asdict(config), "backbone": identity.as_json(), "backbone_spec": asdict(spec)}


def as_bytes(record: dict[str, Any]) -> Tensor:
    """Return a record as a tensor, which is all that a state dict can hold in safetensors."""
    return torch.frombuffer(bytearray(json.dumps(record).encode()), dtype=torch.uint8)


def from_bytes(tensor: Tensor) -> dict[str, Any]:
    """Return the record that `as_bytes` packed."""
    record: dict[str, Any] = json.loads(bytes(tensor.cpu().tolist()))
    return record


def refuse_another_design(found: dict[str, Any], expected: dict[str, Any]) -> None:
    """Compare the record of weights about to be loaded with that of the model: shapes don't tell designs and backbones apart.

    Raises:
        LadderError: they were trained in another design or beside another backbone.
    """
    theirs, ours = json.loads(json.dumps(found))["config"], json.loads(json.dumps(expected))["config"]
    differ = [
        f"{key} {theirs.get(key)!r} instead of {ours[key]!r}" for key in ours if key not in _NO_MATTER and theirs.get(key) != ours[key]
    ]
    if found["backbone"]["fingerprint"] != expected["backbone"]["fingerprint"]:
        differ.append(f"another backbone, {found['backbone']['checkpoint']}")
    if found["backbone"].get("context") != expected["backbone"].get("context"):
        differ.append("another context before every row")
    if differ:
        raise LadderError(
            f"these weights were trained with {', '.join(differ)}: build the model so, or remove {RECORD!r} from the state dict"
        )


def refuse_config_of_another(found: LadderConfig, expected: LadderConfig, folder: Path) -> None:
    """Compare a saved side network's design with what its run's recipe says.

    Raises:
        LadderError: names a difference.
    """
    theirs, ours = asdict(found), asdict(expected)
    differ = [f"{key} {theirs[key]!r}, which the recipe has as {ours[key]!r}" for key in ours if theirs[key] != ours[key]]
    differ = [line for line in differ if line.split()[0] not in _NO_MATTER]
    if differ:
        raise LadderError(f"{folder} holds a side network with {differ[0]}: one of them was changed, take the run's own files")


def _contents(folder: Path) -> tuple[dict[str, Any], dict[str, Tensor], str | None]:
    """Return the record, the weights and their digest of the design: of a folder of ours, or of a checkpoint of transformers' Trainer."""
    if (folder / CONFIG).exists() or not (folder / TRAINERS_WEIGHTS).exists():
        with fence(LadderError, f"{folder / CONFIG} is damaged"):
            record: dict[str, Any] = json.loads((folder / CONFIG).read_bytes())
        weights = read_weights(folder / WEIGHTS)
        with fence(LadderError, f"{folder / WEIGHTS} is damaged"), safe_open(folder / WEIGHTS, framework="pt") as file:
            return record, weights, (file.metadata() or {}).get(DESIGN)
    with fence(LadderError, f"{folder / TRAINERS_WEIGHTS} is damaged"):
        found = load_file(folder / TRAINERS_WEIGHTS)
        if RECORD not in found:
            raise LadderError(f"{folder} holds no saved side network, but another model; give the side_network folder of a run")
        record = from_bytes(found.pop(RECORD))
    return record, {name.removeprefix(PREFIX): tensor for name, tensor in found.items()}, None


def read(folder: Path) -> Saved:
    """Read a saved side network.

    Raises:
        LadderError: a file is missing or damaged, or was written in another format.
    """
    if not ((folder / CONFIG).is_file() and (folder / WEIGHTS).is_file()) and not (folder / TRAINERS_WEIGHTS).is_file():
        raise LadderError(f"{folder} holds no saved side network: it lacks {CONFIG} or {WEIGHTS}; give the side_network folder of a run")
    with fence(LadderError, f"{folder / CONFIG} is damaged"):
        record, weights, design = _contents(folder)
        if record["format"] != FORMAT:
            raise LadderError(f"{folder / CONFIG} has format {record['format']}, this version reads {FORMAT}: use the one that wrote it")
        return Saved(
            config=_config(record["config"], folder / CONFIG),
            identity=BackboneIdentity.from_json(record["backbone"]),
            spec=numbers_of(record["backbone_spec"]["model_type"], folder).spec_type(**record["backbone_spec"]),
            weights=weights,
            folder=folder,
            design=design,
        )


def _config(record: dict[str, Any], path: Path) -> LadderConfig:
    try:
        return LadderConfig(**record)
    except LadderError as error:
        raise LadderError(f"{path} is damaged: {error}") from error


def read_weights(path: Path) -> dict[str, Tensor]:
    """Read trained weights, which are finite and float32.

    Raises:
        LadderError: they are damaged; names the file.
    """
    with fence(LadderError, f"{path} is damaged"):
        weights: dict[str, Tensor] = load_file(path)
        for name, tensor in weights.items():
            if tensor.dtype != torch.float32:
                raise ValueError(f"{name} is {str(tensor.dtype).removeprefix('torch.')}, not float32")
            if not torch.isfinite(tensor).all():
                raise ValueError(f"{name} holds values that are not finite")
    return weights


def _design_digest(config: Any) -> str:
    told = {key: value for key, value in config.items() if key not in _NO_MATTER}
    for later in ("vision", "tail"):
        if told.get(later) is None:  # as they were told before there were any
            told.pop(later, None)
    return hashlib.sha256(json.dumps(told, sort_keys=True).encode()).hexdigest()


def load_weights(side: nn.Module, saved: Saved) -> None:
    """Put the weights into a side network of the saved design."""
    expected = side.state_dict()
    wrong = sorted(expected.keys() ^ saved.weights.keys())
    wrong += [name for name, tensor in saved.weights.items() if name in expected and tensor.shape != expected[name].shape]
    if wrong:
        raise LadderError(f"{saved.folder / WEIGHTS} does not fit its {CONFIG}: {', '.join(wrong[:3])} ({len(wrong)} in all)")
    if saved.design not in (None, _design_digest(asdict(saved.config))):
        raise LadderError(
            f"{saved.folder / CONFIG} says another design than the weights were trained in: it was changed, write it as it was"
        )
    side.load_state_dict(saved.weights)
