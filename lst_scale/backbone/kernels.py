"""Which of torch's kernels transformers' T5 computes with, said in its configuration: no layer is wrapped or replaced."""

from __future__ import annotations

from transformers import T5Config


def with_fused_kernels(config: T5Config, attention: str = "sdpa") -> T5Config:
    """Set attention and GELU of blocks that are made from `config`, and return it.

    T5's gelu_new (v1.1, Flan-T5, mT5) is the tanh approximation written out in eight kernels, each over d_ff channels, and most of
    their results wait for a backward pass. torch has it as one: in float32 the same to 2.4e-7, in bf16 rounded once instead of eight times.
    """
    config._attn_implementation = attention
    if config.dense_act_fn == "gelu_new":
        config.dense_act_fn = "gelu_pytorch_tanh"
    return config
