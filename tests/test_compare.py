"""The table and the plot of finished runs."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from conftest import ROOT

from lst_scale.compare import compare, find_results, plot, rows
from lst_scale.errors import ArgumentError


def write(folder: Path, **changes: Any) -> None:
    result = {
        "name": "lst",
        "method": "lst",
        "task": "rte",
        "seed": 0,
        "scores": {"score": 60.0},
        "trainable_parameters": 10,
        "backbone_parameters": 1000,
        "trainable_share_percent": 1.0,
        "peak_memory_bytes": 2_000_000_000,
        "seconds_per_step": 0.5,
        "train_seconds": 50.0,
        "saved_bytes": 4_000_000,
    } | changes
    folder.mkdir(parents=True)
    (folder / "result.json").write_text(json.dumps(result))


@pytest.fixture
def runs(tmp_path: Path) -> Path:
    write(tmp_path / "a", scores={"score": 60.0})
    write(tmp_path / "b", seed=1, scores={"score": 64.0}, peak_memory_bytes=3_000_000_000)
    write(tmp_path / "deep" / "c", name="lora", method="lora", scores={"score": 70.0})
    return tmp_path


def test_rows_are_means_over_seeds_best_first(runs: Path) -> None:
    first, second = rows(find_results([runs]))
    assert (first["run"], first["seeds"], first["deviation"]) == ("lora", "1", "")
    assert (second["score"], second["deviation"], second["peak_gb"], second["saved_mb"]) == ("62.00", "2.83", "3.00", "4.00")


@pytest.mark.parametrize(("style", "line"), [("text", "lora"), ("markdown", "| lora |"), ("csv", "lora,lora,rte,1,70.00")])
def test_every_format(runs: Path, style: str, line: str) -> None:
    assert line in compare(find_results([runs]), style)


@pytest.mark.parametrize(("ending", "magic"), [(".png", b"\x89PNG"), (".svg", b"<?xml")])
def test_the_plot(runs: Path, ending: str, magic: bytes) -> None:
    path = runs / f"plot{ending}"
    plot(find_results([runs]), path)
    assert path.read_bytes().startswith(magic) and path.stat().st_size > 2000


def test_the_command(runs: Path) -> None:
    command = [sys.executable, "-m", "lst_scale.cli", "compare", str(runs), "--format", "csv", "--plot", str(runs / "p.png")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.count("\n") == 3 and (runs / "p.png").exists()


def test_mistakes(runs: Path, tmp_path: Path) -> None:
    with pytest.raises(ArgumentError, match=r"format 'html' is unknown: write text, markdown, csv"):
        compare(find_results([runs]), "html")
    with pytest.raises(ArgumentError, match=r"none of the folders holds a result\.json"):
        find_results([tmp_path / "nowhere"])
    with pytest.raises(ArgumentError, match=r"write a file that ends in \.png or \.svg"):
        plot(find_results([runs]), tmp_path / "plot.jpg")
