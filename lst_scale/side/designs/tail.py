"""The design "tail": the backbone's last blocks, run again on remembered states, with low-rank updates in them.

    h = tap of one block                                all that is read of the backbone
    h = block_i(h)    for every block after it          the backbone's own, frozen, each of some matrices W as W + alpha / rank * B A
    hidden = the backbone's final norm of h

LoRA in the last blocks: what is before them runs forward only, once where a cache keeps it, and no gradient reaches it. B starts at zero,
so the first prediction is the backbone's own. Where a ladder has many narrow blocks, a tail has a few at the backbone's full width.

The frozen blocks are no part of the module: they neither train nor are saved. `beside` takes their weights from a backbone, in full
precision, shared by all side networks beside it.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from lst_scale.backbone.families import family_of, numbers_of
from lst_scale.backbone.taps import Backbone, BackboneSpec, PackedTap, StackTaps
from lst_scale.errors import LadderError, did_you_mean
from lst_scale.side.config import LadderConfig
from lst_scale.side.designs.attention import Dropout

_HELD: WeakKeyDictionary[Any, dict[str, nn.Parameter]] = WeakKeyDictionary()  # weights by their names, of each backbone


class LowRankUpdate(nn.Module):
    """What is added to a frozen linear map's output: alpha / rank * B A x."""

    def __init__(self, inputs: int, outputs: int, *, rank: int, alpha: int, dropout: float) -> None:
        super().__init__()
        self.down = nn.Parameter(torch.zeros(rank, inputs))  # A
        self.up = nn.Parameter(torch.zeros(outputs, rank))  # B
        self.dropout, self.scale = Dropout(dropout), alpha / rank

    def forward(self, x: Tensor) -> Tensor:
        if not torch.is_autocast_enabled(x.device.type):
            x = x.to(self.down.dtype)
        return nn.functional.linear(nn.functional.linear(self.dropout(x), self.down), self.up) * self.scale


def _updated(updates: nn.ModuleDict, matrix: str, _linear: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
    """Stand behind a linear map as its hook: add what its block's update of this name says."""
    updated: Tensor = output + updates[matrix](inputs[0]).to(output.dtype)
    return updated


class TailStack(nn.Module):
    """The tail beside a decoder-only model."""

    def __init__(self, spec: BackboneSpec, config: LadderConfig) -> None:
        super().__init__()
        assert config.tail is not None
        (read,) = config.layers
        self.family, self.first, self.spec = family_of(spec.model_type, "this backbone"), read + 1, spec
        blocks = self.family.tail(spec, self.first)
        if config.recompute:
            blocks.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        dropout = spec.dropout_rate if config.dropout is None else config.dropout
        updates: dict[str, nn.ModuleDict] = {}
        self.paths: dict[str, str] = {}  # of each matrix that has an update: where it is in a block
        for number, path, linear in _targets(spec, blocks, self.family, config.tail.targets):
            update = LowRankUpdate(linear.in_features, linear.out_features, rank=config.tail.rank, alpha=config.tail.alpha, dropout=dropout)
            matrix = path.rpartition(".")[2]
            self.paths[matrix] = path
            of_block = updates.setdefault(str(number + self.first), nn.ModuleDict())
            of_block[matrix] = update
            linear.register_forward_hook(partial(_updated, of_block, matrix))
        self.blocks = nn.ModuleDict(updates)  # updates by the number of their block in the backbone
        self._frozen = (blocks.requires_grad_(False),)  # no submodule
        self._is_filled = False

    def beside(self, backbone: Backbone) -> None:
        """Take the weights of the last blocks from a backbone.

        Raises:
            LadderError: it has read a context before every row, whose keys in the last blocks are not those of the updated ones.
        """
        if backbone.identity.context:
            raise LadderError("design tail has no place for a context before every row: write it into each, or choose design transformer")
        (blocks,) = self._frozen
        dtype, held = backbone.head.weight_VD.dtype, _HELD.setdefault(backbone, {})
        for name, parameter in list(blocks.named_parameters()):
            own = self.family.tail_name(name, self.first)
            if own not in held:
                weight = backbone.weight_source(own).to(backbone.device, dtype)
                held[own] = nn.Parameter(weight, requires_grad=False)
            assert held[own].shape == parameter.shape, own
            path, _, last = name.rpartition(".")
            setattr(blocks.get_submodule(path), last, held[own])
        self._is_filled = True

    def held(self) -> Iterator[Tensor]:
        """Yield the frozen weights that are run again."""
        (blocks,) = self._frozen
        return iter(blocks.parameters()) if self._is_filled else iter(())

    def forward(self, taps: StackTaps, encoder: Any, mask_BS: Tensor | None, cache: Any | None = None) -> Tensor:
        """Return final normed states (B, T, D) of the tokens whose taps are given: the last of those that `mask_BS` (B, past + T) has."""
        assert mask_BS is not None
        assert self._is_filled, "call `beside` first: the frozen blocks come from a backbone"
        (blocks,), (tap,) = self._frozen, taps.hidden
        weight = next(blocks.parameters())
        if weight.device != tap.device:
            blocks.to(tap.device)
        blocks.train(self.training)  # recomputes what training needs, and nothing else: no frozen block has dropout
        hidden = (tap.unpack() if isinstance(tap, PackedTap) else tap).to(weight.dtype)
        return self.family.run_tail(blocks, hidden, mask_BS, cache).float()


def _targets(spec: BackboneSpec, blocks: Any, family: Any, targets: Any) -> Iterator[tuple[int, str, nn.Linear]]:
    """Yield the number of each block, the path in it and the map of every matrix that has an update.

    Raises:
        LadderError: blocks have no such matrix; names those that there are.
    """
    known = numbers_of(spec.model_type, "this backbone").lora_targets(spec)
    for target in targets:
        if target not in known:
            raise LadderError(f"tail.targets: blocks of this backbone have no matrix {target!r}.{did_you_mean(target, tuple(known))}")
    wanted = {known[target] for target in targets}
    for number, block in enumerate(family.stack_of(blocks, target=True)):
        for path, module in block.named_modules():
            if path.rpartition(".")[2] in wanted:
                yield number, path, module
