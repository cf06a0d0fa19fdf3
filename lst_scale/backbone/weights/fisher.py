"""Importance of the backbone's weights by the empirical Fisher information: squared gradients, summed over single-example batches.

One pass over the examples, a few at a time, and for each few one walk up the blocks and one down. A walk reads a block from the
checkpoint, runs it (or runs it again with gradients, from its stored inputs) and drops it, so memory holds the sums, one block with its
gradients, and the block inputs of a few examples: never the three copies (weights, gradients, sums) of the plain way. The embedding is
there only while it is looked up and while it serves as the head; no gradient of its size is ever made.

Source: Sung et al. 2022, section 3.3; the sums are those of the original release (loss: mean over an example's target tokens).
"""

from __future__ import annotations

import functools
import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from lst_scale.backbone.families import BlockRef
from lst_scale.backbone.masks import causal_mask
from lst_scale.backbone.weights.assemble import filled, return_freed_memory
from lst_scale.backbone.weights.checkpoint import Checkpoint, read_to
from lst_scale.system.durable import alone, write_directory

TOKENS_AT_ONCE = 4096  # of the examples whose block inputs are kept: each costs (blocks of a stack) x d_model floats
FILE = "importance.safetensors"
SETTING = "XDG_CACHE_HOME"  # what to change for another place


@dataclass(frozen=True, kw_only=True)
class Example:
    """One training example: token ids, not padded."""

    input_ids_S: Tensor
    labels_T: Tensor


def fisher_importance(checkpoint: Checkpoint, examples: Sequence[Example], device: torch.device | str = "cpu") -> dict[str, Tensor]:
    """Return the summed squared gradients of every matrix of every block by Hugging Face name, float32 on the CPU.

    The embedding's are summed over the vocabulary, (1, d_model), which is all that pruning asks of them.
    """
    total, kind = _Sums(), _OneStackWalk if checkpoint.spec.one_stack else _Walk
    for few in _few_at_once(examples):
        kind(checkpoint, few, torch.device(device), total).run()
    return_freed_memory()
    return total.sums


def _few_at_once(examples: Sequence[Example]) -> Iterator[list[Example]]:
    few: list[Example] = []
    tokens = 0
    for example in examples:
        length = len(example.input_ids_S) + len(example.labels_T)
        if few and tokens + length > TOKENS_AT_ONCE:
            yield few
            few, tokens = [], 0
        few.append(example)
        tokens += length
    if few:
        yield few


def stored_importance(folder: Path, key: dict[str, Any], make: Callable[[], dict[str, Tensor]]) -> Callable[[str], Tensor]:
    """Return a reader of the importance stored under `key` in `folder`; made and stored first when it is not there, by one process."""
    digest = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:16]
    path = folder / digest
    if not (path / FILE).exists():
        with alone(path, SETTING):
            if not (path / FILE).exists():  # another process may have made it meanwhile
                _store(path, key, make())
        return_freed_memory()
    return functools.partial(_stored, path / FILE)


def _store(path: Path, key: dict[str, Any], sums: dict[str, Tensor]) -> None:
    def fill(partial: Path) -> None:
        save_file(sums, partial / FILE)
        (partial / "key.json").write_text(json.dumps(key, indent=2) + "\n")

    write_directory(path, fill, lambda whole: _names(whole / FILE), SETTING)


def _names(file: Path) -> list[str]:
    with safe_open(file, framework="pt") as stored:
        return list(stored.keys())


def _stored(file: Path, name: str) -> Tensor:
    """Read one tensor. The file is mapped for this one alone: pages once read count as resident for as long as a mapping lasts."""
    with safe_open(file, framework="pt") as stored:
        tensor: Tensor = stored.get_tensor(name)
    return tensor


class _Sums:
    def __init__(self) -> None:
        self.sums: dict[str, Tensor] = {}

    def add(self, name: str, gradient: Tensor) -> None:
        here = gradient.cpu()
        if name not in self.sums:
            self.sums[name] = torch.zeros(here.shape, dtype=torch.float32)
        self.sums[name].addcmul_(here, here)


@dataclass(frozen=True, kw_only=True)
class _HeadGradient:
    """What is needed of one example's gradient at the embedding as the head: each row that the example also looks up, the rest in sum."""

    looked_up_UD: Tensor
    other_squares_D: Tensor  # summed over all rows that it does not look up


class _Walk:
    """Up and down the whole model with a few examples."""

    def __init__(self, checkpoint: Checkpoint, examples: Sequence[Example], device: torch.device, total: _Sums) -> None:
        self.checkpoint, self.family, self.spec, self.device, self.total = checkpoint, checkpoint.family, checkpoint.spec, device, total
        self.labels = [example.labels_T.to(device) for example in examples]
        sources = [example.input_ids_S.to(device)[None] for example in examples]
        divided = [self._divided(source, labels[None]) for source, labels in zip(sources, self.labels, strict=True)]
        self.sources, self.targets = [source for source, _ in divided], [target for _, target in divided]
        self.positions: dict[str, Callable[[int, torch.device], Any]] = {}  # by stack

    def run(self) -> None:
        sources, targets = self._looked_up()
        source_stack, target_stack = self.family.stacks
        source_inputs = self._up(source_stack, sources, None)
        source_last = source_inputs.pop()
        source_norm = self._norm(source_stack)
        with torch.no_grad():
            source_final = [source_norm(hidden) for hidden in source_last]
        target_inputs = self._up(target_stack, targets, source_final)
        gradients, head_parts = self._head(target_inputs.pop())
        to_source_final = [torch.zeros_like(final) for final in source_final]
        to_targets = self._down(target_stack, target_inputs, gradients, source_final, to_source_final)
        through_norm = [_backward(source_norm, hidden, gradient) for hidden, gradient in zip(source_last, to_source_final, strict=True)]
        to_sources = self._down(source_stack, source_inputs, through_norm, None, None)
        self._embedding(to_sources, to_targets, head_parts)

    def _divided(self, source_1S: Tensor, labels_1T: Tensor) -> tuple[Tensor, Tensor]:
        """Return the source and the target that the model reads."""
        source, _, target = self.family.divide(self.spec, source_1S, torch.ones_like(source_1S), labels_1T)
        return source, target

    def _looked_up(self) -> tuple[list[Tensor], list[Tensor]]:
        """Return the embeddings of all sources and of all targets."""
        embedding = self._read(self.family.embedding_name) * self.family.embedding_scale(self.spec)
        return [embedding[ids] for ids in self.sources], [embedding[ids] for ids in self.targets]

    def _up(self, stack: str, hidden: list[Tensor], source: list[Tensor] | None) -> list[list[Tensor]]:
        """Return the inputs of every block, and last the last block's outputs, for every example."""
        inputs = []
        for ref in self._refs(stack):
            inputs.append(hidden)
            block = self._block(ref)
            with torch.no_grad():
                hidden = [self._run(block, stack, x, None if source is None else source[i]) for i, x in enumerate(hidden)]
            del block  # before the next one is read
        return [*inputs, hidden]

    def _down(
        self,
        stack: str,
        inputs: list[list[Tensor]],
        gradients: list[Tensor],
        source: list[Tensor] | None,
        to_source_final: list[Tensor] | None,
    ) -> list[Tensor]:
        """Return the gradients at the stack's embeddings; add up those at the source's final state; sum the squares of all weights'."""
        for ref in reversed(self._refs(stack)):
            self._down_block(ref, inputs.pop(), gradients, source, to_source_final)
        return gradients

    def _down_block(
        self,
        ref: BlockRef,
        inputs: list[Tensor],
        gradients: list[Tensor],
        source: list[Tensor] | None,
        to_source_final: list[Tensor] | None,
    ) -> None:
        """Replace the gradients at the block's outputs by those at its inputs."""
        block = self._block(ref)
        weights = {f"{ref.path}.{name}": p.requires_grad_(True) for name, p in self.family.matrices(block)}
        for i, (hidden, gradient) in enumerate(zip(inputs, gradients, strict=True)):
            x = hidden.detach().requires_grad_(True)
            final = None if source is None else source[i].detach().requires_grad_(True)
            self._run(block, ref.stack, x, final).backward(gradient)  # type: ignore[no-untyped-call]
            assert x.grad is not None
            gradients[i] = x.grad
            if final is not None and to_source_final is not None:
                assert final.grad is not None
                to_source_final[i] += final.grad
            for name, weight in weights.items():
                assert weight.grad is not None, name
                self.total.add(name, weight.grad)
                weight.grad = None

    def _head(self, last: list[Tensor]) -> tuple[list[Tensor], list[_HeadGradient]]:
        """Return the gradients at the last block's outputs, and those at the embedding where that is the head."""
        norm, head = self._norm(self.family.stacks[1]), self._read(self.family.head_name)
        scale = self.family.head_scale(self.spec)
        gradients, parts = [], []
        for i, (hidden, labels) in enumerate(zip(last, self.labels, strict=True)):
            x = hidden.detach().requires_grad_(True)
            scaled = norm(x)[0, -len(labels) :] * scale
            logits = (scaled @ head.T).detach().requires_grad_(True)
            nn.functional.cross_entropy(logits, labels).backward()  # type: ignore[no-untyped-call]
            assert logits.grad is not None
            scaled.backward(logits.grad @ head)
            assert x.grad is not None
            gradients.append(x.grad)
            if not self.checkpoint.has_own_head:
                parts.append(_head_gradient(logits.grad, scaled.detach(), self._rows(i)[0]))
        return gradients, parts

    def _embedding(self, to_sources: list[Tensor], to_targets: list[Tensor], head_parts: list[_HeadGradient]) -> None:
        for i in range(len(self.sources)):
            tokens_U, row_of_each = self._rows(i)
            looked_up_UD = torch.zeros(len(tokens_U), self.spec.d_model, device=self.device)
            looked_up_UD.index_add_(0, row_of_each, torch.cat([to_sources[i][0], to_targets[i][0]]))
            looked_up_UD *= self.family.embedding_scale(self.spec)
            other_D = looked_up_UD.new_zeros(self.spec.d_model)
            if head_parts:
                looked_up_UD += head_parts[i].looked_up_UD
                other_D = head_parts[i].other_squares_D
            # Sums over the vocabulary add up like squares do: by their roots.
            self.total.add(self.family.embedding_name, (looked_up_UD.square().sum(0, keepdim=True) + other_D).sqrt())

    def _rows(self, example: int) -> tuple[Tensor, Tensor]:
        """Return the different tokens that an example looks up, and which of them each token of its source and target is."""
        tokens = torch.cat([self.sources[example][0], self.targets[example][0]])
        found: tuple[Tensor, Tensor] = tokens.unique(return_inverse=True)  # type: ignore[no-untyped-call]
        return found

    def _run(self, block: nn.Module, stack: str, hidden: Tensor, source: Tensor | None) -> Tensor:
        """Run a block on one example; a target's block looks at its past alone and attends to the source's final state."""
        length = hidden.shape[1]
        mask = causal_mask(length, 0, self.device) if source is not None or self.spec.one_stack else None
        along = self.positions[stack](length, self.device)
        return self.family.run_block(block, hidden, along, mask=mask, source=source)[0]

    def _block(self, ref: BlockRef) -> nn.Module:
        return_freed_memory()  # the last block's, between the sums: the C library would keep it
        block = filled(self.family.block(self.checkpoint.config, ref), ref.path, self._read)
        if ref.stack not in self.positions:
            self.positions[ref.stack] = self.family.positions(block)
        return block

    def _norm(self, stack: str) -> nn.Module:
        return filled(*self.family.final_norm(self.spec, stack), self._read)

    def _refs(self, stack: str) -> list[BlockRef]:
        return [ref for ref in self.family.blocks(self.spec) if ref.stack == stack]

    def _read(self, name: str) -> Tensor:
        return read_to(self.checkpoint, name, torch.float32, self.device)


class _OneStackWalk(_Walk):
    """The same where source and target are one text: up and down one stack, all of whose tokens are seen, windows or not."""

    def run(self) -> None:
        stack = self.family.stacks[1]
        sources, targets = self._looked_up()
        inputs = self._up(stack, [torch.cat(both, 1) for both in zip(sources, targets, strict=True)], None)
        gradients, head_parts = self._head(inputs.pop())
        found = self._down(stack, inputs, gradients, None, None)
        lengths = [source.shape[1] for source in sources]
        to_sources = [each[:, :length] for each, length in zip(found, lengths, strict=True)]
        self._embedding(to_sources, [each[:, length:] for each, length in zip(found, lengths, strict=True)], head_parts)


def _head_gradient(to_logits_TV: Tensor, hidden_TD: Tensor, tokens_U: Tensor) -> _HeadGradient:
    """Sum the squares of the head's weight gradient G = L^T H over the vocabulary without making G: sum_v G_vd^2 = ((L L^T) H)_td H_td."""
    looked_up_UD = to_logits_TV[:, tokens_U].T @ hidden_TD
    others_TV = to_logits_TV.index_fill(1, tokens_U, 0.0)
    # Summed in float64: the terms have both signs.
    products_TT, hidden_TD = (others_TV @ others_TV.T).double(), hidden_TD.double()
    squares_D = (products_TT @ hidden_TD * hidden_TD).sum(0).clamp(min=0)
    return _HeadGradient(looked_up_UD=looked_up_UD, other_squares_D=squares_D.float())


def _backward(module: nn.Module, hidden: Tensor, gradient: Tensor) -> Tensor:
    x = hidden.detach().requires_grad_(True)
    module(x).backward(gradient)
    assert x.grad is not None
    return x.grad
