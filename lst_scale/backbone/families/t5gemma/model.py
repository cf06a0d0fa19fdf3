"""T5Gemma 2 as a backbone: the names of its tensors, the parts of transformers' model, and how they are run.

It reads images, too; what does is left out here, and the model is its text's encoder and its decoder. Both look words up in one table.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Iterable, Iterator
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from transformers import AutoModelForSeq2SeqLM, T5Gemma2Config
from transformers.initialization import no_init_weights
from transformers.models.t5gemma2.modeling_t5gemma2 import T5Gemma2RMSNorm, T5Gemma2TextScaledWordEmbedding

from lst_scale.backbone.cache_argument import cache_argument
from lst_scale.backbone.families import BlockRef
from lst_scale.backbone.families.t5gemma.spec import T5GemmaSpec, spec_from
from lst_scale.backbone.taps import FrozenHead
from lst_scale.errors import BackboneError

ENCODER, DECODER = "model.encoder.text_model", "model.decoder"
STORED = "model.encoder"
EMBEDDING, HEAD = f"{ENCODER}.embed_tokens.weight", "lm_head.out_proj.weight"
AFTER_IMAGE = f"{ENCODER}.embed_tokens.eoi_embedding"
OF_IMAGES = ("vision_tower", "multi_modal_projector")
NOT_CARVED = "side blocks are not carved out of a T5Gemma: write initialization: random"


def config_of(spec: T5GemmaSpec, *, shards: int = 1) -> T5Gemma2Config:
    """Return transformers' configuration of a model of this shape; of what reads images, which nobody here runs, the smallest."""
    numbers = {
        "vocab_size": spec.vocab_size,
        "hidden_size": spec.d_model,
        "intermediate_size": spec.d_ff // shards,
        "num_attention_heads": spec.num_heads // shards,
        "num_key_value_heads": max(1, spec.num_kv_heads // shards),
        "head_dim": spec.head_dim,
        "rms_norm_eps": spec.rms_norm_eps,
        "pad_token_id": spec.pad_token_id,
        "eos_token_id": spec.eos_token_id,
        "bos_token_id": spec.bos_token_id,
    }
    vision = {
        "hidden_size": 8,
        "intermediate_size": 8,
        "num_hidden_layers": 1,
        "num_attention_heads": 1,
        "image_size": 28,
        "patch_size": 14,
    }
    return T5Gemma2Config(
        encoder={
            "text_config": json.loads(spec.source_settings) | numbers | {"num_hidden_layers": spec.num_layers},
            "vision_config": vision | {"model_type": "siglip_vision_model"},
            "mm_tokens_per_image": 4,
            "eoi_token_index": spec.eoi_token_id,
        },
        decoder=json.loads(spec.target_settings) | numbers | {"num_hidden_layers": spec.num_decoder_layers},
        dropout_rate=spec.dropout_rate,
    )


class T5GemmaModel:
    """The whole model: transformers' T5Gemma2ForConditionalGeneration."""

    stacks: ClassVar[tuple[str, str]] = ("encoder", "decoder")
    embedding_name: ClassVar[str] = EMBEDDING
    head_name: ClassVar[str] = HEAD
    answers_from_source: ClassVar[bool] = True
    live_classes: ClassVar[tuple[str, ...]] = ("T5Gemma2ForConditionalGeneration",)

    def stored_names(self, name: str) -> tuple[str, ...]:
        names = (name, EMBEDDING) if name == HEAD else (name,)  # a head that is stored nowhere is the embedding
        inside = (each.replace(ENCODER, STORED) for each in names)  # transformers stores the text's encoder without its name
        return tuple(dict.fromkeys((*names, *inside, *(_decoder_s(each) for each in names if each in (EMBEDDING, AFTER_IMAGE)))))

    def canonical(self, names: Iterable[str]) -> set[str]:
        shared = {_decoder_s(name): name for name in (EMBEDDING, AFTER_IMAGE)}
        of_images = tuple(f"{STORED}.{part}." for part in OF_IMAGES)
        of_text = (name for name in names if not name.startswith(of_images))
        whole = (name if name.startswith(ENCODER) else name.replace(STORED, ENCODER) for name in of_text)
        return {shared.get(name, name) for name in whole}

    def spec(self, config: Any) -> T5GemmaSpec:
        return spec_from(config.to_dict())

    def unfilled(self, spec: T5GemmaSpec, *, shards: int) -> Any:
        with no_init_weights():  # what reads images draws until all draws are within bounds, which needs contents
            return _of_text(AutoModelForSeq2SeqLM.from_config(config_of(spec, shards=shards)))

    def skeleton(self, config: Any) -> Any:
        with torch.device("meta"):
            model = _of_text(AutoModelForSeq2SeqLM.from_config(config))
        for path in (ENCODER, DECODER):
            _make_buffers(model.get_submodule(path))
        return model

    def blocks(self, spec: T5GemmaSpec) -> tuple[BlockRef, ...]:
        stacks = zip(self.stacks, (ENCODER, DECODER), (spec.num_layers, spec.num_decoder_layers), strict=True)
        return tuple(BlockRef(stack=stack, index=i, path=f"{path}.layers.{i}") for stack, path, depth in stacks for i in range(depth))

    def ends(self, *, own_head: bool) -> tuple[str, ...]:
        return (EMBEDDING, AFTER_IMAGE, *((HEAD,) if own_head else ()), f"{ENCODER}.norm.weight", f"{DECODER}.norm.weight")

    def tie(self, model: Any, *, own_head: bool) -> None:
        model.model.decoder.embed_tokens = model.model.encoder.text_model.embed_tokens
        if not own_head:
            model.lm_head.out_proj.weight = model.model.encoder.text_model.embed_tokens.weight

    def embedding(self, model: Any) -> Tensor:
        weight_VD: Tensor = model.model.encoder.text_model.embed_tokens.weight
        return weight_VD

    def embedding_scale(self, spec: T5GemmaSpec) -> float:
        return float(spec.d_model**0.5)

    def head(self, model: Any, spec: T5GemmaSpec) -> FrozenHead:
        return FrozenHead(weight_VD=model.lm_head.out_proj.weight, scale=1.0, soft_cap=spec.setting("final_logit_softcapping"))

    def head_scale(self, spec: T5GemmaSpec) -> float:
        return 1.0

    def stack_of(self, model: Any, *, target: bool) -> nn.ModuleList:
        blocks: nn.ModuleList = (model.model.decoder if target else model.model.encoder.text_model).layers
        return blocks

    def read(self, model: Any, embedding_BSD: Tensor, attention_mask_BS: Tensor, context: None = None) -> Tensor:
        final_BSD: Tensor = model.model.encoder(inputs_embeds=embedding_BSD, attention_mask=attention_mask_BS).last_hidden_state
        return final_BSD

    def extend(
        self,
        model: Any,
        embedding_BTD: Tensor,
        source_BSD: Tensor,
        attention_mask_BS: Tensor,
        target_mask_BT: Tensor | None,
        cache: Any | None,
        *,
        num_blocks: int,
    ) -> Tensor:
        with _shortened(model.model.decoder, num_blocks):
            final_BTD: Tensor = model.model.decoder(
                inputs_embeds=embedding_BTD,
                attention_mask=target_mask_BT,
                encoder_hidden_states=source_BSD,
                encoder_attention_mask=attention_mask_BS,
                **cache_argument(cache),
                use_cache=cache is not None,
            ).last_hidden_state
        return final_BTD

    def state(self, output: Any) -> Tensor:
        hidden: Tensor = output[0] if isinstance(output, tuple) else output
        return hidden


def _decoder_s(name: str) -> str:
    """Return the name that a weight of the word table may go by in the decoder."""
    return name.replace(ENCODER, DECODER)


class WordTable(T5Gemma2TextScaledWordEmbedding):  # type: ignore[misc]
    """The same states; transformers looks up where images end in a way that waits for the GPU, and that tensors without contents lack."""

    def forward(self, ids: Tensor) -> Tensor:
        words: Tensor = nn.functional.embedding(ids, self.weight, self.padding_idx) * self.embed_scale.to(self.weight.dtype)
        return torch.where((ids == self.eoi_token_index)[..., None], self.eoi_embedding.to(words.dtype), words)


def _of_text(model: Any) -> Any:
    """Return the model without what reads images, and with one word table for both stacks."""
    for part in OF_IMAGES:
        delattr(model.model.encoder, part)
    text = model.model.encoder.text_model
    before = text.embed_tokens
    sizes = (before.num_embeddings, before.embedding_dim, before.padding_idx)
    text.embed_tokens = WordTable(*sizes, embed_scale=before.scalar_embed_scale, eoi_token_index=before.eoi_token_index)
    model.model.decoder.embed_tokens = text.embed_tokens
    return model


def _make_buffers(stack: Any) -> None:
    """Make what no checkpoint stores: rotary frequencies, and the scale of the embedding."""
    stack.rotary_emb = type(stack.rotary_emb)(stack.config)
    stack.embed_tokens.embed_scale = torch.tensor(stack.embed_tokens.scalar_embed_scale)


@contextlib.contextmanager
def _shortened(stack: Any, count: int) -> Iterator[None]:
    """Let the stack end after its first `count` blocks while the body runs."""
    whole = stack.layers
    stack.layers = whole[:count] if count < len(whole) else whole
    try:
        yield
    finally:
        stack.layers = whole


class T5GemmaBlocks:
    """One block at a time, by itself."""

    def block(self, config: Any, ref: BlockRef) -> nn.Module:
        with torch.device("meta"):
            return ref.get(AutoModelForSeq2SeqLM.from_config(config))

    def final_norm(self, spec: T5GemmaSpec, stack: str) -> tuple[nn.Module, str]:
        with torch.device("meta"):
            norm: nn.Module = T5Gemma2RMSNorm(spec.d_model, eps=spec.rms_norm_eps)
        return norm, f"{ENCODER if stack == 'encoder' else DECODER}.norm"

    def positions(self, first_block: nn.Module) -> Callable[[int, torch.device], Any]:
        raise BackboneError(NOT_CARVED)

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
        """Of a side block. `along` are cosines and sines, which the first block of a stack makes."""
        output: tuple[Tensor, Any] = block(hidden, along, mask, source, source_mask, cache)
        return output

    def matrices(self, block: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
        return ((name, p) for name, p in block.named_parameters() if p.ndim == 2)

    def config_of_blocks(self, config: Any) -> Any:
        """Both stacks have the same heads, by `problem_of`."""
        return config.decoder

    def summed(self, ref: BlockRef) -> tuple[str, ...]:
        return ("self_attn.o_proj", "mlp.down_proj")
