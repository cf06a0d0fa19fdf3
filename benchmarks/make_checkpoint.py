"""Write a T5 checkpoint of a published shape with random weights, shard by shard, for measurements without a network.

    python benchmarks/make_checkpoint.py google-t5/t5-3b /tmp/t5-3b

Weights are bf16 with T5's own initial scales, so activations have the size of an untrained T5's. One tensor is in memory at a time,
plus the shard that is being filled. The embedded tokenizer is put beside it, with pieces that no text has up to the vocabulary's size.
"""

from __future__ import annotations

import argparse
import json
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import T5Config, T5ForConditionalGeneration

from lst_scale.side.count import Shape, shape_of
from lst_scale.system.assets import resolve

SHARD_BYTES = 1 << 30


def config_of(shape: Shape) -> T5Config:
    """Return the transformers configuration of a shape."""
    spec: Any = shape.spec  # a T5's
    names = ("vocab_size", "d_model", "d_ff", "d_kv", "num_heads", "num_layers", "num_decoder_layers")
    return T5Config(
        **{name: getattr(spec, name) for name in names},
        feed_forward_proj="gated-gelu" if spec.gated else "relu",
        tie_word_embeddings=not shape.own_head,
        decoder_start_token_id=0,
    )


def initial_std(name: str, config: T5Config) -> float:
    """Return T5's initial standard deviation of a weight; norms, which start at 1, have none."""
    if ".q." in name:
        return float((config.d_model * config.d_kv) ** -0.5)
    if ".o." in name:
        return float((config.num_heads * config.d_kv) ** -0.5)
    if ".wo." in name:
        return float(config.d_ff**-0.5)
    return 1.0 if "shared" in name or "lm_head" in name else float(config.d_model**-0.5)


def random_weight(name: str, parameter: nn.Parameter, config: T5Config, generator: torch.Generator) -> Tensor:
    if "layer_norm" in name:
        return torch.ones(parameter.shape, dtype=torch.bfloat16)
    # Uniform with the same deviation: drawn three times as fast as normal numbers, and shape is all that matters here.
    width = initial_std(name, config) * 3**0.5
    empty = torch.empty(parameter.shape, dtype=torch.bfloat16, device=generator.device)
    return empty.uniform_(-width, width, generator=generator).cpu()


def write_tokenizer(folder: Path, vocab_size: int) -> None:
    """Write the embedded tokenizer, filled up to `vocab_size`: one that knows fewer tokens than the model is refused as another model's."""
    embedded = Path(resolve("embedded:tiny-t5"))
    tokenizer = json.loads((embedded / "tokenizer.json").read_text())
    pieces = tokenizer["model"]["vocab"]
    pieces += [[f"<unused_{number}>", -100.0] for number in range(len(pieces), vocab_size)]
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    shutil.copy(embedded / "tokenizer_config.json", folder)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("shape", help="a name in lst_scale/side/shapes.json, such as google-t5/t5-3b")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--device", default="cpu", help="where weights are drawn; a GPU draws other ones, and ten times as fast")
    options = parser.parse_args()
    shape = shape_of(options.shape)
    if shape is None:
        parser.error(f"{options.shape} is not in lst_scale/side/shapes.json")
    config = config_of(shape)
    options.folder.mkdir(parents=True, exist_ok=True)
    with torch.device("meta"):
        model = T5ForConditionalGeneration(config)
    wanted = dict(model.named_parameters()) | ({"lm_head.weight": model.lm_head.weight} if shape.own_head else {})
    generator = torch.Generator(options.device).manual_seed(0)
    weight_map: dict[str, str] = {}
    shard: dict[str, Tensor] = {}

    def flush() -> None:
        file = f"model-{len(set(weight_map.values())) + 1:05d}.safetensors"
        save_file(shard, options.folder / file, metadata={"format": "pt"})
        weight_map.update(dict.fromkeys(shard, file))
        shard.clear()

    for name, parameter in wanted.items():
        shard[name] = random_weight(name, parameter, config, generator)
        if sum(tensor.numel() * 2 for tensor in shard.values()) > SHARD_BYTES:
            flush()
    flush()
    (options.folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    saved = config.to_dict() | {"tie_word_embeddings": not shape.own_head, "architectures": ["T5ForConditionalGeneration"]}
    (options.folder / "config.json").write_text(json.dumps(saved, indent=1))
    write_tokenizer(options.folder, config.vocab_size)


if __name__ == "__main__":
    main()
