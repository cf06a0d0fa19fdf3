"""How a side network starts: at random, or carved out of the backbone by structural pruning (Sung et al. 2022, section 3.3).

Pruning is a chain through the whole backbone, embedding to last norm. Each matrix keeps the inputs that the one before it kept, and
1/r of its outputs, chosen by importance. It walks the checkpoint one tensor at a time, so a quantized or streamed backbone needs no
full-precision copy. Every block must be visited, because the chain of indices runs through it; kept ones are copied out.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from lst_scale.backbone.families import BlockRef, Sublayer, WholeHeads, family_of
from lst_scale.errors import LadderError
from lst_scale.side.designs.beside_images import StackBesideImages
from lst_scale.side.designs.parts import narrowing
from lst_scale.side.designs.tail import LowRankUpdate
from lst_scale.side.network import Gate, SideNetwork, TwoStepDownsample
from lst_scale.side.vision import draw_as_torch_does

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
    | updates of the tail | A N(0, 1/3 of 1 / its inputs), B 0 |
    | side blocks | as their family draws its own blocks, at the narrow widths (`Family.draw`) |
    | with vision: downsamples, upsample | U(+-1/sqrt(fan in)), as the release's vision half leaves them |
    | with vision: image tokens | `VisualEmbedding.draw`; their object order as `VisionConfig.object_order` says |

    The release drew side blocks from N(0, 0.01^2), at which attention is uniform and a block passes its input on almost unchanged.
    """
    generator = torch.Generator().manual_seed(seed)

    def normal(weight: Tensor, std: float) -> None:
        weight.copy_(torch.randn(weight.shape, generator=generator) * std)

    family, in_blocks = family_of(side.spec.model_type, "this backbone"), set[int]()
    for module in side.modules():
        if isinstance(module, Gate):
            module.alpha.zero_()
        else:
            in_blocks |= {id(linear) for linear in family.draw(module, normal)}
    for module in side.modules():
        if isinstance(module, nn.Linear) and id(module) not in in_blocks:
            normal(module.weight, LADDER_STD)
            if module.bias is not None:
                module.bias.zero_()
    for module in side.modules():
        if isinstance(module, TwoStepDownsample):  # together they scale as one downsample does
            normal(module.first.weight, module.first.in_features**-0.5)
            normal(module.second.weight, LADDER_STD * (module.first.in_features / module.second.in_features) ** 0.5)
        if isinstance(module, LowRankUpdate):  # of the variance that peft's has
            normal(module.down, (3 * module.down.shape[1]) ** -0.5)
            module.up.zero_()
    if side.config.vision is not None:
        _draw_beside_images(side, in_blocks, generator, weights)
    if side.config.start_as_backbone:
        assert isinstance(side.upsample, nn.Linear)
        side.upsample.weight.zero_()
    if weights is not None and side.config.design != "adapter":
        for name, stack in side.stacks():
            family.start_positions(name, stack.blocks, weights)


def _draw_beside_images(side: SideNetwork, in_blocks: set[int], generator: torch.Generator, weights: WeightSource | None) -> None:
    for module in side.modules():
        if isinstance(module, nn.Linear) and id(module) not in in_blocks:
            draw_as_torch_does(module, generator)
    encoder: StackBesideImages = side.encoder
    assert side.config.vision is not None
    encoder.visual_embedding.draw(generator)
    if side.config.vision.object_order == "backbone" and weights is not None:
        table_VD = weights(family_of(side.spec.model_type, "this backbone").embedding_name)
        encoder.object_order.copy_(table_VD[-len(encoder.object_order) :].flip(0))
    else:
        encoder.object_order.normal_(generator=generator)


@torch.no_grad()
def initialize_by_pruning(side: SideNetwork, weights: WeightSource, importance: WeightSource | None = None) -> None:
    """Copy pruned backbone weights into the side blocks, final norms and position tables; the rest stays as it is.

    Args:
        side: a side network whose other weights are already set.
        weights: reads a backbone weight by its Hugging Face name.
        importance: reads a weight's importance, of the same shape; None takes the weight itself (its magnitude counts).
    """
    if side.config.design in ("adapter", "pointwise", "tail"):
        raise LadderError(f"design {side.config.design} has no blocks to carve out of the backbone: write method.initialization=random")
    spec, family = side.spec, family_of(side.spec.model_type, "this backbone")
    narrow, attends_to_tap = narrowing(spec, side.config), side.config.design == "cross_attention"
    chain = _Chain(weights, importance or weights, spec.side_width(side.config.reduction_factor))
    chain.start(family.embedding_name)
    for name, stack in side.stacks():
        sublayers = family.sublayers(spec, narrow, name)
        for ref in family.blocks(spec):
            if ref.stack == name:
                carved = chain.block(ref, sublayers)
                if str(ref.index) in stack.blocks:
                    family.put_carved(stack.blocks[str(ref.index)], carved, attends_to_tap=attends_to_tap)
        _, norm = family.final_norm(spec, name)
        stack.final_norm.weight.copy_(chain.norm(f"{norm}.weight", sublayers[-1].norm_adds))
        family.start_positions(name, stack.blocks, weights)


class _Chain:
    """Walks the backbone in order; `kept` are the residual coordinates that the last sublayer kept."""

    def __init__(self, weights: WeightSource, importance: WeightSource, width: int) -> None:
        self.weights, self.importance, self.width = weights, importance, width
        self.same = importance is weights
        self.kept = torch.empty(0, dtype=torch.long)

    def start(self, name: str) -> None:
        """Keep the embedding columns with the largest L1 norm of importance over the vocabulary."""
        importance = self.importance(name)
        # A few thousand rows at a time, summed in float64: in bf16 a sum over the vocabulary has too few digits to rank columns by.
        sums = [rows.abs().sum(0, dtype=torch.float64) for rows in torch.split(importance, 8192)]
        scores = torch.stack(sums).sum(0)
        self.kept = _largest(scores, self.width)

    def block(self, ref: BlockRef, sublayers: Sequence[Sublayer]) -> dict[str, Tensor]:
        """Return one block's pruned weights, named as inside the block."""
        pruned: dict[str, Tensor] = {}
        for sublayer in sublayers:
            pruned[sublayer.norm] = self.norm(f"{ref.path}.{sublayer.norm}", sublayer.norm_adds)
            pruned |= self._sublayer(ref.path, sublayer)
        return pruned

    def norm(self, name: str, adds: float = 0.0) -> Tensor:
        return self.weights(name)[self.kept] + adds

    def _sublayer(self, path: str, sublayer: Sublayer) -> dict[str, Tensor]:
        """Prune the input matrices to common rows, or to whole heads, then the output matrix to some of its own rows."""
        inputs, kept_importances = {}, []
        for name in sublayer.inputs:
            weight = self.weights(f"{path}.{name}")
            importance = self._importance(f"{path}.{name}", weight)[:, self.kept]
            inputs[name] = weight[:, self.kept]
            # Importances are squared gradients: a product of three underflows float32, a sum of float64 logarithms does not.
            kept_importances.append(importance.abs().double().log())
        rows_of = _rows_of_heads(kept_importances, sublayer.heads) if sublayer.heads is not None else None
        if rows_of is None:
            # One matrix or a product of several: those of a gated feed-forward multiply unit by unit, as q, k and v do.
            rows_of = [_largest(torch.stack(kept_importances).sum(0).logsumexp(1), sublayer.rows)] * len(inputs)
        rows = rows_of[0]
        weight = self.weights(f"{path}.{sublayer.output}")
        importance = self._importance(f"{path}.{sublayer.output}", weight)[:, rows]
        self.kept = _largest(importance.abs().double().sum(1), self.width)
        pruned = {name: matrix[own] for (name, matrix), own in zip(inputs.items(), rows_of, strict=True)}
        return pruned | {sublayer.output: weight[:, rows][self.kept]}

    def _importance(self, name: str, weight: Tensor) -> Tensor:
        return weight if self.same else self.importance(name)


def _rows_of_heads(log_importances: Sequence[Tensor], heads: WholeHeads) -> list[Tensor]:
    """Return which rows of queries, keys and values are kept, given the logarithms of their importances (rows, columns).

    A head of keys and values counts with its most important heads of queries: by the product of the three's sums, as they multiply.
    """
    queries, keys, values = (log.logsumexp(1).view(heads.groups, -1, heads.head_dim).logsumexp(2) for log in log_importances)
    best, which = queries.topk(heads.kept_in_group, dim=1)
    groups = _largest(best.logsumexp(1) + keys[:, 0] + values[:, 0], heads.kept_groups)
    chosen = groups[:, None] * queries.shape[1] + which.sort(1).values[groups]
    of_keys = _rows_of_each(groups, heads.head_dim)
    return [_rows_of_each(chosen.flatten(), heads.head_dim), of_keys, of_keys]


def _rows_of_each(numbers: Tensor, head_dim: int) -> Tensor:
    return (numbers[:, None] * head_dim + torch.arange(head_dim)).flatten()


def _largest(scores: Tensor, size: int) -> Tensor:
    """Return the indices of the `size` largest of `scores`, ascending."""
    return scores.topk(size).indices.sort().values
