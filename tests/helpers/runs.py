"""What a run left in its folder."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor


def final_weights(folder: Path) -> dict[str, Tensor]:
    """Return the weights of the newest checkpoint."""
    return load_file(max((folder / "checkpoints").glob("step-*")) / "weights.safetensors")


def losses(folder: Path) -> list[float]:
    return [line["loss"] for line in metrics(folder) if line["kind"] == "train"]


def metrics(folder: Path) -> list[dict[str, Any]]:
    """Return the numbers written so far; a last line may be half written while the run is alive."""
    path = folder / "metrics.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines() if line.endswith("}")] if path.exists() else []


def newest_step(folder: Path) -> int:
    """Return the step of the newest checkpoint, 0 without one."""
    return max((int(path.name.removeprefix("step-")) for path in (folder / "checkpoints").glob("step-*")), default=0)


def last_step(folder: Path) -> int:
    return max((line["step"] for line in metrics(folder)), default=0)


def result(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "result.json").read_text())
    return found


def assert_same_weights(folder: Path, expected: dict[str, Tensor]) -> None:
    """Assert that a run ended with these weights, bit for bit."""
    found = final_weights(folder)
    assert found.keys() == expected.keys()
    different = [name for name in expected if not torch.equal(found[name], expected[name])]
    assert not different, f"{folder.name}: {different}"
