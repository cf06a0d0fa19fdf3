"""Recipes on small decoder-only models with a tokenizer of their own."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from helpers.llamas import make_llama
from helpers.paths import EMBEDDED
from helpers.recipes import recipe_writer
from helpers.t5gemmas import make_t5gemma
from helpers.training import train
from lst_scale.recipe.schema import load_recipe

METHOD = {
    "name": "lst",
    "reduction_factor": 8,
    "side_layers": [1, 3],
    "initialization": "random",
    "start_as_backbone": True,
    "merge_last": True,
}
TEMPLATE = "{word}: {definition} It is a kind of"
ENDS = {"bos_token": "<s>", "eos_token": "</s>"}


def make_tokenizer(**special: str) -> PreTrainedTokenizerFast:
    """Bytes in pairs, learned from the embedded rows, as GPT-2's and its heirs' are."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400, special_tokens=list(special.values()), initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    tokenizer.train_from_iterator((EMBEDDED / "wordnet/train.jsonl").read_text().splitlines()[:500], trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special)


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return make_tokenizer(**ENDS)


def save_with_tokenizer(model_type: str, tokenizer: PreTrainedTokenizerFast, folder: Path, **changes: Any) -> Path:
    """Save a small model that knows the tokenizer's vocabulary."""
    options: dict[str, Any] = {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": None} | changes | {"vocab_size": len(tokenizer)}
    model = make_t5gemma(**(options | {"pad_token_id": 1})) if model_type == "t5gemma2" else make_llama(model_type, **options)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory, tokenizer: PreTrainedTokenizerFast) -> Callable[[str], Path]:
    def make(model_type: str) -> Path:
        folder = tmp_path_factory.getbasetemp() / f"checkpoint-{model_type}"
        return folder if folder.exists() else save_with_tokenizer(model_type, tokenizer, folder)

    return make


@pytest.fixture
def write(checkpoint: Callable[[str], Path], tmp_path: Path) -> Callable[..., Path]:
    def write(name: str, model_type: str = "llama", **changes: Any) -> Path:
        common = {"method": METHOD, "task__template": TEMPLATE, "data__max_source_length": 40}
        common |= {"evaluation__method": "likelihood", "training__evaluate_every": 8, "optimizer__learning_rate": 3e-3}
        return recipe_writer(tmp_path, checkpoint(model_type))(name, **(common | changes))

    return write


def trained(path: Path) -> Path:
    train(path)
    recipe = load_recipe(str(path))
    return Path(recipe.output_dir) / recipe.run_name
