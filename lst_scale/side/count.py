"""Count what trains, in closed form: no torch, no weights, no network. Shapes of well-known checkpoints are in shapes.json."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lst_scale.assets import resolve
from lst_scale.errors import BackboneError, LadderError
from lst_scale.recipe import AdaptersRecipe, BitfitRecipe, FullRecipe, LoraRecipe, LstRecipe, Method, PromptRecipe, Recipe

SHAPES = Path(__file__).with_name("shapes.json")


@dataclass(frozen=True, kw_only=True)
class Shape:
    """The numbers of a T5-family checkpoint that counting needs, under T5Config's names."""

    vocab_size: int
    d_model: int
    d_ff: int
    d_kv: int
    num_heads: int
    num_layers: int
    num_decoder_layers: int
    gated: bool
    own_head: bool
    num_buckets: int = 32


def trainable_parameters(shape: Shape, method: Method) -> int:
    """Return how many weights a method trains on a backbone of this shape."""
    attentions = shape.num_layers + 2 * shape.num_decoder_layers
    inner, d = shape.num_heads * shape.d_kv, shape.d_model
    norms = 2 * shape.num_layers + 3 * shape.num_decoder_layers + 2
    if isinstance(method, FullRecipe):
        return backbone_parameters(shape)
    if isinstance(method, PromptRecipe):
        return method.num_vectors * d
    if isinstance(method, AdaptersRecipe):
        adapter = 2 * d * method.bottleneck + method.bottleneck + d
        return 2 * (shape.num_layers + shape.num_decoder_layers) * adapter + norms * d
    feed_forward = (2 if shape.gated else 1) * shape.d_ff + d
    biases = attentions * (3 * inner + d) + (shape.num_layers + shape.num_decoder_layers) * feed_forward + norms * d + shape.vocab_size
    if isinstance(method, BitfitRecipe):
        return biases
    if isinstance(method, LoraRecipe):
        width = {"q": d + inner, "k": d + inner, "v": d + inner, "o": inner + d}
        wide = {name: d + shape.d_ff for name in ("wi", "wi_0", "wi_1", "wo")}
        blocks = shape.num_layers + shape.num_decoder_layers
        there = ("wi_0", "wi_1", "wo") if shape.gated else ("wi", "wo")
        pairs = sum(attentions * width[t] if t in width else blocks * wide[t] for t in method.targets if t in width or t in there)
        return method.rank * pairs + (biases if method.bitfit else 0)
    return _ladder(shape, method)


def _ladder(shape: Shape, method: LstRecipe) -> int:
    """Return the weights of a side network: per stack the blocks, |K| + 1 downsamples, |K| gates, a norm, a table."""
    r = method.reduction_factor
    bad = [f"{name} {value}" for name, value in (("d_model", shape.d_model), ("d_ff", shape.d_ff), ("d_kv", shape.d_kv)) if value % r]
    if bad:
        raise LadderError(f"reduction_factor {r} does not divide {', '.join(bad)}")
    depth = min(shape.num_layers, shape.num_decoder_layers)
    kept = depth if method.side_layers == "all" else len(method.side_layers)
    if method.side_layers != "all" and method.side_layers[-1] >= depth:
        raise LadderError(f"side_layers names block {method.side_layers[-1]}, but this backbone has blocks 0 to {depth - 1}")
    if method.design == "adapter":
        return _adapter_design(shape, method, kept)
    heads = method.side_heads or shape.num_heads
    width, inner, hidden = shape.d_model // r, heads * (shape.d_kv // r), shape.d_ff // r
    feed_forward = (3 if shape.gated else 2) * width * hidden + width
    attention = 4 * width * inner + width
    ladder = 2 * attention if method.design == "cross_attention" else 0  # one more attention in the block of either stack
    downsample = shape.d_model * width + width
    if method.downsample_rank is not None:
        downsample = shape.d_model * method.downsample_rank + method.downsample_rank * width + width
    gate = 0 if method.design == "cross_attention" else _gate(method, width)
    per_stack = kept * (downsample + gate) + downsample + width + shape.num_buckets * heads
    blocks = kept * ((attention + feed_forward) + (2 * attention + feed_forward) + ladder)
    upsample = width * shape.d_model + shape.d_model
    return 2 * per_stack + blocks + upsample + int(method.merge_last and not method.start_as_backbone)


def _adapter_design(shape: Shape, method: LstRecipe, kept: int) -> int:
    d, r = shape.d_model, method.reduction_factor
    width, inner = d // r, (method.side_heads or shape.num_heads) * (shape.d_kv // r)
    adapter = d + (d * width + width) + (width * d + d)
    cross = (d * width + width) + (width * d + d) + 4 * width * inner + width
    return kept * (4 * adapter + cross + 2 * _gate(method, d)) + 2 * d + int(method.merge_last)


def _gate(method: LstRecipe, width: int) -> int:
    return {"learnable": 1, "per_channel": width, "fixed": 0, "none": 0}[method.gate]


def backbone_parameters(shape: Shape) -> int:
    """Return the weights of the backbone; a tied head counts once."""
    inner = shape.num_heads * shape.d_kv
    feed_forward = (3 if shape.gated else 2) * shape.d_model * shape.d_ff + shape.d_model
    attention = 4 * shape.d_model * inner + shape.d_model
    table = shape.num_buckets * shape.num_heads
    encoder = shape.num_layers * (attention + feed_forward)
    decoder = shape.num_decoder_layers * (2 * attention + feed_forward)
    embeddings = shape.vocab_size * shape.d_model * (2 if shape.own_head else 1)
    return encoder + decoder + embeddings + 2 * (shape.d_model + table)


def shape_of(checkpoint: str) -> Shape | None:
    """Return a checkpoint's shape from the table or its local config.json; None when neither knows it.

    Raises:
        BackboneError: the folder holds another kind of model, or its config.json can't be read.
    """
    table: dict[str, dict[str, Any]] = json.loads(SHAPES.read_text())
    if checkpoint in table:
        return Shape(**table[checkpoint])
    folder = Path(resolve(checkpoint))
    if not (folder / "config.json").is_file():
        return None
    try:
        return _shape_in(folder, json.loads((folder / "config.json").read_text()))
    except (OSError, ValueError, KeyError) as error:
        raise BackboneError(f"{folder / 'config.json'} can't be read as a T5 configuration ({error}): copy the checkpoint again") from error


def _shape_in(folder: Path, config: dict[str, Any]) -> Shape:
    if config.get("model_type") not in ("t5", "mt5"):
        raise BackboneError(f"{folder} is a {config.get('model_type')!r} model: choose a checkpoint of type t5 or mt5")
    names = ("vocab_size", "d_model", "d_ff", "d_kv", "num_heads", "num_layers")
    return Shape(
        **{name: config[name] for name in names},
        num_decoder_layers=config.get("num_decoder_layers") or config["num_layers"],
        gated=str(config.get("feed_forward_proj", "relu")).startswith("gated"),
        own_head="lm_head.weight" in _stored_names(folder),
        num_buckets=config.get("relative_attention_num_buckets", 32),
    )


def _stored_names(folder: Path) -> set[str]:
    """Return the names in a checkpoint's safetensors, read from their headers: transformers 5 calls every T5 tied in config.json."""
    index, single = folder / "model.safetensors.index.json", folder / "model.safetensors"
    if index.is_file():
        return set(json.loads(index.read_text())["weight_map"])
    if not single.is_file():
        return set()
    with single.open("rb") as stream:
        return set(json.loads(stream.read(int.from_bytes(stream.read(8), "little"))))


def describe_count(recipe: Recipe) -> str:
    """Return one sentence: trainable weights, backbone weights, share."""
    shape = shape_of(recipe.backbone.checkpoint)
    if shape is None:
        return f"trainable parameters: unknown before {recipe.backbone.checkpoint} is downloaded"
    trainable, backbone = trainable_parameters(shape, recipe.method), backbone_parameters(shape)
    return f"trainable parameters: {trainable:,} of the backbone's {backbone:,} ({100 * trainable / backbone:.3f} %)"
