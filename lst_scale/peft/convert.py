"""A run's side_network folder as a PEFT adapter's, and back: the same weights and the same record under other names."""

from __future__ import annotations

from pathlib import Path

import torch
from peft import LoraConfig, TaskType
from peft.config import PeftConfig
from safetensors.torch import load_file, save_file

from lst_scale.backbone.families import numbers_of
from lst_scale.backbone.taps import BackboneIdentity
from lst_scale.errors import LadderError, fence
from lst_scale.peft.config import LadderPeftConfig
from lst_scale.peft.layer import LadderLayer
from lst_scale.peft.model import CHILD
from lst_scale.side import files
from lst_scale.side.config import LadderConfig
from lst_scale.side.network import SideNetwork, TailNetwork
from lst_scale.system.durable import write_directory

WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
BEFORE = f"base_model.model.{CHILD}.{LadderLayer.adapter_layer_names[0]}."


def adapter_from_side_network(side_network: str | Path, adapter: str | Path) -> Path:
    """Write a saved side network as a folder that `PeftModel.from_pretrained` reads, and return it: of design tail as LoRA.

    Raises:
        LadderError: the folder is not whole, or its design reads images.
    """
    saved = files.read(Path(side_network))
    if saved.config.design == "tail":
        return _lora_from_tail(saved, Path(adapter))
    config = LadderPeftConfig.of(
        saved.config,
        task_type=TaskType.CAUSAL_LM if saved.spec.one_stack else TaskType.SEQ_2_SEQ_LM,
        base_model_name_or_path=saved.identity.checkpoint,
        revision=saved.identity.revision,
        inference_mode=True,
    )
    weights = {BEFORE + files.PREFIX + name: tensor.contiguous() for name, tensor in saved.weights.items()}
    weights[BEFORE + files.RECORD] = files.as_bytes(files.record_of(saved.config, saved.identity, saved.spec))

    def fill(partial: Path) -> None:
        save_file(weights, partial / WEIGHTS, metadata={"format": "pt"})
        config.save_pretrained(partial)

    def check(whole: Path) -> None:
        with fence(LadderError, f"{whole} could not be read back"):
            if load_file(whole / WEIGHTS).keys() != weights.keys() or not isinstance(PeftConfig.from_pretrained(whole), LadderPeftConfig):
                raise LadderError("it is not what was written")

    write_directory(Path(adapter), fill, check)
    return Path(adapter)


def _lora_from_tail(saved: files.Saved, adapter: Path) -> Path:
    """Write the updates of a tail as those of PEFT's LoRA in the same blocks: they are the same sums."""
    side, tail = SideNetwork(saved.spec, saved.config), saved.config.tail
    assert isinstance(side, TailNetwork) and tail is not None
    config = LoraConfig(
        task_type=TaskType.CAUSAL_LM,
        base_model_name_or_path=saved.identity.checkpoint,
        revision=saved.identity.revision,
        inference_mode=True,
        r=tail.rank,
        lora_alpha=tail.alpha,
        target_modules=sorted(side.stack.paths),
        layers_to_transform=[int(number) for number in side.stack.blocks],
        layers_pattern="layers",
    )
    weights = {}
    for number, updates in side.stack.blocks.items():
        for matrix, path in side.stack.paths.items():
            before, name = f"base_model.model.model.layers.{number}.{path}", f"stack.blocks.{number}.{matrix}"
            assert matrix in updates
            weights[f"{before}.lora_A.weight"] = saved.weights[f"{name}.down"].contiguous()
            weights[f"{before}.lora_B.weight"] = saved.weights[f"{name}.up"].contiguous()

    def fill(partial: Path) -> None:
        save_file(weights, partial / WEIGHTS, metadata={"format": "pt"})
        config.save_pretrained(partial)

    def check(whole: Path) -> None:
        with fence(LadderError, f"{whole} could not be read back"):
            if load_file(whole / WEIGHTS).keys() != weights.keys() or not isinstance(PeftConfig.from_pretrained(whole), LoraConfig):
                raise LadderError("it is not what was written")

    write_directory(adapter, fill, check)
    return adapter


def side_network_from_adapter(adapter: str | Path, side_network: str | Path) -> Path:
    """Write a saved PEFT adapter as a folder that `LadderModel.from_pretrained` reads, and return it.

    Raises:
        LadderError: the folder holds no ladder, or is damaged.
    """
    folder = Path(adapter)
    if not ((folder / CONFIG).is_file() and (folder / WEIGHTS).is_file()):
        raise LadderError(f"{folder} holds no PEFT adapter: it lacks {CONFIG} or {WEIGHTS}; give what save_pretrained wrote")
    with fence(LadderError, f"{folder} is damaged"):
        if not isinstance(PeftConfig.from_pretrained(folder), LadderPeftConfig):
            raise LadderError(f"{folder / CONFIG} is of another PEFT method: give the adapter of a ladder")
        found: dict[str, torch.Tensor] = load_file(folder / WEIGHTS)
        record = files.from_bytes(found.pop(BEFORE + files.RECORD))
        weights = {name.removeprefix(BEFORE + files.PREFIX): tensor for name, tensor in found.items()}
        numbers = record["backbone_spec"]
        files.write(
            Path(side_network),
            weights,
            LadderConfig(**record["config"]),
            BackboneIdentity.from_json(record["backbone"]),
            numbers_of(numbers["model_type"], folder).spec_type(**numbers),
        )
    return Path(side_network)
