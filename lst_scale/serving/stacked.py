"""Side networks of one shape as one module: rows of all of them go through it together, each meeting its own network's weights.

A side network is a percent of a backbone, and of its time on a few rows most is what every layer costs whoever calls it. So 32 of them one
after another take 32 times that. Here all weights of a kind lie side by side in one tensor (G, ...), and a linear map is one batched
product; attention, masks and caches are between a row's own positions and need no stacking at all.

Networks that answer at the moment are always the first ones, so that no weight is moved before a pass; one that comes or goes moves a
percent of the backbone's bytes, once. Shapes: N rows, G networks, T tokens.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from lst_scale.backbone.families import family_of
from lst_scale.serving.networks import Network
from lst_scale.side.designs.parts import Gate
from lst_scale.side.designs.tail import LowRankUpdate
from lst_scale.side.network import SideNetwork


class Routing:
    """Which network's weights each row meets in the next pass."""

    def __init__(self) -> None:
        self.slot_N = torch.zeros(0, dtype=torch.long)
        self.place_N = torch.zeros(0, dtype=torch.long)  # of each row among the padded rows
        self.networks, self.widest = 1, 1
        self.in_order = False  # as many rows of each network, those of the first one first: padding and order are as they are

    def set(self, slots: Sequence[int], device: torch.device) -> None:
        """Give each row the slot of its network. Rows of one network are padded to those of the network that has the most."""
        seen: dict[int, int] = {}
        within = []
        for slot in slots:
            within.append(seen.get(slot, 0))
            seen[slot] = within[-1] + 1
        self.networks, self.widest = max(seen) + 1, max(seen.values())
        self.slot_N = torch.tensor(slots, device=device)
        places = [slot * self.widest + place for slot, place in zip(slots, within, strict=True)]
        self.place_N = torch.tensor(places, device=device)
        self.in_order = places == list(range(self.networks * self.widest))


class _Stacked(nn.Module):
    """A layer whose weights are those of several networks, one after another."""

    def __init__(self, like: nn.Module, routing: Routing) -> None:
        super().__init__()
        self._routing = routing
        for name, parameter in like.named_parameters(recurse=False):
            self.register_buffer(name, parameter.detach().new_zeros(1, *parameter.shape))

    def make_room(self, count: int) -> None:
        for name, buffer in self.named_buffers(recurse=False):
            self.register_buffer(name, torch.cat([buffer, buffer.new_zeros(count - len(buffer), *buffer.shape[1:])]))

    def put(self, slot: int, like: nn.Module) -> None:
        for name, parameter in like.named_parameters(recurse=False):
            self.get_buffer(name)[slot].copy_(parameter.detach())

    def move(self, source: int, target: int) -> None:
        for _, buffer in self.named_buffers(recurse=False):
            buffer[target].copy_(buffer[source])


class StackedLinear(_Stacked):
    def forward(self, states: Tensor) -> Tensor:
        """Return (N, ..., out) of states (N, ..., in)."""
        bias = dict(self.named_buffers(recurse=False)).get("bias")
        return _mapped(states, self.get_buffer("weight"), bias, self._routing)


class StackedUpdate(_Stacked):
    """Low-rank updates of a frozen map."""

    def __init__(self, like: LowRankUpdate, routing: Routing) -> None:
        super().__init__(like, routing)
        self.scale = like.scale

    def forward(self, states: Tensor) -> Tensor:
        narrow = _mapped(states.to(self.get_buffer("down").dtype), self.get_buffer("down"), None, self._routing)
        return _mapped(narrow, self.get_buffer("up"), None, self._routing) * self.scale


def _mapped(states: Tensor, weight: Tensor, bias: Tensor | None, route: Routing) -> Tensor:
    """Return (N, ..., out) of states (N, ..., in), each row by its own network's map out of those side by side (G, out, in)."""
    if route.networks == 1:
        return nn.functional.linear(states, weight[0], None if bias is None else bias[0])
    flat = states.reshape(len(states), -1, states.shape[-1])  # (N, T, in)
    length = flat.shape[1]
    if route.in_order:
        padded = flat
    else:
        padded = flat.new_zeros(route.networks * route.widest, length, flat.shape[-1])
        padded[route.place_N] = flat
    grouped = padded.reshape(route.networks, route.widest * length, -1)
    weights = weight[: route.networks].transpose(1, 2)
    product = torch.bmm(grouped, weights) if bias is None else torch.baddbmm(bias[: route.networks, None], grouped, weights)
    rows = product.view(route.networks * route.widest, length, -1)
    return (rows if route.in_order else rows[route.place_N]).view(*states.shape[:-1], -1)


class StackedNorm(_Stacked):
    """A norm whose own weights are 1, times each row's."""

    def __init__(self, like: nn.Module, routing: Routing) -> None:
        super().__init__(like, routing)
        self.plain = copy.deepcopy(like).requires_grad_(False)
        for parameter in self.plain.parameters():
            parameter.fill_(1)

    def forward(self, states: Tensor) -> Tensor:
        normed: Tensor = self.plain(states)
        return normed * self.get_buffer("weight")[self._routing.slot_N][:, None]


class StackedGate(_Stacked):
    def __init__(self, like: Gate, routing: Routing) -> None:
        super().__init__(like, routing)
        self.temperature = like.temperature

    def forward(self, side: Tensor, tap: Tensor) -> Tensor:
        mu = torch.sigmoid(self.get_buffer("alpha")[self._routing.slot_N] / self.temperature)[:, None]
        return mu * side + (1 - mu) * tap


class StackedTable(_Stacked):
    """A table of biases by position, (rows, H) a network. Returns (..., N * H), which attention takes apart again."""

    def forward(self, index: Tensor) -> Tensor:
        own = self.get_buffer("weight")[self._routing.slot_N][:, index]  # (N, ..., H)
        return own.movedim(0, -2).flatten(-2)


def _kind_of(module: nn.Module, is_norm: bool) -> type[_Stacked] | None:
    if isinstance(module, nn.Linear):
        return StackedLinear
    if isinstance(module, LowRankUpdate):
        return StackedUpdate  # type: ignore[return-value]
    if isinstance(module, nn.Embedding):
        return StackedTable
    if isinstance(module, Gate):
        return StackedGate  # type: ignore[return-value]
    return StackedNorm if is_norm else None


class Stack:
    """Side networks of one shape, in as much memory as those need that answered at once so far. `like` is any of them."""

    def __init__(self, like: SideNetwork) -> None:
        self._room, self._routing = 1, Routing()
        self._slots: list[SideNetwork] = []  # those that answer at the moment, each in its slot
        shared = {id(weight): weight for weight in like.held()}  # frozen, and the backbone's: no network has its own
        self.side: SideNetwork = copy.deepcopy(like, shared).eval().requires_grad_(False)
        self._layers: dict[str, _Stacked] = {}
        family = family_of(like.spec.model_type, "this backbone")
        for path, module in list(self.side.named_modules()):
            kind = _kind_of(module, family.is_norm(module))
            if kind is not None:
                stacked = kind(module, self._routing).to(next(module.parameters()).device)
                parent, _, name = path.rpartition(".")
                setattr(self.side.get_submodule(parent), name, stacked)
                self._layers[path] = stacked
        left = [name for name, _ in self.side.named_parameters() if ".plain." not in name]
        assert not left, f"weights of a kind that is not stacked: {left[:3]}"

    def route(self, sides: Sequence[SideNetwork]) -> None:
        """Let each row of the next pass meet the weights of its own network; those that answer no row make room when it is needed."""
        place = {id(side): slot for slot, side in enumerate(self._slots)}
        wanted = {id(side): side for side in sides}
        for key, side in wanted.items():
            if key not in place:
                place[key] = self._slot_for(side, wanted)
        place = {id(side): slot for slot, side in enumerate(self._slots)}
        self._to_the_front([place[key] for key in wanted])
        place = {id(side): slot for slot, side in enumerate(self._slots)}
        self._routing.set([place[id(side)] for side in sides], next(iter(self.side.buffers())).device)

    def _slot_for(self, side: SideNetwork, wanted: dict[int, SideNetwork]) -> int:
        free = [slot for slot, held in enumerate(self._slots) if id(held) not in wanted]
        if free and len(self._slots) >= self._room:
            slot = free[0]
            self._slots[slot] = side
        else:
            slot = len(self._slots)
            self._slots.append(side)
            if slot >= self._room:
                self._room *= 2
                for layer in self._layers.values():
                    layer.make_room(self._room)
        modules = dict(side.named_modules())
        for path, layer in self._layers.items():
            layer.put(slot, modules[path])
        return slot

    def _to_the_front(self, slots: Sequence[int]) -> None:
        """Swap weights until the networks that are wanted have the first slots."""
        wanted = set(slots)
        holes = [slot for slot in range(len(wanted)) if slot not in wanted]
        for hole, slot in zip(holes, sorted(slot for slot in wanted if slot >= len(wanted)), strict=True):
            gone = self._slots[hole]
            for layer in self._layers.values():
                layer.move(slot, hole)
            self._slots[hole] = self._slots[slot]
            modules = dict(gone.named_modules())
            for path, layer in self._layers.items():
                layer.put(slot, modules[path])
            self._slots[slot] = gone


def sides_of(networks: Sequence[Network]) -> list[SideNetwork]:
    """Return the side networks of those that have one."""
    return [network.side for network in networks if network.side is not None]
