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

from lst_scale.backbone.taps import Backbone, DecoderState, EncoderState, StackTaps, TapRequest, selected_stack, union
from lst_scale.errors import LadderError
from lst_scale.side.model import LadderModel
from lst_scale.side.network import SideNetwork
from lst_scale.side.parts import SideEncoderState


class SideNetworks(nn.Module):
    """K side networks, and what they read together. Their decoders' cache entries follow one another."""

    def __init__(self, sides: Sequence[SideNetwork]) -> None:
        super().__init__()
        self.each: Any = nn.ModuleList(sides)
        self.request: TapRequest = union([side.request for side in sides])
        self.num_cache_layers = 0
        for side in sides:
            _shift_cache_layers(side, self.num_cache_layers)
            self.num_cache_layers += side.num_cache_layers

    def encode(self, taps: StackTaps, attention_mask_BS: Tensor) -> SideEncoderState:
        """Return all final states side by side (B, S, sum of widths): one tensor, whose rows beam search can repeat."""
        finals = [side.encode(selected_stack(taps, side.request), attention_mask_BS).final_BSR for side in self.each]
        return SideEncoderState(final_BSR=torch.cat(finals, -1), attention_mask_BS=attention_mask_BS)

    def decode_each(self, decoder: DecoderState, encoder: SideEncoderState, cache: Any | None = None) -> Iterator[Tensor]:
        """Yield the hidden states (B, T, D) of each."""
        parts = torch.split(encoder.final_BSR, [side.encoder_width for side in self.each], -1)
        for side, final_BSR in zip(self.each, parts, strict=True):
            own = DecoderState(taps=selected_stack(decoder.taps, side.request), final_BTD=decoder.final_BTD)
            yield side.decode(own, SideEncoderState(final_BSR=final_BSR, attention_mask_BS=encoder.attention_mask_BS), cache)


class LadderEnsemble(LadderModel):
    """A `LadderModel` of several side networks, for answering: `generate`, `logits_of_each`, `forward`.

    Its logits are log-probabilities. It takes its side networks over: their cache entries move.
    """

    def __init__(self, backbone: Backbone, sides: Sequence[SideNetwork]) -> None:
        if not sides:
            raise LadderError("an ensemble needs at least one side network")
        nn.Module.__init__(self)
        object.__setattr__(self, "backbone", backbone)
        self.side: Any = SideNetworks(sides)
        self._describe(backbone.spec, self.side.num_cache_layers)
        self.eval()

    @classmethod
    def from_pretrained(  # type: ignore[override]
        cls, folders: Sequence[str | Path], backbone: Any = None, *, allow_other_backbone: bool = False
    ) -> LadderEnsemble:
        """Read saved side networks of one backbone, loaded once by its recorded name unless given.

        Raises:
            LadderError: a folder is not whole, or a side network was trained on another backbone.
        """
        sides: list[SideNetwork] = []
        for folder in folders:
            one = LadderModel.from_pretrained(folder, backbone, allow_other_backbone=allow_other_backbone)
            backbone = one.backbone
            sides.append(one.side)
        return cls(backbone, sides)

    def _logits(self, decoder: DecoderState, side: SideEncoderState, cache: Any | None = None) -> Tensor:
        total: Tensor | None = None
        for hidden_BTD in self.side.decode_each(decoder, side, cache):  # one network's logits at a time
            found = self.backbone.head(hidden_BTD).float().log_softmax(-1)
            total = found if total is None else torch.logaddexp(total, found)
        assert total is not None
        return total - math.log(len(self.side.each))

    def encode(
        self, input_ids_BS: Tensor, attention_mask_BS: Tensor, source: EncoderState | None = None
    ) -> tuple[EncoderState, SideEncoderState]:
        encoder = source or self.read(input_ids_BS, attention_mask_BS)
        return encoder, self.side.encode(encoder.taps, attention_mask_BS)

    def save_pretrained(self, folder: str | Path) -> None:
        raise LadderError("an ensemble is not saved: its side networks are, each in its own folder")


def _shift_cache_layers(side: SideNetwork, by: int) -> None:
    """Move a side decoder's entries in caches back, behind those of the side networks before it."""
    decoder: Any = side.decoder
    if hasattr(decoder, "first_cache_layer"):
        decoder.first_cache_layer += by
    for module in decoder.modules():
        if isinstance(getattr(module, "layer_idx", None), int):
            module.layer_idx += by
