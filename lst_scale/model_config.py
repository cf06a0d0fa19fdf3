"""A checkpoint's config.json: found and checked before torch is imported and before any weight is read.

What transformers makes of a damaged one depends on where it is damaged; here it is one line that names the file and the value.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lst_scale.assets import resolve
from lst_scale.errors import BackboneError, fence, printable

CONFIG = "config.json"
T5_LIKE = ("t5", "mt5")
COUNTS = {  # the largest that makes sense: far above any model, far below what would take minutes to refuse
    "vocab_size": 10**8,
    "d_model": 10**6,
    "d_ff": 10**7,
    "d_kv": 10**6,
    "num_heads": 10**5,
    "num_layers": 1000,
    "num_decoder_layers": 1000,
    "relative_attention_num_buckets": 10**6,
    "relative_attention_max_distance": 10**9,
}
ACTIVATIONS = (
    "relu",
    "gelu",
    "gelu_new",
    "gelu_fast",
    "gelu_pytorch_tanh",
    "quick_gelu",
    "silu",
    "swish",
    "tanh",
    "relu6",
    "mish",
    "linear",
)
TOKENS = ("pad_token_id", "eos_token_id", "decoder_start_token_id")


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


def read_config(path: Path) -> dict[str, Any]:
    """Return what a config.json says; of a T5-like model, checked.

    Raises:
        BackboneError: it can't be read, or a value can't be meant.
    """
    with fence(BackboneError, f"{path} can't be read as a model configuration"):
        config = json.loads(path.read_bytes())
        if not isinstance(config, dict):
            raise BackboneError(f"{path} can't be read as a model configuration: it holds {_spoken(config)}: copy the checkpoint again")
        if config.get("model_type") in T5_LIKE:
            problem = _problem_of(config)
            if problem:
                raise BackboneError(f"{path}: {printable(problem)}: copy the checkpoint again, or mend the value")
    return config


def _problem_of(config: Mapping[str, Any]) -> str | None:
    """Return the first value that can't be meant, and what it should be. A key that is missing has the default of transformers."""
    for name, most in COUNTS.items():
        value = config.get(name)
        if name in config and not (name == "num_decoder_layers" and value is None) and not _is_count(value, most):
            return f"{name} {value!r} should be a whole number from 1 to {most}"
    if "dropout_rate" in config and not (_is_number(config["dropout_rate"]) and 0 <= config["dropout_rate"] < 1):
        return f"dropout_rate {config['dropout_rate']!r} should be a number of at least 0 and below 1"
    epsilon = config.get("layer_norm_epsilon", 1e-6)
    if not (_is_number(epsilon) and 0 < epsilon < 1):
        return f"layer_norm_epsilon {epsilon!r} should be a small number above 0"
    activation = config.get("feed_forward_proj", "relu")
    if not isinstance(activation, str) or activation.removeprefix("gated-") not in ACTIVATIONS:
        return f"feed_forward_proj {activation!r} should be relu, gated-gelu, or another of {', '.join(ACTIVATIONS)} with or without gated-"
    for name in TOKENS:
        problem = _token_problem(name, config)
        if problem:
            return problem
    return None


def _token_problem(name: str, config: Mapping[str, Any]) -> str | None:
    value, size = config.get(name), config.get("vocab_size", COUNTS["vocab_size"])
    ids = value if name == "eos_token_id" and isinstance(value, list) and value else [value]
    if value is None or all(type(each) is int and 0 <= each < size for each in ids):
        return None
    return f"{name} {value!r} should be the number of a token, from 0 to {size - 1}"


def _is_count(value: Any, most: int) -> bool:
    return type(value) is int and 1 <= value <= most


def _is_number(value: Any) -> bool:
    return type(value) in (int, float) and math.isfinite(value)


def _spoken(value: Any) -> str:
    kinds: dict[type, str] = {list: "a list", str: "a text", bool: "a truth value", type(None): "nothing"}
    return kinds.get(type(value), "a number")
