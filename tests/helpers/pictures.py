"""Small pictures with questions about them, and a tiny vision tower of transformers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from transformers import CLIPImageProcessor, CLIPVisionConfig, CLIPVisionModel

COLOURS = {"red": (200, 30, 30), "green": (30, 200, 30), "blue": (30, 30, 200), "grey": (120, 120, 120)}
CHANNELS, GRID = 16, 4  # of the tower's features


def make_tower(folder: Path) -> Path:
    """Save a CLIP vision tower of random weights that reads 32 x 32 pixels as 4 x 4 patches."""
    torch.manual_seed(0)
    config = CLIPVisionConfig(
        hidden_size=CHANNELS, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2, image_size=32, patch_size=8
    )
    CLIPVisionModel(config).save_pretrained(folder)
    CLIPImageProcessor(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32}).save_pretrained(folder)
    return folder


def make_pictures(folder: Path, count: int = 24) -> Path:
    """Write pictures of one colour each, and rows.jsonl with two questions a picture; return the latter."""
    folder.mkdir(parents=True)
    rows = []
    for number in range(count):
        colour = list(COLOURS)[number % len(COLOURS)]
        Image.new("RGB", (40 + number, 32), tuple(min(255, part + number) for part in COLOURS[colour])).save(folder / f"{number}.png")
        rows.append({"question": "which colour is it", "answer": colour, "image": f"{number}.png", "other": f"{(number + 1) % count}.png"})
        rows.append({"question": "is it red", "answer": "yes" if colour == "red" else "no", "image": f"{number}.png", "other": "0.png"})
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder / "rows.jsonl"


def task_of(rows: Path, **changes: Any) -> dict[str, Any]:
    """Return a recipe's task on such rows."""
    return {
        "name": "colours",
        "kind": "classification",
        "train": str(rows),
        "validation": str(rows),
        "source": ["question"],
        "template": "{question}",
        "images": ["image"],
        "target": "answer",
        "labels": [*COLOURS, "yes", "no"],
    } | changes


def vision_of(tower: Path, **changes: Any) -> dict[str, Any]:
    return {"image_model": f"transformers:{tower}", "feature_dim": CHANNELS, "pooled_grid": 2} | changes
