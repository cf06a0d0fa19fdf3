"""What trains on a decoder-only model, in closed form; imports no torch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from lst_scale.backbone.families import Numbers
from lst_scale.backbone.families.llama.config import problem_of
from lst_scale.backbone.families.llama.spec import LlamaSpec, spec_from
from lst_scale.errors import BackboneError, did_you_mean
from lst_scale.recipe.method import AdaptersRecipe, BitfitRecipe, FullRecipe, LoraRecipe, LstRecipe, Method, PromptRecipe, TailRecipe

NO_SOURCE_ATTENTION = "blocks of a decoder-only model have one attention: remove method.cross_attention"


class LlamaNumbers:
    """All that can be known of a decoder-only model without torch."""

    spec_type = LlamaSpec
    head_name = "lm_head.weight"
    spec_from = staticmethod(spec_from)
    problem_of = staticmethod(problem_of)

    def lora_targets(self, spec: LlamaSpec) -> Mapping[str, str]:
        """Attention's matrices go by T5's names as well, so that a recipe serves both families."""
        return _names(spec)

    def trainable_parameters(self, spec: LlamaSpec, own_head: bool, method: Method) -> int:
        if isinstance(method, FullRecipe):
            return backbone_parameters(spec, own_head)
        if isinstance(method, LoraRecipe):
            updates = spec.num_layers * _updates(spec, method.rank, method.targets)
            return updates + (_biases(spec) if method.bitfit else 0)
        if isinstance(method, PromptRecipe):
            return method.num_vectors * spec.d_model
        if isinstance(method, BitfitRecipe):
            return _biases(spec)
        if isinstance(method, AdaptersRecipe):
            return _adapters(spec, method)
        assert isinstance(method, LstRecipe), "a probe is counted without its family"
        return _ladder(spec, method)

    def backbone_parameters(self, spec: LlamaSpec, own_head: bool) -> int:
        return backbone_parameters(spec, own_head)


def _matrices(spec: LlamaSpec) -> dict[str, tuple[int, int]]:
    """Return the inputs and outputs of a block's matrices."""
    d, q, kv, f = spec.d_model, spec.num_heads * spec.head_dim, spec.num_kv_heads * spec.head_dim, spec.d_ff
    fused = {"qkv_proj": (d, q + 2 * kv), "gate_up_proj": (d, 2 * f)}
    plain = {"q_proj": (d, q), "k_proj": (d, kv), "v_proj": (d, kv), "gate_proj": (d, f), "up_proj": (d, f)}
    return (fused if spec.model_type == "phi3" else plain) | {"o_proj": (q, d), "down_proj": (f, d)}


def _names(spec: LlamaSpec) -> dict[str, str]:
    matrices = _matrices(spec)
    short = {name: next(matrix for matrix in matrices if name in matrix.partition("_")[0]) for name in ("q", "k", "v", "o")}
    return {name: name for name in matrices} | short


def _updates(spec: LlamaSpec, rank: int, targets: Sequence[str]) -> int:
    """Return the weights of low-rank updates in one block."""
    widths, names = _matrices(spec), _names(spec)
    return rank * sum(sum(widths[name]) for name in {names[target] for target in targets})


def _tail(spec: LlamaSpec, method: Any) -> int:
    """Return the weights of updates in the blocks after the one that is read."""
    tail = method.tail or TailRecipe()
    unknown = next((target for target in tail.targets if target not in _names(spec)), None)
    if unknown is not None:
        found = did_you_mean(unknown, tuple(_names(spec)))
        raise BackboneError(f"method.tail.targets: blocks of this backbone have no matrix {unknown!r}.{found}")
    read: int = method.side_layers[0]  # the recipe has seen that it is one block
    return max(0, spec.num_layers - 1 - read) * _updates(spec, tail.rank, tail.targets)


def _norms(spec: LlamaSpec) -> int:
    """Return the weights of a block's norms."""
    d, q, kv = spec.d_model, spec.num_heads * spec.head_dim, spec.num_kv_heads * spec.head_dim
    norms = {"gemma2": 4 * d, "gemma3_text": 4 * d + 2 * spec.head_dim, "qwen3": 2 * d + 2 * spec.head_dim}
    norms |= dict.fromkeys(("olmo2", "olmo3"), 2 * d + q + kv)
    return norms.get(spec.model_type, 2 * d)


def _biases(spec: LlamaSpec) -> int:
    """Return those that are added: one for each output of a linear map, a norm and the head."""
    outputs = sum(wide for _, wide in _matrices(spec).values())
    return spec.num_layers * (outputs + _norms(spec)) + spec.d_model + spec.vocab_size


def _adapters(spec: LlamaSpec, method: AdaptersRecipe) -> int:
    if method.cross_attention:
        raise BackboneError(NO_SOURCE_ATTENTION)
    adapter = 2 * spec.d_model * method.bottleneck + method.bottleneck + spec.d_model
    return spec.num_layers * (2 * adapter + (_norms(spec) if method.train_norms else 0)) + (spec.d_model if method.train_norms else 0)


def backbone_parameters(spec: LlamaSpec, own_head: bool) -> int:
    """Return the weights of the backbone; a tied head counts once."""
    d, q, kv = spec.d_model, spec.num_heads * spec.head_dim, spec.num_kv_heads * spec.head_dim
    matrices = sum(inputs * outputs for inputs, outputs in _matrices(spec).values())
    biases = q + 2 * kv if spec.model_type == "qwen2" else 0  # on queries, keys and values alone
    if spec.setting("attention_bias"):
        biases = q + 2 * kv + d
    if spec.setting("mlp_bias"):
        biases += 2 * spec.d_ff + d
    block = matrices + _norms(spec) + biases
    return spec.num_layers * block + spec.vocab_size * d * (2 if own_head else 1) + d


def _ladder(spec: LlamaSpec, method: LstRecipe) -> int:
    """Return the weights of a side network: blocks, |K| + 1 downsamples, |K| gates, a norm, an upsample."""
    if method.design in ("cross_attention", "adapter"):
        where = f"beside an encoder-decoder: beside a {spec.model_type} write method.design=transformer"
        raise BackboneError(f"design {method.design} stands {where}")
    if method.design == "tail":
        return _tail(spec, method)
    reason = spec.why_not_carved(method.reduction_factor, method.side_heads or spec.num_heads)
    if method.carves and reason is not None:
        raise BackboneError(f"{reason}: write method.initialization=random")
    r, kept = method.reduction_factor, spec.depth if method.side_layers == "all" else len(method.side_layers)
    width, hidden = spec.side_width(r), max(8, 8 * round(spec.d_ff / r / 8))
    heads, kv = spec.narrow_heads(r, method.side_heads or spec.num_heads)
    block = 2 * width * (heads + kv) * spec.head_dim + 3 * width * hidden + 2 * width
    if method.design == "pointwise":
        block = 3 * width * hidden + width
    downsample = spec.d_model * width + width
    if method.downsample_rank is not None:
        downsample = spec.d_model * method.downsample_rank + method.downsample_rank * width + width
    gate = {"learnable": 1, "per_channel": width, "fixed": 0, "none": 0}[method.gate]
    upsample = width * spec.d_model + spec.d_model
    merged = int(method.merge_last and not method.start_as_backbone)
    return kept * (block + downsample + gate) + downsample + width + upsample + merged


NUMBERS: Numbers = LlamaNumbers()
