"""Several targets of one source, each by itself and all together."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from lst_scale.inputs.batch import Inputs


def scored_together_and_apart(model: Any, stack: nn.Module) -> tuple[list[int], list[Tensor], list[Tensor]]:
    """Return how many tokens `stack` read for each of three targets, their logits, and those of each target alone.

    Sources have six tokens, of which the second's last two are padding; targets have three, five and one.
    """
    ids = torch.randint(3, 97, (2, 9), generator=torch.Generator().manual_seed(0))
    source, targets, mask = ids[:, :6], [ids[:, 6:], ids[:, 3:8], ids[:, 4:5]], torch.ones(2, 6, dtype=torch.long)
    mask[1, 4:] = 0
    several = [Inputs(source_BS=source, source_mask_BS=mask, target_BT=target) for target in targets]
    apart = [
        model.scoring(source, mask).logits(target, taps, last=True)
        for target, taps in zip(targets, model.backbone.each_target(several, model.side.request), strict=True)
    ]
    lengths: list[int] = []
    counting = stack.register_forward_pre_hook(lambda _, given: lengths.append(given[0].embedding.shape[1]))
    together = list(model.logits_for_targets(source, mask, targets))
    counting.remove()
    return lengths, together, apart
