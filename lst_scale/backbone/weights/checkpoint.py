"""A checkpoint on disk, read one tensor at a time.

Weights come from safetensors only: nothing is unpickled, and nothing but the tensor asked for becomes resident.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Callable, Iterable, Iterator
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor
from transformers import AutoConfig, PretrainedConfig

from lst_scale.backbone.families import TEXT_PARTS, Family, family_of
from lst_scale.backbone.taps import BackboneSpec
from lst_scale.backbone.weights.remembered import remembered
from lst_scale.errors import BackboneError, fence
from lst_scale.system.assets import resolve

DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16, "F64": torch.float64}
INDEX, SINGLE = "model.safetensors.index.json", "model.safetensors"


class Checkpoint:
    """An opened checkpoint: its configuration, and its tensors by Hugging Face name, whole or as slices."""

    def __init__(self, name: str, revision: str | None, folder: Path, config: PretrainedConfig) -> None:
        self.name, self.revision, self.folder, self.config = name, revision, folder, config
        self.family: Family = family_of(config.model_type, name)
        self._headers: dict[str, tuple[dict[str, Any], int]] = {}

    @cached_property
    def spec(self) -> BackboneSpec:
        return self.family.spec(self.config)

    @cached_property
    def files(self) -> dict[str, str]:
        """Map each tensor's name to the file that holds it."""
        if (self.folder / INDEX).exists():
            with fence(BackboneError, f"{self.folder / INDEX} is damaged: copy the checkpoint again"):
                files: dict[str, str] = dict(json.loads((self.folder / INDEX).read_text())["weight_map"])
                if not all(isinstance(file, str) and Path(file).name == file for file in files.values()):
                    raise ValueError("its weight_map names no files of this folder")
            missing = sorted({file for file in files.values() if not (self.folder / file).exists()})
            if missing:
                raise BackboneError(f"{self.folder} lacks {', '.join(missing)}, which {INDEX} names: copy the checkpoint again")
            return files
        return dict.fromkeys(self._header(SINGLE)[0], SINGLE)

    @property
    def has_own_head(self) -> bool:
        """Whether the output head is a matrix of its own and not the embedding."""
        return self.family.head_name in self.files

    def tensor(self, name: str) -> Tensor:
        """Read one tensor into memory, in the precision it is stored in. Tied names find the one stored matrix."""
        stored = self._stored_name(name)
        file = self.folder / self.files[stored]
        entry, start = self._entry(self.files[stored], stored)
        first, last = entry["data_offsets"]
        if entry["dtype"] not in DTYPES:
            raise BackboneError(f"{file}: {stored} is stored as {entry['dtype']}: choose a checkpoint in {', '.join(DTYPES)}")
        # Plain reads into the tensor's own memory: pages of a mapped file count as resident for as long as the file is open.
        buffer = torch.empty(last - first, dtype=torch.uint8)
        with file.open("rb") as stream:
            stream.seek(start + first)
            if stream.readinto(buffer.numpy()) != last - first:  # type: ignore[arg-type]  # arrays are buffers from Python 3.12 on
                raise BackboneError(f"{file} is cut short in {stored}: copy the checkpoint again")
        return buffer.view(DTYPES[entry["dtype"]]).view(entry["shape"])

    def shape(self, name: str) -> tuple[int, ...]:
        """Return a tensor's shape from its file's header."""
        stored = self._stored_name(name)
        return tuple(self._entry(self.files[stored], stored)[0]["shape"])

    def names(self) -> Iterator[str]:
        yield from self.files

    def fingerprint(self) -> str:
        """Return the hex digest of architecture and weights: any changed weight changes it."""
        files = {self.folder / file for file in self.files.values()}
        described = json.dumps([vars_of(self.spec), self.files], sort_keys=True)
        return remembered(files, described, lambda: fingerprint_of(self.spec, self.family.canonical(self.files), self.tensor))

    def _stored_name(self, name: str) -> str:
        for candidate in self.family.stored_names(name):
            if candidate in self.files:
                return candidate
        raise BackboneError(f"{self.folder} has no tensor {name}: it is not a whole {self.spec.model_type} checkpoint")

    def _entry(self, file: str, name: str) -> tuple[dict[str, Any], int]:
        """Return what a file's header says of a tensor, and where the file's data start."""
        header, start = self._header(file)
        if name not in header:
            raise BackboneError(f"{self.folder / file} has no tensor {name}, which {INDEX} names there: copy the checkpoint again")
        return header[name], start

    def _header(self, file: str) -> tuple[dict[str, Any], int]:
        if file not in self._headers:
            path = self.folder / file
            with fence(BackboneError, f"{path} is not a whole safetensors file: copy the checkpoint again"):
                with safe_open(path, framework="pt"):  # checks the header against the file's length
                    pass
                with path.open("rb") as stream:
                    length = int.from_bytes(stream.read(8), "little")
                    header = json.loads(stream.read(length))
            header.pop("__metadata__", None)
            self._headers[file] = header, 8 + length
        return self._headers[file]


def open_checkpoint(name: str, revision: str | None = None) -> Checkpoint:
    """Open a checkpoint by local path, embedded name ("embedded:tiny-t5") or hub name.

    Raises:
        BackboneError: it is not there, of no known family, or holds no safetensors.
    """
    path = resolve(name)
    folder = Path(path) if Path(path).exists() else _download(path, revision)
    with fence(BackboneError, f"{folder}/config.json can't be read as a model configuration"):
        config = _of_text(AutoConfig.from_pretrained(folder, trust_remote_code=False))
    family_of(config.model_type, name)
    if not (folder / INDEX).exists() and not (folder / SINGLE).exists():
        found = sorted(file.name for file in folder.glob("pytorch_model*"))
        hint = f" ({found[0]} is a pickle, which can run code and is never loaded)" if found else ""
        raise BackboneError(f"{name} has no {SINGLE}{hint}: choose a revision with safetensors, or convert it with save_pretrained")
    return Checkpoint(name, revision, folder, config)


def _of_text(config: Any) -> Any:
    """Return the configuration of the model's text part; of a model of text alone, as it is."""
    if config.model_type not in TEXT_PARTS:
        return config
    text = config.get_text_config()
    text.eos_token_id = getattr(config, "eos_token_id", None) or text.eos_token_id  # said outside of it, if anywhere
    return text


def spec_of(config: Any) -> BackboneSpec:
    """Return what a side network must know of the model that a transformers configuration describes."""
    return family_of(config.model_type, type(config).__name__).spec(config)


def fingerprint_of(spec: BackboneSpec, names: Iterable[str], read: Callable[[str], Tensor]) -> str:
    """Return a SHA-256 over the architecture and every weight in float32: a live model and the checkpoint it came from agree."""
    digest = hashlib.sha256(json.dumps(vars_of(spec), sort_keys=True).encode())
    for name in sorted(names):
        digest.update(name.encode())
        for part in torch.split(read(name).detach().flatten(), 1 << 22):  # 16 MB at a time in float32
            digest.update(part.to("cpu", torch.float32).contiguous().numpy().data)
    return digest.hexdigest()


def vars_of(spec: BackboneSpec) -> dict[str, Any]:
    """Return a spec's fields as a plain dictionary."""
    return {field.name: getattr(spec, field.name) for field in dataclasses.fields(spec)}


def read_to(checkpoint: Checkpoint, name: str, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Read one tensor straight into its final precision and place; the stored copy is released at once."""
    return checkpoint.tensor(name).to(device=device, dtype=dtype)


def _download(name: str, revision: str | None) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    if name.startswith((".", "/", "~")) or name.count("/") > 1:
        raise BackboneError(f"backbone.checkpoint {name!r} is no folder: write an existing path or a hub name such as google-t5/t5-base")
    try:
        return Path(snapshot_download(name, revision=revision, allow_patterns=["*.json", "*.safetensors", "*.model"]))
    except HFValidationError as error:
        raise BackboneError(f"backbone.checkpoint {name!r} is neither a folder nor a hub name: {_first_line(error)}") from error
    except (LocalEntryNotFoundError, HfHubHTTPError, OSError) as error:
        raise BackboneError(
            f"backbone.checkpoint {name!r} is not on this machine and the hub can't be reached or lacks it ({type(error).__name__}): "
            "download it first where there is a network, or write the path of a folder"
        ) from error


def _first_line(error: Exception) -> str:
    return str(error).strip().split("\n")[0]
