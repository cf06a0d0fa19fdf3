"""What trains on a T5, in closed form; imports no torch."""

from __future__ import annotations

from collections.abc import Mapping

from lst_scale.backbone.families import Numbers
from lst_scale.backbone.families.t5.config import problem_of
from lst_scale.backbone.families.t5.spec import T5Spec, spec_from
from lst_scale.backbone.spec import refuse_misfit
from lst_scale.errors import BackboneError
from lst_scale.recipe.method import AdaptersRecipe, BitfitRecipe, FullRecipe, LoraRecipe, LstRecipe, Method, PromptRecipe

BESIDE_DECODERS = "stands beside a decoder-only model:"


class T5Numbers:
    """All that can be known of a T5 without torch."""

    spec_type = T5Spec
    head_name = "lm_head.weight"
    spec_from = staticmethod(spec_from)
    problem_of = staticmethod(problem_of)

    def lora_targets(self, spec: T5Spec) -> Mapping[str, str]:
        return {name: name for name in ("q", "k", "v", "o", *(("wi_0", "wi_1") if spec.gated else ("wi",)), "wo")}

    def trainable_parameters(self, spec: T5Spec, own_head: bool, method: Method) -> int:
        return trainable_parameters(spec, own_head, method)

    def backbone_parameters(self, spec: T5Spec, own_head: bool) -> int:
        return backbone_parameters(spec, own_head)


def trainable_parameters(spec: T5Spec, own_head: bool, method: Method) -> int:
    """Return how many weights a method trains on a backbone of this shape."""
    attentions = spec.num_layers + 2 * spec.num_decoder_layers
    inner, d = spec.num_heads * spec.d_kv, spec.d_model
    norms = 2 * spec.num_layers + 3 * spec.num_decoder_layers + 2
    if isinstance(method, FullRecipe):
        return backbone_parameters(spec, own_head)
    if isinstance(method, PromptRecipe):
        return method.num_vectors * d
    if isinstance(method, AdaptersRecipe):
        adapter = 2 * d * method.bottleneck + method.bottleneck + d
        sites = 2 * (spec.num_layers + spec.num_decoder_layers) + (spec.num_decoder_layers if method.cross_attention else 0)
        return sites * adapter + (norms * d if method.train_norms else 0)
    feed_forward = (2 if spec.gated else 1) * spec.d_ff + d
    biases = attentions * (3 * inner + d) + (spec.num_layers + spec.num_decoder_layers) * feed_forward + norms * d + spec.vocab_size
    if isinstance(method, BitfitRecipe):
        return biases
    if isinstance(method, LoraRecipe):
        width = {"q": d + inner, "k": d + inner, "v": d + inner, "o": inner + d}
        wide = {name: d + spec.d_ff for name in ("wi", "wi_0", "wi_1", "wo")}
        blocks = spec.num_layers + spec.num_decoder_layers
        pairs = sum(attentions * width[t] if t in width else blocks * wide[t] for t in method.targets)
        return method.rank * pairs + (biases if method.bitfit else 0)
    assert isinstance(method, LstRecipe), "a probe is counted without its family"
    return _ladder(spec, method)


def _ladder(spec: T5Spec, method: LstRecipe) -> int:
    """Return the weights of a side network: per stack the blocks, |K| + 1 downsamples, |K| gates, a norm, a table."""
    if method.design in ("pointwise", "tail"):
        raise BackboneError(f"design {method.design} {BESIDE_DECODERS} beside a {spec.model_type} write method.design=transformer")
    r = method.reduction_factor
    refuse_misfit(spec, r, () if method.side_layers == "all" else method.side_layers, method.side_heads)
    kept = spec.depth if method.side_layers == "all" else len(method.side_layers)
    if method.design == "adapter":
        return _adapter_design(spec, method, kept)
    heads = method.side_heads or spec.num_heads
    width, inner, hidden = spec.d_model // r, heads * (spec.d_kv // r), spec.d_ff // r
    feed_forward = (3 if spec.gated else 2) * width * hidden + width
    attention = 4 * width * inner + width
    ladder = 2 * attention if method.design == "cross_attention" else 0  # one more attention in the block of either stack
    downsample = spec.d_model * width + width
    if method.downsample_rank is not None:
        downsample = spec.d_model * method.downsample_rank + method.downsample_rank * width + width
    gate = 0 if method.design == "cross_attention" else _gate(method, width)
    per_stack = kept * (downsample + gate) + downsample + width + spec.relative_attention_num_buckets * heads
    blocks = kept * ((attention + feed_forward) + (2 * attention + feed_forward) + ladder)
    upsample = width * spec.d_model + spec.d_model
    return 2 * per_stack + blocks + upsample + int(method.merge_last and not method.start_as_backbone)


def _adapter_design(spec: T5Spec, method: LstRecipe, kept: int) -> int:
    d, r = spec.d_model, method.reduction_factor
    width, inner = d // r, (method.side_heads or spec.num_heads) * (spec.d_kv // r)
    adapter = d + (d * width + width) + (width * d + d)
    cross = (d * width + width) + (width * d + d) + 4 * width * inner + width
    return kept * (4 * adapter + cross + 2 * _gate(method, d)) + 2 * d + int(method.merge_last)


def _gate(method: LstRecipe, width: int) -> int:
    return {"learnable": 1, "per_channel": width, "fixed": 0, "none": 0}[method.gate]


def backbone_parameters(spec: T5Spec, own_head: bool) -> int:
    """Return the weights of the backbone; a tied head counts once."""
    inner = spec.num_heads * spec.d_kv
    feed_forward = (3 if spec.gated else 2) * spec.d_model * spec.d_ff + spec.d_model
    attention = 4 * spec.d_model * inner + spec.d_model
    table = spec.relative_attention_num_buckets * spec.num_heads
    encoder = spec.num_layers * (attention + feed_forward)
    decoder = spec.num_decoder_layers * (2 * attention + feed_forward)
    embeddings = spec.vocab_size * spec.d_model * (2 if own_head else 1)
    return encoder + decoder + embeddings + 2 * (spec.d_model + table)


NUMBERS: Numbers = T5Numbers()
