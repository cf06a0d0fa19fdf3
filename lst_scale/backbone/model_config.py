"""A checkpoint's config.json: found and checked before torch is imported and before any weight is read.

What transformers makes of a damaged one depends on where it is damaged; here it is one line that names the file and the value.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from lst_scale.backbone.families import ROOMS, numbers_of, text_part
from lst_scale.errors import BackboneError, fence, printable
from lst_scale.system.assets import resolve

CONFIG = "config.json"


def is_folder_name(checkpoint: str) -> bool:
    """Return whether a checkpoint's name can only be a path: hub names are owner/name."""
    return checkpoint.startswith((".", "/", "~")) or checkpoint.count("/") > 1


def find_config(checkpoint: str, revision: str | None = None) -> Path | None:
    """Return where a checkpoint's config.json is on this machine; None: the checkpoint has to be downloaded first.

    Raises:
        BackboneError: the name is that of a folder without one, or of no folder.
    """
    with fence(BackboneError, f"backbone.checkpoint {printable(checkpoint)!r}"):
        folder = Path(resolve(checkpoint))
        _refuse_gguf(folder)
        if folder.is_dir():
            if not (folder / CONFIG).is_file():
                raise BackboneError(f"{folder} has no {CONFIG}: copy the whole checkpoint, or write another folder")
            return folder / CONFIG
        if folder.exists():
            raise BackboneError(f"backbone.checkpoint {checkpoint!r} is a file: write the folder that holds it")
        if is_folder_name(checkpoint):
            raise BackboneError(
                f"backbone.checkpoint {checkpoint!r} is no folder: write an existing path or a hub name such as google-t5/t5-base"
            )
        from huggingface_hub import try_to_load_from_cache

        found = try_to_load_from_cache(checkpoint, CONFIG, revision=revision)
        return Path(found) if isinstance(found, str) else None


def _refuse_gguf(path: Path) -> None:
    """Refuse a GGUF file, or a folder that holds nothing else, and say how it becomes a checkpoint."""
    files = [path] if path.is_file() else sorted(path.glob("*.gguf")) if path.is_dir() and not (path / CONFIG).is_file() else []
    if files and files[0].suffix == ".gguf":
        raise BackboneError(f"{files[0]} is a GGUF file: write lst-scale from-gguf {files[0]} FOLDER first, and that folder here")


def read_config(path: Path) -> dict[str, Any]:
    """Return what a config.json says of the model, of its text part where it reads images, too; of a known family, checked.

    Raises:
        BackboneError: it can't be read, or a value can't be meant.
    """
    with fence(BackboneError, f"{path} can't be read as a model configuration"):
        config = json.loads(path.read_bytes())
        if not isinstance(config, dict):
            raise BackboneError(f"{path} can't be read as a model configuration: it holds {_spoken(config)}: copy the checkpoint again")
        config = dict(text_part(config))
        if config.get("model_type") in ROOMS:
            problem = numbers_of(config["model_type"], path).problem_of(config)
            if problem:
                raise BackboneError(f"{path}: {printable(problem)}: copy the checkpoint again, or mend the value")
    return config


def _spoken(value: Any) -> str:
    kinds: dict[type, str] = {list: "a list", str: "a text", bool: "a truth value", type(None): "nothing"}
    return kinds.get(type(value), "a number")
