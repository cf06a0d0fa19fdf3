"""Importance of the backbone's weights by the empirical Fisher information: squared gradients, summed over single-example batches.

One pass over the examples, a few at a time, and for each few one walk up the blocks and one down. A walk reads a block from the
checkpoint, runs it (or runs it again with gradients, from its stored inputs) and drops it, so memory holds the sums, one block with its
gradients, and the block inputs of a few examples: never the three copies (weights, gradients, sums) of the plain way.

Source: Sung et al. 2022, section 3.3; the sums are those of the original release (loss: mean over an example's target tokens).
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from lst_scale.backbone.assemble import return_freed_memory
from lst_scale.backbone.checkpoint import HEAD, SHARED, Checkpoint, read_to
from lst_scale.backbone.masks import causal_mask
from lst_scale.durable import write_directory

PIECES_AT_ONCE = 4096  # of the vocabulary, whose gradient at the embedding exists at a time
AT_ONCE = 32  # examples whose block inputs are kept: each costs (S x blocks + T x blocks) x d_model floats
FILE = "importance.safetensors"


@dataclass(frozen=True, kw_only=True)
class Example:
    """One training example: token ids, not padded."""

    input_ids_S: Tensor
    labels_T: Tensor


def fisher_importance(checkpoint: Checkpoint, examples: Sequence[Example], device: torch.device | str = "cpu") -> dict[str, Tensor]:
    """Return the summed squared gradients of every matrix of every block by Hugging Face name, float32 on the CPU.

    The embedding's are summed over the vocabulary, (1, d_model), which is all that pruning asks of them.
    """
    total = _Sums()
    for start in range(0, len(examples), AT_ONCE):
        _Walk(checkpoint, examples[start : start + AT_ONCE], torch.device(device), total).run()
    return total.sums


def stored_importance(folder: Path, key: dict[str, Any], make: Callable[[], dict[str, Tensor]]) -> Callable[[str], Tensor]:
    """Return a reader of the importance stored under `key` in `folder`; made and stored first when it is not there."""
    digest = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:16]
    path = folder / digest
    if not (path / FILE).exists():
        sums = make()

        def fill(partial: Path) -> None:
            save_file(sums, partial / FILE)
            (partial / "key.json").write_text(json.dumps(key, indent=2) + "\n")

        write_directory(path, fill, lambda whole: load_file(whole / FILE))
    tensors = load_file(path / FILE)  # mapped: a tensor becomes resident when it is read
    return tensors.__getitem__


class _Sums:
    def __init__(self) -> None:
        self.sums: dict[str, Tensor] = {}

    def add(self, name: str, gradient: Tensor) -> None:
        if name not in self.sums:
            self.sums[name] = torch.zeros(gradient.shape, dtype=torch.float32)
        self.sums[name].addcmul_(gradient.cpu(), gradient.cpu())


class _Walk:
    """Up and down the whole model with a few examples."""

    def __init__(self, checkpoint: Checkpoint, examples: Sequence[Example], device: torch.device, total: _Sums) -> None:
        self.checkpoint, self.spec, self.device, self.total = checkpoint, checkpoint.spec, device, total
        self.sources = [example.input_ids_S.to(device)[None] for example in examples]
        self.labels = [example.labels_T.to(device) for example in examples]
        start = torch.tensor([self.spec.decoder_start_token_id], device=device)
        self.targets = [torch.cat([start, labels[:-1]])[None] for labels in self.labels]
        self.embedding = self._read(SHARED)
        checkpoint.config._attn_implementation = "sdpa"

    def run(self) -> None:
        encoder_inputs = self._up("encoder", [self.embedding[ids] for ids in self.sources], None)
        encoder_last = encoder_inputs.pop()
        encoder_norm = self._norm("encoder")
        with torch.no_grad():
            encoder_final = [encoder_norm(hidden) for hidden in encoder_last]
        decoder_inputs = self._up("decoder", [self.embedding[ids] for ids in self.targets], encoder_final)
        gradients, head_parts = self._head(decoder_inputs.pop())
        to_encoder = [torch.zeros_like(final) for final in encoder_final]
        to_targets = self._down("decoder", decoder_inputs, gradients, encoder_final, to_encoder)
        through_norm = [_backward(encoder_norm, hidden, gradient) for hidden, gradient in zip(encoder_last, to_encoder, strict=True)]
        to_sources = self._down("encoder", encoder_inputs, through_norm, None, None)
        self._embedding(to_sources, to_targets, head_parts)

    def _up(self, stack: str, hidden: list[Tensor], encoder: list[Tensor] | None) -> list[list[Tensor]]:
        """Return the inputs of every block, and last the last block's outputs, for every example."""
        inputs = []
        for block in self._blocks(stack, range(self._depth(stack))):
            inputs.append(hidden)
            with torch.no_grad():
                hidden = [self._run(block, stack, x, None if encoder is None else encoder[i]) for i, x in enumerate(hidden)]
        return [*inputs, hidden]

    def _down(
        self,
        stack: str,
        inputs: list[list[Tensor]],
        gradients: list[Tensor],
        encoder: list[Tensor] | None,
        to_encoder: list[Tensor] | None,
    ) -> list[Tensor]:
        """Return the gradients at the stack's embeddings; add up those at the encoder's final state; sum the squares of all weights'."""
        depth = self._depth(stack)
        for index, block in zip(range(depth - 1, -1, -1), self._blocks(stack, range(depth - 1, -1, -1)), strict=True):
            weights = {f"{stack}.block.{index}.{name}": p for name, p in block.named_parameters() if p.ndim == 2}
            weights = {name: p.requires_grad_(True) for name, p in weights.items() if "relative_attention_bias" not in name}
            for i, (x, gradient) in enumerate(zip(inputs[index], gradients, strict=True)):
                x = x.detach().requires_grad_(True)
                final = None if encoder is None else encoder[i].detach().requires_grad_(True)
                self._run(block, stack, x, final).backward(gradient)  # type: ignore[no-untyped-call]
                assert x.grad is not None
                gradients[i] = x.grad
                if final is not None and to_encoder is not None:
                    assert final.grad is not None
                    to_encoder[i] += final.grad
                for name, weight in weights.items():
                    assert weight.grad is not None, name
                    self.total.add(name, weight.grad)
                    weight.grad = None
            inputs[index] = []
        return gradients

    def _head(self, last: list[Tensor]) -> tuple[list[Tensor], list[tuple[Tensor, Tensor]]]:
        """Return the gradients at the last block's outputs, and the factors of the head's weight gradient where it is the embedding."""
        norm = self._norm("decoder")
        own = self.checkpoint.has_own_head
        head = self._read(HEAD) if own else self.embedding
        scale = self.spec.d_model**-0.5 if self.spec.scale_decoder_outputs else 1.0
        gradients, factors = [], []
        for hidden, labels in zip(last, self.labels, strict=True):
            x = hidden.detach().requires_grad_(True)
            scaled = norm(x)[0] * scale
            logits = (scaled @ head.T).detach().requires_grad_(True)
            nn.functional.cross_entropy(logits, labels).backward()  # type: ignore[no-untyped-call]
            assert logits.grad is not None
            scaled.backward(logits.grad @ head)
            assert x.grad is not None
            gradients.append(x.grad)
            factors.append((logits.grad, scaled.detach()))
        return gradients, [] if own else factors

    def _embedding(self, to_sources: list[Tensor], to_targets: list[Tensor], head_parts: list[tuple[Tensor, Tensor]]) -> None:
        for i, (source, target) in enumerate(zip(self.sources, self.targets, strict=True)):
            ids, gradients = torch.cat([source[0], target[0]]), torch.cat([to_sources[i][0], to_targets[i][0]])
            total_1D = torch.zeros(1, self.spec.d_model, device=self.device)
            for start in range(0, len(self.embedding), PIECES_AT_ONCE):
                pieces = min(PIECES_AT_ONCE, len(self.embedding) - start)
                gradient = torch.zeros(pieces, self.spec.d_model, device=self.device)
                if head_parts:
                    to_logits_TV, hidden_TD = head_parts[i]
                    gradient = to_logits_TV[:, start : start + pieces].T @ hidden_TD
                there = (ids >= start) & (ids < start + pieces)
                gradient.index_add_(0, ids[there] - start, gradients[there])
                total_1D += gradient.square_().sum(0, keepdim=True)
            # Sums over the vocabulary add up like squares do: by their roots.
            self.total.add(SHARED, total_1D.sqrt())

    def _run(self, block: nn.Module, stack: str, hidden: Tensor, encoder: Tensor | None) -> Tensor:
        length = hidden.shape[1]
        mask = causal_mask(length, 0, self.device) if stack == "decoder" else None
        with torch.no_grad():
            bias = self.tables[stack].compute_bias(length, length, device=self.device)
        output: Tensor = block(hidden, attention_mask=mask, position_bias=bias, encoder_hidden_states=encoder)[0]
        return output

    def _blocks(self, stack: str, order: range) -> Any:
        from transformers.models.t5.modeling_t5 import T5Block

        config = _stack_config(self.checkpoint.config, stack)
        for index in order:
            return_freed_memory()
            with torch.device("meta"):
                block = T5Block(config, has_relative_attention_bias=index == 0, layer_idx=index)
            names = [name for name, _ in block.named_parameters()]
            block.load_state_dict({name: self._read(f"{stack}.block.{index}.{name}") for name in names}, assign=True)
            block.eval().requires_grad_(False)
            if index == 0 and stack not in self.tables:
                self.tables[stack] = block.layer[0].SelfAttention
            yield block

    @property
    def tables(self) -> dict[str, Any]:
        """Each stack's owner of the relative-position table, by which all its blocks are biased."""
        if not hasattr(self, "_tables"):
            self._tables: dict[str, Any] = {}
        return self._tables

    def _norm(self, stack: str) -> Any:
        from transformers.models.t5.modeling_t5 import T5LayerNorm

        norm = T5LayerNorm(self.spec.d_model, eps=self.spec.layer_norm_epsilon)
        norm.weight = nn.Parameter(self._read(f"{stack}.final_layer_norm.weight"), requires_grad=False)
        return norm

    def _depth(self, stack: str) -> int:
        return self.spec.num_layers if stack == "encoder" else self.spec.num_decoder_layers

    def _read(self, name: str) -> Tensor:
        return read_to(self.checkpoint, name, torch.float32, self.device)


def _backward(module: nn.Module, hidden: Tensor, gradient: Tensor) -> Tensor:
    x = hidden.detach().requires_grad_(True)
    module(x).backward(gradient)
    assert x.grad is not None
    return x.grad


def _stack_config(config: Any, stack: str) -> Any:
    import copy

    narrowed = copy.deepcopy(config)
    narrowed.is_decoder = stack == "decoder"
    narrowed.use_cache = False
    narrowed._attn_implementation = "sdpa"
    return narrowed
