"""What trains on a T5Gemma 2, in closed form; imports no torch."""

from __future__ import annotations

from collections.abc import Mapping

from lst_scale.backbone.families import Numbers
from lst_scale.backbone.families.t5gemma.config import problem_of
from lst_scale.backbone.families.t5gemma.spec import T5GemmaSpec, spec_from
from lst_scale.errors import BackboneError
from lst_scale.recipe.method import AdaptersRecipe, BitfitRecipe, FullRecipe, LoraRecipe, LstRecipe, Method, PromptRecipe

NO_SOURCE_ATTENTION = "a T5Gemma 2 attends to the source in its decoder's one attention: remove method.cross_attention"


class T5GemmaNumbers:
    """All that can be known of a T5Gemma 2 without torch."""

    spec_type = T5GemmaSpec
    head_name = "lm_head.out_proj.weight"
    spec_from = staticmethod(spec_from)
    problem_of = staticmethod(problem_of)

    def lora_targets(self, spec: T5GemmaSpec) -> Mapping[str, str]:
        """Attention's matrices go by T5's names as well, so that a recipe serves both families."""
        return {name: name for name in _matrices(spec)} | {name: f"{name}_proj" for name in ("q", "k", "v", "o")}

    def trainable_parameters(self, spec: T5GemmaSpec, own_head: bool, method: Method) -> int:
        if isinstance(method, FullRecipe):
            return backbone_parameters(spec, own_head)
        if isinstance(method, LoraRecipe):
            widths, names = _matrices(spec), self.lora_targets(spec)
            per_block = method.rank * sum(sum(widths[name]) for name in {names[target] for target in method.targets})
            return (spec.num_layers + spec.num_decoder_layers) * per_block + (_biases(spec) if method.bitfit else 0)
        if isinstance(method, PromptRecipe):
            return method.num_vectors * spec.d_model
        if isinstance(method, BitfitRecipe):
            return _biases(spec)
        if isinstance(method, AdaptersRecipe):
            return _adapters(spec, method)
        assert isinstance(method, LstRecipe), "a probe is counted without its family"
        return _ladder(spec, method)

    def backbone_parameters(self, spec: T5GemmaSpec, own_head: bool) -> int:
        return backbone_parameters(spec, own_head)


def _matrices(spec: T5GemmaSpec) -> dict[str, tuple[int, int]]:
    """Return the inputs and outputs of a block's matrices."""
    d, q, kv, f = spec.d_model, spec.num_heads * spec.head_dim, spec.num_kv_heads * spec.head_dim, spec.d_ff
    attention = {"q_proj": (d, q), "k_proj": (d, kv), "v_proj": (d, kv), "o_proj": (q, d)}
    return attention | {"gate_proj": (d, f), "up_proj": (d, f), "down_proj": (f, d)}


def _norms(spec: T5GemmaSpec) -> int:
    """Return the weights of a block's norms."""
    return 4 * spec.d_model + 2 * spec.head_dim


def _biases(spec: T5GemmaSpec) -> int:
    """Return those that are added: one for each output of a linear map, a norm and the head."""
    block = sum(wide for _, wide in _matrices(spec).values()) + _norms(spec)
    return (spec.num_layers + spec.num_decoder_layers) * block + 2 * spec.d_model + spec.vocab_size


def _adapters(spec: T5GemmaSpec, method: AdaptersRecipe) -> int:
    if method.cross_attention:
        raise BackboneError(NO_SOURCE_ATTENTION)
    adapter = 2 * spec.d_model * method.bottleneck + method.bottleneck + spec.d_model
    block = 2 * adapter + (_norms(spec) if method.train_norms else 0)
    return (spec.num_layers + spec.num_decoder_layers) * block + (2 * spec.d_model if method.train_norms else 0)


def backbone_parameters(spec: T5GemmaSpec, own_head: bool) -> int:
    """Return the weights of what reads and writes text; a tied head counts once."""
    d, q, kv = spec.d_model, spec.num_heads * spec.head_dim, spec.num_kv_heads * spec.head_dim
    biases = q + 2 * kv + d if spec.setting("attention_bias") else 0
    block = sum(inputs * outputs for inputs, outputs in _matrices(spec).values()) + _norms(spec) + biases
    ends = spec.vocab_size * d * (2 if own_head else 1) + 3 * d  # two final norms, and what stands after an image
    return (spec.num_layers + spec.num_decoder_layers) * block + ends


def _ladder(spec: T5GemmaSpec, method: LstRecipe) -> int:
    """Return the weights of a side network: of each stack blocks, |K| + 1 downsamples, |K| gates, a norm; and an upsample."""
    if method.carves:
        raise BackboneError(f"side blocks are not carved out of a {spec.model_type}: write method.initialization=random")
    if method.design != "transformer":
        what = "a decoder-only model" if method.design in ("pointwise", "tail") else "a T5 alone"
        raise BackboneError(f"method.design={method.design} stands beside {what}: beside a {spec.model_type} write transformer")
    r, kept = method.reduction_factor, spec.depth if method.side_layers == "all" else len(method.side_layers)
    width, hidden = spec.side_width(r), max(8, 8 * round(spec.d_ff / r / 8))
    kv = max(1, round(spec.num_kv_heads / r))
    heads = kv * max(1, round((method.side_heads or spec.num_heads) / r / kv))
    attention, feed_forward = 2 * width * (heads + kv) * spec.head_dim + 2 * width, 3 * width * hidden + 2 * width
    downsample = spec.d_model * width + width
    if method.downsample_rank is not None:
        downsample = spec.d_model * method.downsample_rank + method.downsample_rank * width + width
    gate = {"learnable": 1, "per_channel": width, "fixed": 0, "none": 0}[method.gate]
    per_stack = kept * (attention + feed_forward + downsample + gate) + downsample + width
    upsample = width * spec.d_model + spec.d_model
    return 2 * per_stack + kept * attention + upsample + int(method.merge_last and not method.start_as_backbone)


NUMBERS: Numbers = T5GemmaNumbers()
