"""Keys and values of rows of different lengths, which join and leave.

What grows with every token (attention to oneself) is padded before a row's first token, so that new ones come after all rows' last; what
is given once (attention to a source) is padded after it. Masks say what is padding. Shapes: B rows, H heads, L positions, d a head's width.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor
from transformers import DynamicCache, EncoderDecoderCache
from transformers.cache_utils import DynamicLayer

from lst_scale.backbone.masks import whole_mask


class Twin(Protocol):
    """What other ranks hold of the same rows, which follows what becomes of these."""

    def of(self, rows: Sequence[int]) -> Twin: ...
    def joined(self, parts: Sequence[Any]) -> Twin: ...


Layer = tuple[Tensor, Tensor] | None  # keys and values (B, H, L, d); None where nothing is kept


@dataclass(frozen=True, kw_only=True)
class Rows:
    """What is kept of some rows between two passes; never changed, only replaced."""

    grown: tuple[Layer, ...]
    mask_BL: Tensor  # of the positions in `grown`
    given: tuple[Layer, ...] = ()  # of a source
    given_mask_BS: Tensor | None = None
    twin: Twin | None = None  # the same rows on other ranks

    def __len__(self) -> int:
        return len(self.mask_BL)

    @property
    def length(self) -> int:
        return self.mask_BL.shape[1]

    def cache(self) -> Any:
        """Return a cache of transformers that holds these, and grows without changing them."""
        if self.given_mask_BS is None:
            return _cache_of(self.grown)
        return EncoderDecoderCache(_cache_of(self.grown), _cache_of(self.given))

    def after(self, cache: Any, num_new: int) -> Rows:
        """Return the rows that `cache` holds once so many tokens have gone through it."""
        return rows_of(cache, whole_mask(self.mask_BL, self.length, num_new), self.given_mask_BS)

    def of(self, rows: Sequence[int]) -> Rows:
        """Return some of these rows, in this order, without positions that are padding in all of them."""
        index = torch.tensor(list(rows), dtype=torch.long, device=self.mask_BL.device)
        mask = self.mask_BL[index]
        first = _leading_padding(mask)
        twin = None if self.twin is None else self.twin.of(rows)
        if self.given_mask_BS is None:
            return Rows(grown=_picked(self.grown, index, slice(first, None)), mask_BL=mask[:, first:], twin=twin)
        given = self.given_mask_BS[index]
        end = given.shape[1] - _leading_padding(given.flip(1))
        return Rows(
            grown=_picked(self.grown, index, slice(first, None)),
            mask_BL=mask[:, first:],
            given=_picked(self.given, index, slice(None, end)),
            given_mask_BS=given[:, :end],
            twin=twin,
        )


def rows_of(cache: Any, mask_BL: Tensor, given_mask_BS: Tensor | None) -> Rows:
    """Return what a cache of transformers holds."""
    if given_mask_BS is None:
        return Rows(grown=_layers_of(cache), mask_BL=mask_BL)
    grown, given = _layers_of(cache.self_attention_cache), _layers_of(cache.cross_attention_cache)
    return Rows(grown=grown, mask_BL=mask_BL, given=given, given_mask_BS=given_mask_BS)


def joined(parts: Sequence[Rows]) -> Rows:
    """Return the rows of all parts, one after another."""
    if len(parts) == 1:
        return parts[0]
    grown = [_joined([part.grown[layer] for part in parts], before=True) for layer in range(len(parts[0].grown))]
    mask = _stacked([part.mask_BL for part in parts], before=True)
    masks = [part.given_mask_BS for part in parts if part.given_mask_BS is not None]
    twins = [part.twin for part in parts if part.twin is not None]
    twin = twins[0].joined(twins) if twins else None
    if not masks:
        return Rows(grown=tuple(grown), mask_BL=mask, twin=twin)
    given = [_joined([part.given[layer] for part in parts], before=False) for layer in range(len(parts[0].given))]
    return Rows(grown=tuple(grown), mask_BL=mask, given=tuple(given), given_mask_BS=_stacked(masks, before=False), twin=twin)


def padded(tensors: Sequence[Tensor], *, after: bool = False) -> Tensor:
    """Return states (1, L, ...) of several rows as one tensor (B, L, ...), with zeros before those that are shorter, or `after` them.

    Where all are one tensor, as when many side networks are asked about one prompt, nothing is copied.
    """
    if all(tensor is tensors[0] for tensor in tensors):
        return tensors[0].expand(len(tensors), *tensors[0].shape[1:])
    longest = max(tensor.shape[1] for tensor in tensors)
    return torch.cat([_pad(tensor, longest - tensor.shape[1], dim=1, before=not after) for tensor in tensors])


def _cache_of(layers: Sequence[Layer]) -> DynamicCache:
    cache = DynamicCache()
    for layer in layers:
        held = DynamicLayer()
        if layer is not None:
            held.update(*layer)
        cache.layers.append(held)
    return cache


def _layers_of(cache: DynamicCache) -> tuple[Layer, ...]:
    return tuple((layer.keys, layer.values) if layer.get_seq_length() else None for layer in cache.layers)


def _leading_padding(mask: Tensor) -> int:
    """Return how many positions at the beginning are padding in all rows."""
    seen = mask.bool().any(0).nonzero()
    return int(seen[0]) if len(seen) else 0


def _picked(layers: Sequence[Layer], index: Tensor, positions: slice) -> tuple[Layer, ...]:
    return tuple(None if layer is None else (layer[0][index][:, :, positions], layer[1][index][:, :, positions]) for layer in layers)


def _joined(parts: Sequence[Layer], *, before: bool) -> Layer:
    held = [part for part in parts if part is not None]
    if not held:
        return None
    assert len(held) == len(parts), "rows that join have run through the same blocks"
    longest = max(keys.shape[2] for keys, _ in held)
    keys, values = (
        torch.cat([_pad(pair[which], longest - pair[which].shape[2], dim=2, before=before) for pair in held]) for which in (0, 1)
    )
    return keys, values


def _stacked(masks: Sequence[Tensor], *, before: bool) -> Tensor:
    longest = max(mask.shape[1] for mask in masks)
    return torch.cat([_pad(mask, longest - mask.shape[1], dim=1, before=before) for mask in masks])


def _pad(tensor: Tensor, count: int, *, dim: int, before: bool) -> Tensor:
    if not count:
        return tensor
    shape = [*tensor.shape[:dim], count, *tensor.shape[dim + 1 :]]
    zeros = tensor.new_zeros(shape)
    return torch.cat([zeros, tensor] if before else [tensor, zeros], dim)
