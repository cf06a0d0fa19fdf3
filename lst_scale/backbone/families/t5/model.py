"""T5 as a backbone: the names of its tensors, the parts of transformers' model, and how they are run."""

from __future__ import annotations

import contextlib
import copy
import functools
from collections.abc import Callable, Iterable, Iterator
from dataclasses import fields
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from transformers import AutoModelForSeq2SeqLM, T5Config, T5ForConditionalGeneration
from transformers.models.t5.modeling_t5 import T5Block, T5LayerNorm

from lst_scale.backbone.cache_argument import cache_argument
from lst_scale.backbone.families import BlockRef
from lst_scale.backbone.families.t5.spec import T5Spec, spec_from
from lst_scale.backbone.taps import FrozenHead

ENCODER, DECODER = "encoder", "decoder"
SHARED, HEAD = "shared.weight", "lm_head.weight"
# Names under which checkpoints store the one embedding matrix.
EMBEDDING_NAMES = (SHARED, "encoder.embed_tokens.weight", "decoder.embed_tokens.weight")
# Old T5 checkpoints carry this table; no model has a place for it.
UNUSED_TABLE = "decoder.block.0.layer.1.EncDecAttention.relative_attention_bias.weight"
POSITION_TABLE = "relative_attention_bias"


def with_fused_kernels(config: T5Config, attention: str = "sdpa") -> T5Config:
    """Set attention and GELU of blocks that are made from `config`, and return it: no layer is wrapped or replaced.

    T5's gelu_new (v1.1, Flan-T5, mT5) is the tanh approximation written out in eight kernels, each over d_ff channels, and most of
    their results wait for a backward pass. torch has it as one: in float32 the same to 2.4e-7, in bf16 rounded once instead of eight times.
    """
    config._attn_implementation = attention
    if config.dense_act_fn == "gelu_new":
        config.dense_act_fn = "gelu_pytorch_tanh"
    return config


class T5Model:
    """The whole model: transformers' T5ForConditionalGeneration, or mT5's."""

    stacks: ClassVar[tuple[str, str]] = (ENCODER, DECODER)
    embedding_name: ClassVar[str] = SHARED
    head_name: ClassVar[str] = HEAD
    answers_from_source: ClassVar[bool] = True
    live_classes: ClassVar[tuple[str, ...]] = ("T5ForConditionalGeneration", "MT5ForConditionalGeneration")

    def stored_names(self, name: str) -> tuple[str, ...]:
        # A head that is stored nowhere is the embedding.
        return (name, *EMBEDDING_NAMES) if name in (*EMBEDDING_NAMES, HEAD) else (name,)

    def canonical(self, names: Iterable[str]) -> set[str]:
        return {SHARED if name in EMBEDDING_NAMES else name for name in names} - {UNUSED_TABLE}

    def spec(self, config: Any) -> T5Spec:
        found = {field.name: getattr(config, field.name) for field in fields(T5Spec) if hasattr(config, field.name)}
        return spec_from({"scale_decoder_outputs": False} | found)

    def unfilled(self, spec: T5Spec, *, shards: int) -> Any:
        config = T5Config(
            vocab_size=spec.vocab_size,
            d_model=spec.d_model,
            d_ff=spec.d_ff // shards,
            d_kv=spec.d_kv,
            num_heads=spec.num_heads // shards,
            num_layers=spec.num_layers,
            num_decoder_layers=spec.num_decoder_layers,
            relative_attention_num_buckets=spec.relative_attention_num_buckets,
            feed_forward_proj=spec.feed_forward_proj,
            dropout_rate=spec.dropout_rate,
            decoder_start_token_id=spec.decoder_start_token_id,
        )
        return T5ForConditionalGeneration(with_fused_kernels(config))

    def skeleton(self, config: Any) -> Any:
        with torch.device("meta"):
            model = AutoModelForSeq2SeqLM.from_config(with_fused_kernels(config))
        return model

    def blocks(self, spec: T5Spec) -> tuple[BlockRef, ...]:
        depths = ((ENCODER, spec.num_layers), (DECODER, spec.num_decoder_layers))
        return tuple(BlockRef(stack=stack, index=i, path=f"{stack}.block.{i}") for stack, depth in depths for i in range(depth))

    def ends(self, *, own_head: bool) -> tuple[str, ...]:
        return (SHARED, *((HEAD,) if own_head else ()), *(f"{stack}.final_layer_norm.weight" for stack in self.stacks))

    def tie(self, model: Any, *, own_head: bool) -> None:
        model.encoder.embed_tokens = model.decoder.embed_tokens = model.shared
        if not own_head:
            model.lm_head.weight = model.shared.weight

    def embedding(self, model: Any) -> Tensor:
        weight_VD: Tensor = model.shared.weight
        return weight_VD

    def embedding_scale(self, spec: T5Spec) -> float:
        return 1.0

    def head(self, model: Any, spec: T5Spec) -> FrozenHead:
        return FrozenHead(weight_VD=model.lm_head.weight, scale=self.head_scale(spec))

    def head_scale(self, spec: T5Spec) -> float:
        return float(spec.d_model**-0.5) if spec.scale_decoder_outputs else 1.0

    def stack_of(self, model: Any, *, target: bool) -> nn.ModuleList:
        blocks: nn.ModuleList = (model.decoder if target else model.encoder).block
        return blocks

    def read(self, model: Any, embedding_BSD: Tensor, attention_mask_BS: Tensor, context: None = None) -> Tensor:
        final_BSD: Tensor = model.encoder(inputs_embeds=embedding_BSD, attention_mask=attention_mask_BS).last_hidden_state
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
        with _shortened(model.decoder, num_blocks):
            final_BTD: Tensor = model.decoder(
                inputs_embeds=embedding_BTD,
                attention_mask=target_mask_BT,
                encoder_hidden_states=source_BSD,
                encoder_attention_mask=attention_mask_BS,
                **cache_argument(cache),
                use_cache=cache is not None,
            ).last_hidden_state
        return final_BTD

    def state(self, output: Any) -> Tensor:
        hidden: Tensor = output[0]
        return hidden


class T5Blocks:
    """One block at a time, by itself."""

    def block(self, config: Any, ref: BlockRef) -> nn.Module:
        own = with_fused_kernels(copy.deepcopy(config))
        own.is_decoder, own.use_cache = ref.stack == DECODER, False
        with torch.device("meta"):
            block: nn.Module = T5Block(own, has_relative_attention_bias=ref.index == 0, layer_idx=ref.index)
        return block

    def final_norm(self, spec: T5Spec, stack: str) -> tuple[nn.Module, str]:
        with torch.device("meta"):
            norm: nn.Module = T5LayerNorm(spec.d_model, eps=spec.layer_norm_epsilon)
        return norm, f"{stack}.final_layer_norm"

    def positions(self, first_block: nn.Module) -> Callable[[int, torch.device], Any]:
        # A stack's first block owns the table by which all its blocks are biased; nothing else of the block is kept.
        return functools.partial(_position_bias, first_block.get_submodule("layer.0.SelfAttention"))

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
        """`along` is the position bias; a block that owns a table makes it where none is given."""
        hidden, bias, _ = block(
            hidden,
            attention_mask=mask,
            position_bias=along,
            encoder_hidden_states=source,
            encoder_attention_mask=source_mask,
            **cache_argument(cache),
        )
        return hidden, bias

    def matrices(self, block: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
        return ((name, p) for name, p in block.named_parameters() if p.ndim == 2 and POSITION_TABLE not in name)

    def config_of_blocks(self, config: Any) -> Any:
        return config

    def summed(self, ref: BlockRef) -> tuple[str, ...]:
        return ("SelfAttention.o", *(("EncDecAttention.o",) if ref.stack == DECODER else ()), "DenseReluDense.wo")


def _position_bias(attention: Any, length: int, device: torch.device) -> Tensor:
    with torch.no_grad():
        bias: Tensor = attention.compute_bias(length, length, device=device)
    return bias


@contextlib.contextmanager
def _shortened(stack: Any, count: int) -> Iterator[None]:
    """Let the stack end after its first `count` blocks while the body runs."""
    whole = stack.block
    stack.block = whole[:count] if count < len(whole) else whole
    try:
        yield
    finally:
        stack.block = whole
