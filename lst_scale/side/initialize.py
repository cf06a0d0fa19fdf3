"""How a side network starts: at random, or carved out of the backbone by structural pruning (Sung et al. 2022, section 3.3).

Pruning is a chain through the whole backbone, embedding to last norm. Each matrix keeps the inputs that the one before it kept, and
1/r of its outputs, chosen by importance. It walks the checkpoint one tensor at a time, so a quantized or streamed backbone needs no
full-precision copy. Every block must be visited, because the chain of indices runs through it; kept ones are copied out.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from transformers.models.t5.modeling_t5 import T5Attention, T5LayerFF, T5LayerNorm

from lst_scale.errors import LadderError
from lst_scale.side.network import Gate, SideNetwork, TwoStepDownsample

WeightSource = Callable[[str], Tensor]
LADDER_STD = 0.01  # of downsamples and upsample, the release's


@torch.no_grad()
def initialize_random(side: SideNetwork, *, seed: int, weights: WeightSource | None = None) -> None:
    """Fill every weight from one seeded generator; with a weight source the position tables come from the backbone's block 0.

    | weight | start |
    | --- | --- |
    | downsamples, upsample, adapters | N(0, 0.01^2), bias 0; the upsample 0 with start_as_backbone |
    | gates | alpha 0, mu 1/2 |
    | norms | 1 |
    | q | N(0, 1 / (width * d_kv)): T5 attention has no 1/sqrt(d_kv), the start carries it |
    | k, v, wi, position table | N(0, 1 / width) |
    | o | N(0, 1 / (heads * d_kv)) |
    | wo | N(0, 1 / d_ff) |

    The block rows are T5's own start (mesh-tensorflow) at the narrow widths. The release drew side blocks from N(0, 0.01^2), at
    which attention is uniform and a block passes its input on almost unchanged.
    """
    generator = torch.Generator().manual_seed(seed)

    def normal(weight: Tensor, std: float) -> None:
        weight.copy_(torch.randn(weight.shape, generator=generator) * std)

    for module in side.modules():
        if isinstance(module, T5LayerNorm):
            module.weight.fill_(1.0)
        elif isinstance(module, Gate):
            module.alpha.zero_()
        elif isinstance(module, T5Attention):
            inner = module.n_heads * module.key_value_proj_dim
            normal(module.q.weight, (module.d_model * module.key_value_proj_dim) ** -0.5)
            normal(module.k.weight, module.d_model**-0.5)
            normal(module.v.weight, module.d_model**-0.5)
            normal(module.o.weight, inner**-0.5)
            if module.has_relative_attention_bias:
                normal(module.relative_attention_bias.weight, module.d_model**-0.5)
        elif isinstance(module, T5LayerFF):
            for linear in module.DenseReluDense.children():
                if isinstance(linear, nn.Linear):
                    normal(linear.weight, linear.in_features**-0.5)
    in_blocks = {id(linear) for m in side.modules() if isinstance(m, T5Attention | T5LayerFF) for linear in m.modules()}
    for module in side.modules():
        if isinstance(module, nn.Linear) and id(module) not in in_blocks:
            normal(module.weight, LADDER_STD)
            if module.bias is not None:
                module.bias.zero_()
    for module in side.modules():
        if isinstance(module, TwoStepDownsample):  # together they scale as one downsample does
            normal(module.first.weight, module.first.in_features**-0.5)
            normal(module.second.weight, LADDER_STD * (module.first.in_features / module.second.in_features) ** 0.5)
    if side.config.start_as_backbone:
        assert isinstance(side.upsample, nn.Linear)
        side.upsample.weight.zero_()
    if weights is not None and side.config.design != "adapter":
        for prefix, stack in (("encoder", side.encoder), ("decoder", side.decoder)):
            _copy_position_table(prefix, stack, weights)


@torch.no_grad()
def initialize_by_pruning(side: SideNetwork, weights: WeightSource, importance: WeightSource | None = None) -> None:
    """Copy pruned backbone weights into the side blocks, final norms and position tables; the rest stays as it is.

    Args:
        side: a side network whose other weights are already set.
        weights: reads a backbone weight by its Hugging Face name.
        importance: reads a weight's importance, of the same shape; None takes the weight itself (its magnitude counts).
    """
    spec, r = side.spec, side.config.reduction_factor
    if side.config.design == "adapter":
        raise LadderError("design adapter has no blocks to carve out of the backbone: write method.initialization=random")
    inner = (side.config.side_heads or spec.num_heads) * spec.d_kv // r
    chain = _Chain(weights, importance or weights, r, inner, gated=spec.feed_forward_proj.startswith("gated"))
    chain.start("shared.weight")
    for prefix, stack, num_layers in (("encoder", side.encoder, spec.num_layers), ("decoder", side.decoder, spec.num_decoder_layers)):
        for layer in range(num_layers):
            pruned = chain.block(f"{prefix}.block.{layer}", is_decoder=prefix == "decoder")
            if str(layer) in stack.blocks:
                _copy(stack.blocks[str(layer)], pruned if side.config.design == "transformer" else _with_ladder_attention(pruned))
        stack.final_norm.weight.copy_(chain.norm(f"{prefix}.final_layer_norm.weight"))
        _copy_position_table(prefix, stack, weights)


class _Chain:
    """Walks the backbone in order; `kept` are the residual coordinates that the last sublayer kept."""

    def __init__(self, weights: WeightSource, importance: WeightSource, r: int, inner: int, *, gated: bool) -> None:
        self.weights, self.importance, self.r, self.inner, self.gated = weights, importance, r, inner, gated
        self.same = importance is weights
        self.kept = torch.empty(0, dtype=torch.long)

    def start(self, name: str) -> None:
        """Keep the embedding columns with the largest L1 norm of importance over the vocabulary."""
        importance = self.importance(name)
        # A few thousand rows at a time, summed in float64: in bf16 a sum over the vocabulary has too few digits to rank columns by.
        sums = [rows.abs().sum(0, dtype=torch.float64) for rows in torch.split(importance, 8192)]
        self.kept = self._largest(torch.stack(sums).sum(0))

    def block(self, prefix: str, *, is_decoder: bool) -> dict[str, Tensor]:
        """Return one block's pruned weights, named as inside the block."""
        pruned: dict[str, Tensor] = {}
        sublayers = ["SelfAttention", "EncDecAttention", "DenseReluDense"] if is_decoder else ["SelfAttention", "DenseReluDense"]
        for index, kind in enumerate(sublayers):
            local = f"layer.{index}"
            pruned[f"{local}.layer_norm.weight"] = self.norm(f"{prefix}.{local}.layer_norm.weight")
            path = f"{local}.{kind}"
            if kind == "DenseReluDense":
                names = ("wi_0", "wi_1") if self.gated else ("wi",)
                pruned |= self._sublayer(prefix, path, names, "wo")
            else:
                pruned |= self._sublayer(prefix, path, ("q", "k", "v"), "o")
        return pruned

    def norm(self, name: str) -> Tensor:
        return self.weights(name)[self.kept]

    def _sublayer(self, prefix: str, path: str, names: tuple[str, ...], out: str) -> dict[str, Tensor]:
        """Prune the input matrices `names` to common rows, then the output matrix `out` to 1/r of its own rows."""
        inputs, log_products = {}, []
        for name in names:
            full = f"{prefix}.{path}.{name}.weight"
            weight = self.weights(full)
            importance = self._importance(full, weight)[:, self.kept]
            inputs[name] = weight[:, self.kept]
            # Importances are squared gradients: a product of three underflows float32, a sum of float64 logarithms does not.
            log_products.append(importance.abs().double().log())
        # One matrix or a product of several: wi_0 and wi_1 of a gated feed-forward multiply unit by unit, as q, k and v do.
        rows = self._largest(torch.stack(log_products).sum(0).logsumexp(1), None if out == "wo" else self.inner)
        full = f"{prefix}.{path}.{out}.weight"
        weight = self.weights(full)
        importance = self._importance(full, weight)[:, rows]
        self.kept = self._largest(importance.abs().double().sum(1))
        pruned = {f"{path}.{name}.weight": matrix[rows] for name, matrix in inputs.items()}
        return pruned | {f"{path}.{out}.weight": weight[:, rows][self.kept]}

    def _importance(self, name: str, weight: Tensor) -> Tensor:
        return weight if self.same else self.importance(name)

    def _largest(self, scores: Tensor, size: int | None = None) -> Tensor:
        """Return the indices of the `size` largest of `scores`, by default 1/r of them, ascending."""
        return scores.topk(size or len(scores) // self.r).indices.sort().values


def _copy(block: nn.Module, pruned: dict[str, Tensor]) -> None:
    parameters = {name: p for name, p in block.named_parameters() if "relative_attention_bias" not in name}
    assert parameters.keys() == pruned.keys(), sorted(parameters.keys() ^ pruned.keys())
    for name, parameter in parameters.items():
        parameter.copy_(pruned[name])


def _with_ladder_attention(pruned: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return a block's weights with the self-attention's once more as its ladder attention, layer 1; later layers move up by one."""
    moved = {}
    for name, tensor in pruned.items():
        layer, rest = name.removeprefix("layer.").split(".", 1)
        moved[f"layer.{int(layer) + (layer != '0')}.{rest}"] = tensor
        if layer == "0":
            moved[f"layer.1.{rest.replace('SelfAttention', 'EncDecAttention')}"] = tensor
    return moved


def _copy_position_table(prefix: str, stack: Any, weights: WeightSource) -> None:
    """The first side block starts with the backbone's whole table; with fewer heads, with that of every so-manieth."""
    table = weights(f"{prefix}.block.0.layer.0.SelfAttention.relative_attention_bias.weight")
    (parameter,) = (p for name, p in stack.blocks.named_parameters() if "relative_attention_bias" in name)
    if parameter.shape[1] < table.shape[1]:
        table = table[:, torch.arange(parameter.shape[1]) * table.shape[1] // parameter.shape[1]]
    if parameter.shape != table.shape:
        raise LadderError(f"the backbone's position table is {tuple(table.shape)}, the side network's {tuple(parameter.shape)}")
    parameter.copy_(table)
