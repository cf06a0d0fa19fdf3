"""Several side networks on one backbone that answer as one: the mean of their probabilities, token by token.

    p(token) = 1/K sum_k softmax(head(side_k(taps)))

What an ensemble costs elsewhere, K models, is here one pass of the backbone and K side networks of a percent of its size. They may
differ in seed, reduction factor, layers and design. (Deep ensembles: Lakshminarayanan et al., NeurIPS 2017.)
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lst_scale.backbone import as_backbone
from lst_scale.backbone.taps import Backbone, FrozenHead, StackTaps, TapRequest, TargetState, selected_stack, union
from lst_scale.errors import LadderError
from lst_scale.inputs.images import Images
from lst_scale.side.cache import part_of
from lst_scale.side.designs.one_stack import SidePrefix
from lst_scale.side.designs.parts import SideEncoderState
from lst_scale.side.ladder import Ladder
from lst_scale.side.model import LadderModel, form_of
from lst_scale.side.network import SideNetwork
from lst_scale.side.vision import beside_images


class SideNetworks(nn.Module):
    """K side networks as one: what they read together, and the mean of their probabilities. The same one may be among them twice."""

    def __init__(self, sides: Sequence[SideNetwork]) -> None:
        super().__init__()
        self.each: Any = nn.ModuleList(sides)
        self.request: TapRequest = union([side.request for side in sides])
        self.vision = sides[0].vision
        if any(side.vision != self.vision for side in sides):
            raise LadderError("side networks that answer as one must read the same images: their vision settings differ")
        self.num_cache_layers = sum(side.num_cache_layers for side in sides)

    def beside(self, backbone: Backbone) -> None:
        for side in self.each:
            side.beside(backbone)

    def encode(self, taps: StackTaps, attention_mask_BS: Tensor, images: Images | None = None) -> SideEncoderState:
        """Return all final states side by side (B, S, sum of widths): one tensor, whose rows beam search can repeat."""
        finals = [side.encode(selected_stack(taps, side.request), attention_mask_BS, images).final_BSR for side in self.each]
        final_BSR = torch.cat(finals, -1)
        return SideEncoderState(final_BSR=final_BSR, attention_mask_BS=beside_images(attention_mask_BS, final_BSR.shape[1]))

    def logits(self, head: FrozenHead, decoder: TargetState, encoder: SideEncoderState, cache: Any | None = None) -> Tensor:
        """Return log-probabilities (B, T, V). Each side network has layers of its own in the cache, one after another."""
        total: Tensor | None = None
        first = 0
        for side, state in zip(self.each, self._each_source(encoder), strict=True):  # one network's logits at a time
            own = TargetState(taps=selected_stack(decoder.taps, side.request), final_BTD=decoder.final_BTD)
            found = side.logits(head, own, state, part_of(cache, first, side.num_cache_layers)).float().log_softmax(-1)
            total = found if total is None else torch.logaddexp(total, found)
            first += side.num_cache_layers
        assert total is not None
        return total - math.log(len(self.each))

    def _each_source(self, encoder: SideEncoderState) -> Iterator[Any]:
        """Yield what `encode` of each side network returned."""
        parts = torch.split(encoder.final_BSR, [side.encoder_width for side in self.each], -1)
        return (SideEncoderState(final_BSR=part, attention_mask_BS=encoder.attention_mask_BS) for part in parts)


class OneStackNetworks(SideNetworks):
    """The same beside a decoder-only model: all go on from one prefix, each along its own taps of it."""

    def encode(self, taps: StackTaps, attention_mask_BS: Tensor, images: Images | None = None) -> Any:
        return SidePrefix(taps=taps, attention_mask_BS=attention_mask_BS)

    def _each_source(self, encoder: Any) -> Iterator[SidePrefix]:
        parts = (selected_stack(encoder.taps, side.request.of_source) for side in self.each)
        return (SidePrefix(taps=part, attention_mask_BS=encoder.attention_mask_BS) for part in parts)


class LadderEnsemble(Ladder):
    """Several side networks on one backbone, to predict with: `generate`, `logits_for_targets`, `forward`. Logits are log-probabilities."""

    side: SideNetworks

    def __init__(self, backbone: Any, sides: Sequence[SideNetwork]) -> None:
        if not sides:
            raise LadderError("an ensemble needs at least one side network")
        frozen = as_backbone(backbone)
        super().__init__(frozen, (OneStackNetworks if frozen.spec.one_stack else SideNetworks)(sides).eval(), form_of(frozen))

    @classmethod
    def from_pretrained(cls, folders: Sequence[str | Path], backbone: Any = None, *, allow_other_backbone: bool = False) -> LadderEnsemble:
        """Read saved side networks of one backbone, loaded once by its recorded name unless given.

        Raises:
            LadderError: a folder is not whole, or a side network was trained on another backbone, or after another context.
        """
        sides: list[SideNetwork] = []
        for folder in folders:
            one = LadderModel.from_pretrained(folder, backbone, allow_other_backbone=allow_other_backbone)
            if sides and one.backbone.identity.context != backbone.identity.context:
                raise LadderError(f"{folder} was trained after another context than {folders[0]}: they can't read one backbone's pass")
            backbone = one.backbone
            sides.append(one.side)
        return cls(backbone, sides)

    def save_pretrained(self, folder: str | Path) -> None:
        raise LadderError("an ensemble is not saved: its side networks are, each in its own folder")
