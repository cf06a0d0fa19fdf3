"""A design without attention: each position of the target reads its own taps and nothing else.

    s = Dn_first(dropout(RMS(embedding)))
    for i in side_layers:                               ascending
        x = mu * s + (1 - mu) * Dn_i(RMS(h_i))          the gate of the transformer design
        s = x + dropout(FeedForward(RMSNorm(x)))        the backbone's own kind, at 1/r of its width
    s = dropout(RMSNorm(s))

What a position knows of others it knows from the backbone's attention, which has been there. So the source's taps are read by nobody, a
cache on disk holds those of answers alone, generation needs no keys and values beside the backbone's, and a prompt may be of any length.
"""

from __future__ import annotations

from torch import Tensor, nn

from lst_scale.backbone.families import family_of
from lst_scale.backbone.taps import BackboneSpec, StackTaps, Tap
from lst_scale.side.config import LadderConfig
from lst_scale.side.designs.attention import Dropout
from lst_scale.side.designs.parts import make_downsample, make_gate, maybe_recompute, narrowing, prepare_tap


class PointwiseBlock(nn.Module):
    """x + dropout(FeedForward(RMSNorm(x)))."""

    def __init__(self, norm: nn.Module, feed_forward: nn.Module, dropout: float) -> None:
        super().__init__()
        self.norm, self.feed_forward, self.dropout = norm, feed_forward, Dropout(dropout)

    def forward(self, hidden: Tensor) -> Tensor:
        result: Tensor = hidden + self.dropout(self.feed_forward(self.norm(hidden)))
        return result


class PointwiseStack(nn.Module):
    """The ladder beside a decoder-only model's answers."""

    def __init__(self, spec: BackboneSpec, config: LadderConfig) -> None:
        super().__init__()
        family, narrow = family_of(spec.model_type, "this backbone"), narrowing(spec, config)
        width, keys = spec.side_width(config.reduction_factor), [str(layer) for layer in config.layers]
        self.normalize_taps, self.recompute = bool(config.normalize_taps), config.recompute
        self.dropout = Dropout(narrow.dropout)
        self.first_downsample = make_downsample(config, spec.d_model, width)
        self.downsamples = nn.ModuleDict({key: make_downsample(config, spec.d_model, width) for key in keys})
        self.gates = nn.ModuleDict({key: make_gate(config, width) for key in keys})
        self.blocks = nn.ModuleDict(
            {key: PointwiseBlock(family.side_norm(spec, width), family.side_feed_forward(spec, narrow), narrow.dropout) for key in keys}
        )
        self.final_norm = family.side_norm(spec, width)

    def forward(self, taps: StackTaps) -> Tensor:
        """Return the side state (B, T, R) of the positions whose taps are given."""
        hidden = maybe_recompute(self.recompute, self._enter, taps.embedding)
        for key, tap in zip(self.blocks, taps.hidden, strict=True):
            hidden = maybe_recompute(self.recompute, self._from_tap, key, hidden, tap)
        final: Tensor = self.dropout(self.final_norm(hidden))
        return final

    def _enter(self, embedding: Tensor) -> Tensor:
        narrow: Tensor = self.first_downsample(self.dropout(prepare_tap(embedding, normalize=self.normalize_taps)))
        return narrow

    def _from_tap(self, key: str, hidden: Tensor, tap: Tap) -> Tensor:
        narrow_tap = self.downsamples[key](prepare_tap(tap, normalize=self.normalize_taps))
        result: Tensor = self.blocks[key](self.gates[key](hidden, narrow_tap))
        return result
