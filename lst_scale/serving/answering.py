"""Rows answered by side networks of one shape together, or by the backbone itself. Shapes: B rows, T new tokens, V vocabulary."""

from __future__ import annotations

from collections.abc import Hashable, Sequence

import torch
from torch import Tensor

from lst_scale.backbone.taps import TargetState
from lst_scale.serving.jobs import Job
from lst_scale.serving.networks import Network
from lst_scale.serving.passes import Passes, Prompt
from lst_scale.serving.rows import Rows
from lst_scale.serving.stacked import Stack, sides_of


class Answering:
    """Runs what answers after the backbone's passes; all networks of a call are of one shape, a network a row."""

    def __init__(self, passes: Passes) -> None:
        self._passes = passes
        self._stacks: dict[Hashable, Stack] = {}

    def begin(self, networks: Sequence[Network], prompts: list[Prompt]) -> tuple[Tensor, Rows | None]:
        """Return the logits (B, V) after prompts, and what the side networks keep of them."""
        stack = self._stack(networks[0])
        if stack is None:
            return torch.cat([self._passes.bare(prompt.target)[:, -1] for prompt in prompts]), None
        stack.route(sides_of(networks))
        return self._passes.begin(stack.side, prompts)

    def go_on(self, networks: Sequence[Network], state: TargetState, held: Rows | None) -> tuple[Tensor, Rows | None]:
        """Return the logits (B, T, V) of new tokens, and what the side networks keep of the rows now."""
        stack = self._stack(networks[0])
        if stack is None or held is None:
            return self._passes.bare(state), None
        stack.route(sides_of(networks))
        return self._passes.go_on(stack.side, state, held)

    def _stack(self, network: Network) -> Stack | None:
        if network.side is None:
            return None
        if network.shape not in self._stacks:
            self._stacks[network.shape] = Stack(network.side)
        return self._stacks[network.shape]


def by_shape(jobs: Sequence[Job]) -> dict[Hashable, list[Job]]:
    """Return jobs by what answers them together."""
    found: dict[Hashable, list[Job]] = {}
    for job in jobs:
        found.setdefault(job.network.shape, []).append(job)
    return found
