"""The source's ladder where image tokens stand after the text: they enter here, and the backbone never sees them.

    s = Dn_first(dropout([embedding ; tokens]))
    for i in side_layers:
        s = mu * s + (1 - mu) * [Dn_i(h_i) ; 0]         zeros after the downsample: no bias on image rows, but mu scales them
        s = side_block_i(s)                             relative positions on text x text; 0 where an image token is row or column

As in the release. `vision.scale_image_rows=false` leaves image rows as they are and gates the text rows alone.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from lst_scale.backbone.masks import padding_mask
from lst_scale.backbone.taps import BackboneSpec, StackTaps
from lst_scale.errors import LadderError
from lst_scale.inputs.images import Images
from lst_scale.side.config import LadderConfig
from lst_scale.side.designs.parts import SideEncoderState, cast_embedding, maybe_recompute
from lst_scale.side.designs.transformer import TransformerStack
from lst_scale.side.vision import VisualEmbedding, beside_images


class StackBesideImages(TransformerStack):
    """The ladder beside the source's stack, with image tokens after the text."""

    object_order: Tensor

    def __init__(self, spec: BackboneSpec, config: LadderConfig, *, is_decoder: bool) -> None:
        assert config.vision is not None and not is_decoder
        super().__init__(spec, config, is_decoder=False)
        stacks = self.family.stacks
        if stacks[0] == stacks[1]:
            raise LadderError(f"vision stands beside a stack that reads the source alone, which a {spec.model_type} has not: choose a T5")
        self.visual_embedding = VisualEmbedding(spec, config.vision)
        # (N, D), frozen: the backbone may not have these rows, so they are stored with what trains.
        self.register_buffer("object_order", torch.zeros(config.vision.tokens_per_image, spec.d_model))
        self.scale_image_rows = config.vision.scale_image_rows

    def forward(  # type: ignore[override]
        self, taps: StackTaps, encoder: None, mask_BS: Tensor | None, cache: None = None, *, images: Images
    ) -> Tensor:
        """Return the final side state (B, S + M, R): text rows, then image rows."""
        assert mask_BS is not None
        text = taps.embedding.shape[1]
        hidden = maybe_recompute(self.recompute, self._enter_with, taps.embedding, self.image_tokens(images))
        beside = hidden.shape[1] - text
        self_mask = padding_mask(beside_images(mask_BS, hidden.shape[1]))
        along = self.family.positions_of_text(next(iter(self.blocks.values())), text, beside)
        for key, tap in zip(self.blocks, taps.hidden, strict=True):
            hidden, along = maybe_recompute(self.recompute, self._from_tap, key, hidden, tap, encoder, self_mask, along, cache)
        final: Tensor = self.dropout(self.final_norm(hidden))
        return final

    def image_tokens(self, images: Images) -> Tensor:
        """Return what stands after the text (B, M, D)."""
        tokens: Tensor = self.visual_embedding(images, self.object_order)
        return tokens

    def _enter_with(self, embedding: Tensor, tokens: Tensor) -> Tensor:
        entering = torch.cat([cast_embedding(embedding), tokens], 1)
        if self.normalize_taps:  # one scale for words and images
            entering = nn.functional.rms_norm(entering, entering.shape[-1:], eps=1e-6)
        narrow: Tensor = self.first_downsample(self.dropout(entering))
        return narrow

    def _rung(
        self, key: str, hidden: Tensor, tap: Tensor, encoder: SideEncoderState | None, self_mask: Tensor, along: Any, cache: Any
    ) -> tuple[Tensor, Any]:
        text, gate = tap.shape[1], self.gates[key]
        if self.scale_image_rows:
            gated = gate(hidden, nn.functional.pad(tap, (0, 0, 0, hidden.shape[1] - text)))
        else:
            gated = torch.cat([gate(hidden[:, :text], tap), hidden[:, text:]], 1)
        return self.family.run_block(self.blocks[key], gated, along, mask=self_mask, source=None, source_mask=None, cache=cache)
