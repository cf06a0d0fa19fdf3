"""Side networks of small models, saved as they are after training, and what answers for them."""

from __future__ import annotations

import queue
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from lst_scale import LadderConfig, LadderModel
from lst_scale.backbone import as_backbone
from lst_scale.data.prompts import PromptTokenizer
from lst_scale.serving.engine import Engine
from lst_scale.serving.jobs import Ended, Generation, Scoring
from lst_scale.serving.networks import Network, Networks
from lst_scale.serving.passes import Passes
from lst_scale.serving.sampling import Chosen, Sampling


def save_sides(model: Any, folder: Path, count: int, **config: Any) -> dict[str, Path]:
    """Save side networks that are far from their start, so that answers differ: of two shapes in turns, and every fifth of a third."""
    backbone, found = as_backbone(model), {}
    for number in range(count):
        torch.manual_seed(number)
        layers, narrower = ([0, 2], [1, 3])[number % 2], 8 if number % 5 == 4 else 4
        own = {"reduction_factor": narrower, "side_layers": layers}
        if config.get("design") == "tail":
            own = {"side_layers": layers[:1], "tail": {"rank": narrower, "alpha": 4, "targets": ["q", "v"]}}
        ladder = LadderModel(backbone, LadderConfig(**own, **config))
        with torch.no_grad():
            for parameter in ladder.side.parameters():
                parameter.add_(torch.randn_like(parameter) * 0.2)
        found[f"side{number}"] = folder / f"side{number}"
        ladder.save_pretrained(found[f"side{number}"])
    return found


def engine_of(model: Any, sides: dict[str, Path], tokenizer: Any, **options: Any) -> tuple[Engine, Networks]:
    backbone = as_backbone(model)
    networks = Networks(backbone, PromptTokenizer(tokenizer) if backbone.spec.one_stack else tokenizer)
    for name, folder in sides.items():
        networks.add(name, folder)
    engine = Engine(Passes(backbone), networks, **options)
    engine.start()
    return engine, networks


class Asked:
    """A request whose events are kept."""

    def __init__(self, engine: Engine, network: Network, prompt: Sequence[int], most: int, **sampling: Any) -> None:
        self.events: queue.Queue[Chosen | Ended] = queue.Queue()
        self.prompt = tuple(prompt)
        self.job = Generation(network=network, prompt=self.prompt, sampling=Sampling(**sampling), max_tokens=most, tell=self.events.put)
        engine.submit(self.job)

    def tokens(self, seconds: float = 60) -> list[int]:
        """Return all tokens, once it has ended."""
        found = []
        while isinstance(event := self.events.get(timeout=seconds), Chosen):
            found.append(event.token)
        assert event.reason in ("stop", "length"), event
        return found


def scores_of(engine: Engine, asked: Sequence[tuple[Network, Sequence[int], Sequence[Sequence[int]]]]) -> list[list[float]]:
    """Return the log-likelihoods of targets after prompts, all asked at once."""
    waiting = []
    for network, prompt, targets in asked:
        found: queue.Queue[Any] = queue.Queue()
        engine.submit(Scoring(network=network, prompt=tuple(prompt), targets=tuple(map(tuple, targets)), tell=found.put))
        waiting.append(found)
    return [found.get(timeout=60) for found in waiting]


def alone(folder: Path, model: Any) -> Callable[[Sequence[int], int], list[int]]:
    """Return what generates by transformers, beside one side network and one prompt at a time, new tokens without the end."""
    ladder = LadderModel.from_pretrained(folder, model)

    def generate(prompt: Sequence[int], most: int) -> list[int]:
        ids = torch.tensor([list(prompt)])
        found = ladder.generate(ids, torch.ones_like(ids), max_new_tokens=most, do_sample=False)[0].tolist()
        new = found[len(prompt) :] if ladder.spec.one_stack else found[1:]
        return [token for token in new if token != ladder.spec.eos_token_id]

    return generate
