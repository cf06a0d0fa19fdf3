"""Targets that begin alike: a few texts, at whose positions all of them can be scored.

"-1.3" and "-1.4" differ in their last token, and what predicts that has read the same tokens. So one of them is run, and both are read off.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

Ids = tuple[int, ...]


@dataclass(frozen=True)
class TargetPath:
    """One of several targets, which is run, and the numbers of all those that are scored along it, its own among them."""

    ids: Ids
    along: tuple[int, ...]


def paths_of(targets: Sequence[Ids]) -> tuple[TargetPath, ...]:
    """Return the fewest targets along which every one is scored once. A target's last token is predicted by those before it alone."""
    runner: dict[Ids, int] = {}  # which target is run, by each of its beginnings that predict a token
    along: dict[int, list[int]] = {}
    for number in sorted(range(len(targets)), key=lambda number: -len(targets[number])):
        ids = targets[number]
        if ids[:-1] not in runner:
            runner |= {ids[:length]: number for length in range(len(ids)) if ids[:length] not in runner}
            along[number] = []
        along[runner[ids[:-1]]].append(number)
    return tuple(TargetPath(targets[number], tuple(sorted(along[number]))) for number in sorted(along))


def scores_along(path: TargetPath, targets: Sequence[Ids], logits_BTV: Tensor) -> Tensor:
    """Return the log-likelihoods (B, targets along the path), in nats, given the logits at its positions."""
    likely_BTV = logits_BTV.float().log_softmax(-1)
    return torch.stack([likely_BTV[:, range(len(targets[number])), list(targets[number])].sum(-1) for number in path.along], -1)


def without_needless_end(targets: Sequence[Ids]) -> tuple[Ids, ...]:
    """Return targets without the token that ends each, unless one of them is then the beginning of another: "1" and "1.5"."""
    cut = tuple(ids[:-1] for ids in targets)
    whole = frozenset(cut)
    begun = any(ids[:length] in whole for ids in cut for length in range(len(ids)))
    return tuple(targets) if begun or len(whole) < len(cut) else cut
