"""LoRA and prompt tuning by peft: what they save loads in plain peft, and the other way round."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lst_scale.backbone.families import Family
from lst_scale.errors import LadderError
from lst_scale.methods.base import trained_parameters, whole_shape
from lst_scale.methods.full import WholeModelTrainee
from lst_scale.methods.inside import add_biases
from lst_scale.recipe.method import LoraRecipe, PromptRecipe
from lst_scale.side.files import read_weights
from lst_scale.system.durable import write_directory

ADAPTER = "adapter_model.safetensors"


def with_lora(model: Any, family: Family, recipe: LoraRecipe, checkpoint: str, seed: int) -> Any:
    """Return `model` with LoRA on the chosen matrices of every attention; with `bitfit` on every bias too, as in the release."""
    from peft import LoraConfig

    if recipe.bitfit:
        add_biases(model, family)
    targets = [f"{name}.inner" for name in recipe.targets] if recipe.bitfit else list(recipe.targets)
    config = LoraConfig(
        task_type=family.peft_task,
        r=recipe.rank,
        lora_alpha=recipe.alpha,
        lora_dropout=recipe.dropout,
        target_modules=targets,
        base_model_name_or_path=checkpoint,
    )
    wrapped = _wrap(model, config, seed)
    if recipe.bitfit:
        for name, parameter in wrapped.named_parameters():
            if name.endswith(".bias"):
                parameter.requires_grad_(True)
    return wrapped


def with_prompt(model: Any, family: Family, recipe: PromptRecipe, checkpoint: str, seed: int) -> Any:
    """Return `model` with trained vectors before the source, which start as the embedding's first rows, as in the release."""
    from peft import PromptTuningConfig

    config = PromptTuningConfig(
        task_type=family.peft_task,
        num_virtual_tokens=recipe.num_vectors,
        num_transformer_submodules=1,  # before the source alone
        base_model_name_or_path=checkpoint,
    )
    wrapped = _wrap(model, config, seed)
    with torch.no_grad():
        (weight,) = trained_parameters(wrapped).values()
        weight.copy_(family.embedding(model)[: recipe.num_vectors])
    return wrapped


def _wrap(model: Any, config: Any, seed: int) -> Any:
    from peft import get_peft_model

    model.config.tie_word_embeddings = True  # what transformers 5 sets; peft only looks for a merge's sake
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return get_peft_model(model, config, autocast_adapter_dtype=True)


class PeftTrainee(WholeModelTrainee):
    """Saved and loaded in peft's own format."""

    module: Any

    def save(self, folder: Path, weights: Mapping[str, Tensor]) -> None:
        if any(name.endswith(".bias") for name in weights):
            super().save(folder, weights)  # peft has no place for the release's biases
            return
        write_directory(folder, lambda partial: self.module.save_pretrained(partial, state_dict=dict(weights)), self.load)

    def load(self, folder: Path) -> dict[str, Tensor]:
        if not (folder / ADAPTER).is_file():
            return super().load(folder)
        from peft import get_peft_model_state_dict

        found = read_weights(folder / ADAPTER)
        expected = trained_parameters(self.module)
        live = {name: parameter.detach().cpu() for name, parameter in expected.items()}
        # peft's files leave out the adapter's name; ask peft how it would write each of our weights.
        theirs = {}
        for name, tensor in live.items():
            (key,) = get_peft_model_state_dict(self.module, state_dict={name: tensor}) or {name: tensor}
            theirs[key] = name
        wrong = sorted(found.keys() ^ theirs.keys())
        wrong += [key for key in found.keys() & theirs.keys() if found[key].shape != whole_shape(expected[theirs[key]])]
        if wrong:
            raise LadderError(f"{folder / ADAPTER} does not fit this method and backbone: {', '.join(wrong[:3])} ({len(wrong)} in all)")
        return {theirs[key]: tensor for key, tensor in found.items()}
