"""A decoder-only model as a backbone: the names of its tensors, the parts of transformers' model, and how they are run.

Source and target share one stack: `read` runs the prompt and keeps its keys and values, `extend` goes on from them. What differs between
the kin is transformers' business (each model makes its own masks, scales and rotary embeddings) or stands in the spec as data.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import json
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, DynamicCache
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from lst_scale.backbone.cache_argument import cache_argument
from lst_scale.backbone.families import BlockRef
from lst_scale.backbone.families.llama.spec import LlamaSpec, spec_from
from lst_scale.backbone.masks import positions_of, whole_mask
from lst_scale.backbone.taps import FrozenHead
from lst_scale.errors import BackboneError
from lst_scale.inputs.keys import IGNORED

STACK = "decoder"
EMBEDDING, HEAD, NORM = "model.embed_tokens.weight", "lm_head.weight", "model.norm.weight"


def config_of(spec: LlamaSpec, **changes: Any) -> Any:
    """Return transformers' configuration of a model of this shape."""
    numbers = {
        "vocab_size": spec.vocab_size,
        "hidden_size": spec.d_model,
        "intermediate_size": spec.d_ff,
        "num_hidden_layers": spec.num_layers,
        "num_attention_heads": spec.num_heads,
        "num_key_value_heads": spec.num_kv_heads,
        "head_dim": spec.head_dim,
        "rms_norm_eps": spec.rms_norm_eps,
        "pad_token_id": spec.pad_token_id,
    }
    config = CONFIG_MAPPING[spec.model_type](**(json.loads(spec.settings) | numbers | changes))
    return config


@dataclass(frozen=True, kw_only=True)
class Prompt:
    """Keys and values of what comes before a target."""

    cache: DynamicCache
    context_length: int  # tokens at its beginning that stand before every row

    def repeated(self, num_rows: int) -> Prompt:
        """Return those of so many rows, given those of one: what is held is shared."""
        cache = continued(self.cache, None)
        for layer in cache.layers:
            layer.keys, layer.values = (held.expand(num_rows, -1, -1, -1) for held in (layer.keys, layer.values))
        return Prompt(cache=cache, context_length=self.context_length)


class LlamaModel:
    """The whole model: transformers' ...ForCausalLM."""

    stacks: ClassVar[tuple[str, str]] = (STACK, STACK)
    embedding_name: ClassVar[str] = EMBEDDING
    head_name: ClassVar[str] = HEAD
    answers_from_source: ClassVar[bool] = False
    live_classes: ClassVar[tuple[str, ...]] = (
        "LlamaForCausalLM",
        "Qwen2ForCausalLM",
        "Qwen3ForCausalLM",
        "MistralForCausalLM",
        "GemmaForCausalLM",
        "Gemma2ForCausalLM",
        "Gemma3ForCausalLM",
        "Phi3ForCausalLM",
        "SmolLM3ForCausalLM",
        "Olmo2ForCausalLM",
        "Olmo3ForCausalLM",
        "GraniteForCausalLM",
    )

    def stored_names(self, name: str) -> tuple[str, ...]:
        names = (name, EMBEDDING) if name == HEAD else (name,)  # a head that is stored nowhere is the embedding
        return tuple(stored for name in names for stored in (name, *_names_beside_images(name)))

    def canonical(self, names: Iterable[str]) -> set[str]:
        of_text = (_name_of_text(name) for name in names if not name.endswith("rotary_emb.inv_freq"))  # old checkpoints store that, too
        return {name for name in of_text if name is not None}

    def spec(self, config: Any) -> LlamaSpec:
        return spec_from(config.to_dict())

    def unfilled(self, spec: LlamaSpec, *, shards: int) -> Any:
        changes = {
            "num_attention_heads": spec.num_heads // shards,
            "num_key_value_heads": max(1, spec.num_kv_heads // shards),
            "intermediate_size": spec.d_ff // shards,
        }
        return AutoModelForCausalLM.from_config(config_of(spec, **changes))

    def skeleton(self, config: Any) -> Any:
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config)
        fill_buffers(model, config)
        return model

    def blocks(self, spec: LlamaSpec) -> tuple[BlockRef, ...]:
        return tuple(BlockRef(stack=STACK, index=i, path=f"model.layers.{i}") for i in range(spec.num_layers))

    def ends(self, *, own_head: bool) -> tuple[str, ...]:
        return (EMBEDDING, *((HEAD,) if own_head else ()), NORM)

    def tie(self, model: Any, *, own_head: bool) -> None:
        if not own_head:
            model.lm_head.weight = model.model.embed_tokens.weight

    def embedding(self, model: Any) -> Tensor:
        weight_VD: Tensor = model.model.embed_tokens.weight
        return weight_VD

    def embedding_scale(self, spec: LlamaSpec) -> float:
        return float(spec.d_model**0.5) if spec.model_type.startswith("gemma") else 1.0

    def head(self, model: Any, spec: LlamaSpec) -> FrozenHead:
        divided_by, soft_cap = spec.setting("logits_scaling", 1.0), spec.setting("final_logit_softcapping")
        return FrozenHead(weight_VD=model.lm_head.weight, scale=1.0, divided_by=float(divided_by), soft_cap=soft_cap)

    def head_scale(self, spec: LlamaSpec) -> float:
        return 1.0

    def divide(self, spec: LlamaSpec, ids_BS: Tensor, mask_BS: Tensor, labels_BT: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The target begins with the last token of the prompt, which predicts the first of the answer; the source ends before it.

        A prompt of one token, which rows that fill a batch up have, is source and begins the target as well: a source is never empty.
        """
        last_B1 = (mask_BS.sum(1, keepdim=True) - 1).clamp(min=0)
        target_BT = torch.cat([ids_BS.gather(1, last_B1), labels_BT[:, :-1]], 1)
        ends_BS = torch.arange(ids_BS.shape[1], device=ids_BS.device)[None] == last_B1
        mask_BS = mask_BS.masked_fill(ends_BS & (last_B1 > 0), 0)
        longest = max(1, ids_BS.shape[1] - 1)  # some row has all tokens
        return ids_BS[:, :longest], mask_BS[:, :longest], target_BT.masked_fill(target_BT == IGNORED, spec.pad_token_id)

    def answers(self, generate: Callable[..., Tensor], ids_BS: Tensor, mask_BS: Tensor, **options: Any) -> Tensor:
        """Prompts are moved to the right, since new tokens come after them."""
        width = ids_BS.shape[1]
        places = (torch.arange(width, device=ids_BS.device)[None] + mask_BS.sum(1, keepdim=True)) % width
        moved = generate(input_ids=ids_BS.gather(1, places), attention_mask=mask_BS.gather(1, places), **options)
        return moved[:, width:]

    def stack_of(self, model: Any, *, target: bool) -> nn.ModuleList:
        blocks: nn.ModuleList = model.model.layers
        return blocks

    def context(self, model: Any, embedding_1CD: Tensor) -> Prompt:
        cache, length = DynamicCache(config=model.config), embedding_1CD.shape[1]
        run(model, embedding_1CD, torch.ones(1, length, dtype=torch.long, device=embedding_1CD.device), cache)
        return Prompt(cache=cache, context_length=length)

    def begun(self, context: Prompt | None, num_rows: int) -> Prompt | None:
        return None if context is None else context.repeated(num_rows)

    def read(self, model: Any, embedding_BSD: Tensor, attention_mask_BS: Tensor, context: Prompt | None = None) -> Prompt:
        """Return the source's keys and values."""
        begun = self.begun(context, len(embedding_BSD)) or Prompt(cache=DynamicCache(config=model.config), context_length=0)
        run(model, embedding_BSD, attention_mask_BS, begun.cache, begun.context_length)
        return begun

    def extend(
        self,
        model: Any,
        embedding_BTD: Tensor,
        source: Prompt | None,
        attention_mask_BS: Tensor,
        target_mask_BT: Tensor | None,
        cache: DynamicCache | None,
        *,
        num_blocks: int,
    ) -> Tensor:
        """The mask is the source's, or one of all tokens up to the last of the target, which then needs none of its own; a context is in
        neither."""
        if source is not None and (cache is None or cache.get_seq_length() == 0):
            cache = continued(source.cache, cache)
        with _shortened(model.model, num_blocks):
            return run(model, embedding_BTD, attention_mask_BS, cache, 0 if source is None else source.context_length)

    def state(self, output: Any) -> Tensor:
        return _state(output)


# Where checkpoints of text and images hold their text: Google's, and those that transformers 5 makes of them.
_BESIDE_IMAGES = ("language_model.model.", "model.language_model.")
# What reads images, and a copy of the embedding as the head.
_NOT_TEXT = ("vision_tower.", "multi_modal_projector.", "model.vision_tower.", "model.multi_modal_projector.", "language_model.lm_head.")


def _names_beside_images(name: str) -> tuple[str, ...]:
    return tuple(prefix + name.removeprefix("model.") for prefix in _BESIDE_IMAGES) if name.startswith("model.") else ()


def _name_of_text(stored: str) -> str | None:
    """Return the one name of a stored tensor; None: it is none of the text's."""
    if stored.startswith(_NOT_TEXT):
        return None
    for prefix in _BESIDE_IMAGES:
        if stored.startswith(prefix):
            return "model." + stored.removeprefix(prefix)
    return stored


def _state(output: Any) -> Tensor:
    hidden: Tensor = output[0] if isinstance(output, tuple) else output
    return hidden


def run(model: Any, embedding_BTD: Tensor, mask_BS: Tensor, cache: DynamicCache | None, context_length: int = 0) -> Tensor:
    """Run new tokens after those in the cache, and return their final normed states (B, T, D). The mask is without the context."""
    past, length = (0 if cache is None else cache.get_seq_length()), embedding_BTD.shape[1]
    mask = torch.nn.functional.pad(whole_mask(mask_BS, past - context_length, length), (context_length, 0), value=1)
    final_BTD: Tensor = model.model(
        inputs_embeds=embedding_BTD,
        attention_mask=mask,
        position_ids=positions_of(mask, length),
        **cache_argument(cache),
        use_cache=cache is not None,
    ).last_hidden_state
    return final_BTD


def continued(source: DynamicCache, into: DynamicCache | None) -> DynamicCache:
    """Return a cache that goes on from a source's, which stays as it is: layers are new, what they hold is shared."""
    layers = [copy.copy(layer) for layer in source.layers]
    if into is None:
        into = DynamicCache()
        into.layers, into.layer_class_to_replicate = layers, None
    else:
        into.layers[: len(layers)] = layers
    return into


@contextlib.contextmanager
def _shortened(stack: Any, count: int) -> Iterator[None]:
    """Let the stack end after its first `count` blocks while the body runs."""
    whole = stack.layers
    stack.layers = whole[:count] if count < len(whole) else whole
    try:
        yield
    finally:
        stack.layers = whole


def fill_buffers(model: Any, config: Any) -> None:
    """Make what no checkpoint stores: rotary frequencies, and the scale of the Gemmas' embedding."""
    model.model.rotary_emb = type(model.model.rotary_emb)(config)
    embedding = model.model.embed_tokens
    scale = getattr(embedding, "scalar_embed_scale", None)
    if scale is not None:
        embedding.embed_scale = torch.tensor(scale)
    left = [name for name, buffer in model.named_buffers() if buffer.is_meta]
    if left:
        raise BackboneError(
            f"a {config.model_type} holds {left[0]}, which no checkpoint stores and nobody here makes: choose another model"
        )


class LlamaBlocks:
    """One block at a time, by itself."""

    def block(self, config: Any, ref: BlockRef) -> nn.Module:
        one = copy.deepcopy(config)
        with torch.device("meta"):
            block: nn.Module = AutoModelForCausalLM.from_config(one).model.layers[ref.index]
        return block

    def final_norm(self, spec: LlamaSpec, stack: str) -> tuple[nn.Module, str]:
        with torch.device("meta"):
            norm: nn.Module = AutoModelForCausalLM.from_config(config_of(spec)).model.norm
        return norm, "model.norm"

    def positions(self, first_block: nn.Module) -> Callable[[int, torch.device], Any]:
        """Of those kinds that side blocks are carved out of, all of whose blocks turn by the same frequencies."""
        rotary = LlamaRotaryEmbedding(first_block.get_submodule("self_attn").config)
        return functools.partial(_cosines_and_sines, rotary)

    def run_block(
        self,
        block: nn.Module,
        hidden: Tensor,
        along: Any,
        *,
        mask: Tensor | None,
        source: Tensor | None = None,
        source_mask: Tensor | None = None,
        cache: Any | None = None,
    ) -> tuple[Tensor, Any]:
        """`along` are the rotary embedding's cosines and sines, the same for all blocks."""
        output = block(hidden, attention_mask=mask, position_embeddings=along, use_cache=cache is not None, **cache_argument(cache))
        return _state(output), along

    def matrices(self, block: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
        return ((name, p) for name, p in block.named_parameters() if p.ndim == 2)

    def config_of_blocks(self, config: Any) -> Any:
        return config

    def summed(self, ref: BlockRef) -> tuple[str, ...]:
        return ("self_attn.o_proj", "mlp.down_proj")


def _cosines_and_sines(rotary: LlamaRotaryEmbedding, length: int, device: torch.device) -> tuple[Tensor, Tensor]:
    found: tuple[Tensor, Tensor] = rotary.to(device)(torch.empty(0, device=device), torch.arange(length, device=device)[None])
    return found
