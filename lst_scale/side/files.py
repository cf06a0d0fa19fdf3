"""A saved side network: side_network.safetensors, ladder_config.json, README.md. The backbone is named in it, never stored.

The first two are read back after writing. Only safetensors and JSON are read: nothing in such a folder can run.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from lst_scale.backbone.taps import BackboneIdentity, BackboneSpec
from lst_scale.durable import write_directory
from lst_scale.errors import LadderError
from lst_scale.side.config import LadderConfig

FORMAT = 1
WEIGHTS, CONFIG, CARD = "side_network.safetensors", "ladder_config.json", "README.md"


@dataclass(frozen=True, kw_only=True)
class Saved:
    """A saved side network as read from disk."""

    config: LadderConfig
    identity: BackboneIdentity
    spec: BackboneSpec
    weights: dict[str, Tensor]
    folder: Path


def write(folder: Path, weights: Mapping[str, Tensor], config: LadderConfig, identity: BackboneIdentity, spec: BackboneSpec) -> None:
    """Write the folder at once and read it back."""
    contiguous = {name: tensor.detach().to("cpu").contiguous() for name, tensor in weights.items()}
    record = {"format": FORMAT, "config": asdict(config), "backbone": asdict(identity), "backbone_spec": asdict(spec)}

    def fill(partial: Path) -> None:
        save_file(contiguous, partial / WEIGHTS, metadata={"format": "pt"})
        (partial / CONFIG).write_text(json.dumps(record, indent=2) + "\n")
        (partial / CARD).write_text(_card(config, identity, sum(tensor.numel() for tensor in contiguous.values())))

    def check(whole: Path) -> None:
        found = read(whole).weights
        assert found.keys() == contiguous.keys()
        for name, tensor in contiguous.items():
            if not torch.equal(found[name].view(torch.uint8), tensor.view(torch.uint8)):
                raise LadderError(f"{whole / WEIGHTS}: {name} reads back different from what was written: check the disk")

    write_directory(folder, fill, check)


def read(folder: Path) -> Saved:
    """Read a saved side network.

    Raises:
        LadderError: a file is missing or damaged, or was written in another format.
    """
    try:
        record: dict[str, Any] = json.loads((folder / CONFIG).read_text())
        if record["format"] != FORMAT:
            raise LadderError(f"{folder / CONFIG} has format {record['format']}, this version reads {FORMAT}: use the one that wrote it")
        return Saved(
            config=LadderConfig(**record["config"]),
            identity=BackboneIdentity(**record["backbone"]),
            spec=BackboneSpec(**record["backbone_spec"]),
            weights=load_file(folder / WEIGHTS),
            folder=folder,
        )
    except (FileNotFoundError, NotADirectoryError) as error:
        raise LadderError(
            f"{folder} holds no saved side network: it lacks {CONFIG} or {WEIGHTS}; give the side_network folder of a run"
        ) from error
    except OSError as error:
        raise LadderError(f"can't read the saved side network in {folder}: {error.strerror or error}") from error
    except (json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError) as error:
        raise LadderError(f"{folder / CONFIG} is damaged ({error}): save the side network again") from error
    except SafetensorError as error:
        raise LadderError(f"{folder / WEIGHTS} is damaged ({error}): save the side network again") from error


def load_weights(side: nn.Module, saved: Saved) -> None:
    """Put the weights into a side network of the saved design."""
    expected = side.state_dict()
    wrong = sorted(expected.keys() ^ saved.weights.keys())
    wrong += [name for name, tensor in saved.weights.items() if name in expected and tensor.shape != expected[name].shape]
    if wrong:
        raise LadderError(f"{saved.folder / WEIGHTS} does not fit its {CONFIG}: {', '.join(wrong[:3])} ({len(wrong)} in all)")
    side.load_state_dict(saved.weights)


def _card(config: LadderConfig, identity: BackboneIdentity, count: int) -> str:
    return f"""---
library_name: lst_scale
base_model: {identity.checkpoint}
tags: [ladder-side-tuning]
---
# Side network for {identity.checkpoint}

A ladder side network (Sung et al., NeurIPS 2022) of {count:,} weights. It needs its backbone, {identity.checkpoint} in
{identity.precision}, which stays as it is:

    from lst_scale import LadderModel
    model = LadderModel.from_pretrained("THIS FOLDER")

Design {config.design}, reduction factor {config.reduction_factor}, side layers {", ".join(map(str, config.side_layers))}.
Backbone fingerprint {identity.fingerprint}.
"""
