"""The side network: all that trains. It reads taps and returns the decoder's hidden states for the backbone's frozen head.

    s_encoder = encoder ladder(taps)                    one file a design: transformer.py, adapter.py, ...
    s_decoder = decoder ladder(taps, s_encoder)
    hidden    = Up(s_decoder)                           Linear d/r -> d, bias; the adapter design is d wide already

Every parameter here trains, is float32, and is used by its own module's forward alone, so that ZeRO-3 can gather it there.
Shapes: B rows, S source tokens, T target tokens, D = d_model, R = d_model / r.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from lst_scale.backbone.families import family_of
from lst_scale.backbone.masks import whole_mask
from lst_scale.backbone.taps import Backbone, BackboneSpec, FrozenHead, StackTaps, TapRequest, Taps, TargetState
from lst_scale.inputs.images import Images
from lst_scale.side.config import LadderConfig
from lst_scale.side.designs.adapter import AdapterStack
from lst_scale.side.designs.beside_images import StackBesideImages
from lst_scale.side.designs.cross_attention import CrossAttentionStack
from lst_scale.side.designs.one_stack import OneStack, SidePrefix, followed_by
from lst_scale.side.designs.parts import Gate, SideEncoderState, TwoStepDownsample
from lst_scale.side.designs.pointwise import PointwiseStack
from lst_scale.side.designs.tail import TailStack
from lst_scale.side.designs.transformer import TransformerStack
from lst_scale.side.vision import beside_images

STACKS: dict[str, type[Any]] = {"transformer": TransformerStack, "cross_attention": CrossAttentionStack, "adapter": AdapterStack}


class SideNetwork(nn.Module):
    """All that trains. Reads taps, returns the decoder's hidden states for the backbone's frozen head."""

    def __new__(cls, spec: BackboneSpec | None = None, config: LadderConfig | None = None) -> SideNetwork:
        if cls is not SideNetwork or spec is None or not spec.one_stack:
            return super().__new__(cls)
        kinds = {"pointwise": PointwiseNetwork, "tail": TailNetwork}
        return super().__new__(OneStackNetwork if config is None else kinds.get(config.design, OneStackNetwork))

    def __init__(self, spec: BackboneSpec, config: LadderConfig) -> None:
        config = config.on(spec)
        config.validate(spec)
        super().__init__()
        self.spec, self.config = spec, config
        self.request, self.vision = self.request_of(config), config.vision
        self._make_stacks(spec, config)
        wide = config.design in ("adapter", "tail")
        self.upsample = nn.Identity() if wide else nn.Linear(spec.side_width(config.reduction_factor), spec.d_model)
        self.merge_gate = Gate(config.gate_temperature) if config.merge_last and not config.start_as_backbone else None

    def _make_stacks(self, spec: BackboneSpec, config: LadderConfig) -> None:
        stack = STACKS[config.design]
        self.encoder = (stack if config.vision is None else StackBesideImages)(spec, config, is_decoder=False)
        self.decoder = stack(spec, config, is_decoder=True)

    def stacks(self) -> Iterator[tuple[str, Any]]:
        """Yield each of the backbone's stacks by name, and the ladder beside it."""
        names = family_of(self.spec.model_type, "this backbone").stacks
        return zip(names, (self.encoder, self.decoder), strict=True)

    @staticmethod
    def request_of(config: LadderConfig) -> TapRequest:
        """Return which states a side network of this configuration reads."""
        source = config.design != "pointwise"
        return TapRequest(layers=config.layers, target_final=config.merge_last, source=source, storage=config.tap_storage)

    @property
    def encoder_width(self) -> int:
        """Channels of the side encoder's final state: R, or D for the adapter design."""
        wide = self.config.design == "adapter"
        return self.spec.d_model if wide else self.spec.side_width(self.config.reduction_factor)

    @property
    def num_cache_layers(self) -> int:
        """How many layers of a cache its decoder fills."""
        if self.config.design == "tail":
            return self.spec.depth - 1 - self.config.layers[0]
        return len(self.config.layers) * {"cross_attention": 2, "pointwise": 0}.get(self.config.design, 1)

    def beside(self, backbone: Backbone) -> None:
        """Take from a backbone what of it is run again here: nothing, but in the design "tail"."""

    def held(self) -> Iterator[Tensor]:
        """Yield the weights that came so: frozen, and no part of the module."""
        return iter(())

    def gates(self) -> dict[str, Gate]:
        """Return the gates that train, each by the name of its parameter."""
        return {f"{path}.alpha": gate for path, gate in self.named_modules() if isinstance(gate, Gate)}

    def no_decay(self) -> frozenset[str]:
        """Return the parameters that weight decay must leave alone: it would pull a gate to 1/2, whatever it learned."""
        return frozenset(self.gates())

    def forward(self, taps: Taps, images: Images | None = None) -> Tensor:
        """Return hidden states (B, T, D), to be scaled and multiplied by the frozen head."""
        encoder = self.encode(taps.source, taps.source_mask_BS, images)
        return self.decode(TargetState(taps=taps.target, final_BTD=taps.final_BTD), encoder)

    def encode(self, taps: StackTaps, attention_mask_BS: Tensor, images: Images | None = None) -> Any:
        """Run the side encoder on the source's text and, where it reads them, images."""
        with self._precision(taps):
            if images is None:
                final_BSR = self.encoder(taps, None, attention_mask_BS)
            else:
                final_BSR = self.encoder(taps, None, attention_mask_BS, images=images)
        return SideEncoderState(final_BSR=final_BSR, attention_mask_BS=beside_images(attention_mask_BS, final_BSR.shape[1]))

    def decode(self, decoder: TargetState, encoder: Any, cache: Any | None = None) -> Tensor:
        """Return hidden states (B, T, D) of the given positions; with a cache, which holds its own layers alone, of the new ones."""
        with self._precision(decoder.taps):
            final_BTR = self._on_target(decoder.taps, encoder, cache)
            hidden_BTD: Tensor = self.upsample(final_BTR)
            if self.config.merge_last:
                assert decoder.final_BTD is not None
                final_BTD = decoder.final_BTD.to(hidden_BTD.dtype)
                # Without a gate the upsample starts at zero, so the first prediction is the backbone's own.
                hidden_BTD = hidden_BTD + final_BTD if self.merge_gate is None else self.merge_gate(hidden_BTD, final_BTD)
        return hidden_BTD

    def _on_target(self, taps: StackTaps, encoder: Any, cache: Any | None) -> Tensor:
        final_BTR: Tensor = self.decoder(taps, encoder, None, cache)
        return final_BTR

    def logits(self, head: FrozenHead, decoder: TargetState, encoder: Any, cache: Any | None = None) -> Tensor:
        """Return logits (B, T, V), by the backbone's head, of what `decode` returns."""
        return head(self.decode(decoder, encoder, cache))

    @contextlib.contextmanager
    def _precision(self, taps: StackTaps) -> Iterator[None]:
        if self.config.precision == "bf16":
            with torch.autocast(taps.embedding.device.type, torch.bfloat16):
                yield
        else:
            yield


class OneStackNetwork(SideNetwork):
    """Beside a decoder-only model: one ladder, along the source and on into the target.

    s = stack(taps of source and target)            no token sees a later one
    hidden = Up(s) at the target's positions        + the backbone's final normed state, with start_as_backbone
    """

    def _make_stacks(self, spec: BackboneSpec, config: LadderConfig) -> None:
        self.stack: Any = OneStack(spec, config)

    def stacks(self) -> Iterator[tuple[str, Any]]:
        yield family_of(self.spec.model_type, "this backbone").stacks[0], self.stack

    def encode(self, taps: StackTaps, attention_mask_BS: Tensor, images: Images | None = None) -> SidePrefix:
        """Return what comes before a target: the ladder runs along it when the target is there."""
        return SidePrefix(taps=taps, attention_mask_BS=attention_mask_BS)

    def _on_target(self, taps: StackTaps, prefix: SidePrefix, cache: Any | None) -> Tensor:
        length = taps.embedding.shape[1]
        past = 0 if cache is None else int(cache.get_seq_length())
        if past == 0 and prefix.taps.embedding.shape[1]:
            taps = followed_by(prefix.taps, taps)
        mask = whole_mask(prefix.attention_mask_BS, past + taps.embedding.shape[1] - length, length)
        final_BTR: Tensor = self.stack(taps, None, mask, cache)[:, -length:]
        return final_BTR


class PointwiseNetwork(OneStackNetwork):
    """Beside a decoder-only model: a ladder at the target's positions alone, each by itself."""

    def _make_stacks(self, spec: BackboneSpec, config: LadderConfig) -> None:
        self.stack = PointwiseStack(spec, config)

    def _on_target(self, taps: StackTaps, prefix: SidePrefix, cache: Any | None) -> Tensor:
        final_BTR: Tensor = self.stack(taps)
        return final_BTR


class TailNetwork(OneStackNetwork):
    """Beside a decoder-only model: its own last blocks, with updates that train, along the source and on into the target."""

    def _make_stacks(self, spec: BackboneSpec, config: LadderConfig) -> None:
        self.stack = TailStack(spec, config)

    def stacks(self) -> Iterator[tuple[str, Any]]:
        """There is no ladder of side blocks."""
        return iter(())

    def beside(self, backbone: Backbone) -> None:
        self.stack.beside(backbone)

    def held(self) -> Iterator[Tensor]:
        held: Iterator[Tensor] = self.stack.held()
        return held


__all__ = ["STACKS", "Gate", "SideEncoderState", "SideNetwork", "TwoStepDownsample"]
