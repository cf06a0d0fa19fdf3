"""LoRA and prompt tuning by peft: what they save loads in plain peft, and the other way round."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from lst_scale.backbone.families import Family
from lst_scale.errors import LadderError
from lst_scale.methods.base import trained_parameters, whole_shape
from lst_scale.methods.full import WholeModelTrainee
from lst_scale.methods.inside import WithBias, add_biases
from lst_scale.recipe.method import LoraRecipe, PromptRecipe
from lst_scale.side.files import read_weights
from lst_scale.system.durable import write_directory

ADAPTER, PROMPT = "adapter_model.safetensors", "prompt_embeddings"  # peft's names of its file and of trained vectors in it


def with_lora(model: Any, family: Family, recipe: LoraRecipe, checkpoint: str, seed: int) -> Any:
    """Return `model` with LoRA on the chosen matrices of every attention; with `bitfit` on every bias too, as in the release."""
    from peft import LoraConfig, get_peft_model

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
    wrapped = _wrap(get_peft_model, model, config, seed)
    if recipe.bitfit:
        for module in wrapped.modules():
            if isinstance(module, WithBias):
                module.bias.requires_grad_(True)
    return wrapped


def with_prompt(model: Any, family: Family, recipe: PromptRecipe, checkpoint: str, seed: int) -> Any:
    """Return `model` with trained vectors before the source, which start as its first words are embedded, as in the release."""
    from peft import PromptTuningConfig, get_peft_model

    from lst_scale.methods.prompted import PromptedText

    spec, embedding_VD = family.spec(model.config), family.embedding(model)
    config = PromptTuningConfig(
        task_type=family.peft_task,
        num_virtual_tokens=recipe.num_vectors,
        num_transformer_submodules=1,  # before the source alone
        token_dim=spec.d_model,
        num_layers=spec.depth,
        num_attention_heads=spec.num_heads,
        base_model_name_or_path=checkpoint,
    )
    make = PromptedText if family.peft_task == "CAUSAL_LM" else get_peft_model
    wrapped = _wrap(make, model, config, seed)
    with torch.no_grad():
        (weight,) = trained_parameters(wrapped).values()
        first = torch.arange(recipe.num_vectors, device=embedding_VD.device) % len(embedding_VD)
        weight.copy_(embedding_VD[first] * family.embedding_scale(spec))
    return wrapped


def _wrap(make: Callable[..., Any], model: Any, config: Any, seed: int) -> Any:
    model.config.tie_word_embeddings = True  # what transformers 5 sets; peft only looks for a merge's sake
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return make(model, config, autocast_adapter_dtype=True)


class LoraTrainee(WholeModelTrainee):
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


class PromptTrainee(WholeModelTrainee):
    """Saved and loaded in peft's own format; peft itself would ask a partitioned module of one rank alone, which waits for the others."""

    module: Any

    def save(self, folder: Path, weights: Mapping[str, Tensor]) -> None:
        (vectors_PD,) = weights.values()
        config = replace(self.module.active_peft_config, inference_mode=True)

        def fill(partial: Path) -> None:
            save_file({PROMPT: vectors_PD.contiguous()}, partial / ADAPTER, metadata={"format": "pt"})
            config.save_pretrained(partial)

        write_directory(folder, fill, self.load)

    def load(self, folder: Path) -> dict[str, Tensor]:
        found = read_weights(folder / ADAPTER)
        ((name, parameter),) = trained_parameters(self.module).items()
        shape = whole_shape(parameter)
        if found.keys() != {PROMPT} or found[PROMPT].shape != shape:
            raise LadderError(f"{folder / ADAPTER} does not fit this method and backbone: it should hold {PROMPT} of {tuple(shape)} alone")
        return {name: found[PROMPT]}
