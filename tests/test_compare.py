"""The table and the plot of finished runs."""

from __future__ import annotations

import itertools
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from matplotlib.text import Text
from typer.testing import CliRunner

from helpers.paths import ROOT
from lst_scale.cli.main import app
from lst_scale.errors import ArgumentError
from lst_scale.runs.compare import _score_name, compare, find_results, plot, rows
from lst_scale.runs.finished import read_finished
from lst_scale.runs.pictures import figure, label_points


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


@pytest.mark.parametrize(("style", "line"), [("text", "lora"), ("markdown", "| lora |"), ("csv", "lora,lora,rte,1,70.00,,score,")])
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


DAMAGE = {
    "not JSON": b"{",
    "empty": b"",
    "a list": b"[]",
    "null": b"null",
    "a number": b"3",
    "no keys": b"{}",
    "not UTF-8": b'{"name": "\xff"}',
    "deep": b"[" * 100_000,
    "many digits": b'{"name": ' + b"9" * 5000 + b"}",
}
WRONG: dict[str, Any] = {
    "scores": [60.0],
    "name": None,
    "task": {"name": "rte"},
    "method": 3,
    "peak_memory_bytes": "much",
    "train_seconds": [1],
    "saved_bytes": None,
    "trainable_parameters": True,
    "trainable_share_percent": float("nan"),
    "backbone_parameters": float("inf"),
}


@pytest.mark.parametrize("damage", [*DAMAGE, *WRONG, "score NaN", "score a text", "no score", "a folder"])
def test_a_broken_result_is_named_and_left_out(damage: str, runs: Path) -> None:
    broken = runs / "deep" / "broken"
    if damage in WRONG:
        write(broken, **{damage: WRONG[damage]})
    elif damage in DAMAGE:
        broken.mkdir()
        (broken / "result.json").write_bytes(DAMAGE[damage])
    elif damage == "a folder":
        (broken / "result.json").mkdir(parents=True)
    else:
        write(broken, scores={"score NaN": {"score": float("nan")}, "score a text": {"score": "60"}, "no score": {}}[damage])
    found = CliRunner().invoke(app, ["compare", str(runs), "--format", "csv"])
    assert found.exit_code == 0 and found.stdout.count("\n") == 3, found.exception
    assert found.stderr.startswith(f"left out: {broken / 'result.json'}: ") and found.stderr.count("\n") == 1
    with pytest.raises(ArgumentError, match=r"no finished run can be read; left out: .*result\.json: "):
        compare(find_results([broken]))


def test_the_metric_is_named_in_the_table_and_on_the_axis(tmp_path: Path) -> None:
    write(tmp_path / "a", scores={"accuracy": 60.0, "f1": 50.0, "score": 55.0})
    write(tmp_path / "b", name="other", task="cola", scores={"matthews": 40.0, "score": 40.0})
    assert [row["metric"] for row in rows(find_results([tmp_path]))] == ["matthews", "accuracy+f1"]
    plot(find_results([tmp_path]), tmp_path / "plot.svg")
    shapes = (tmp_path / "plot.svg").read_text()
    assert "<!-- mean of accuracy and f1, % -->" in shapes and "<!-- matthews, % -->" in shapes


def test_labels_do_not_cover_one_another_and_memory_starts_at_zero() -> None:
    drawn = figure(6, 4)
    axis = drawn.subplots()
    points = [(0.92 + 0.001 * (number % 3), 60 + 0.05 * number) for number in range(9)]
    axis.plot(*zip(*points, strict=True), "o")
    axis.set(xlim=(0, 1.3), ylim=(55, 65))
    label_points(axis, points, [f"sweep-learning_rate-{number}" for number in range(9)])
    renderer = drawn.canvas.get_renderer()
    boxes = [Text.get_window_extent(text, renderer) for text in axis.texts]
    assert not any(one.overlaps(other) for one, other in itertools.combinations(boxes, 2))
    assert all(axis.get_window_extent(renderer).containsx(box.x1) for box in boxes)


@pytest.mark.parametrize(
    ("metrics", "name"),
    [
        (["accuracy"], "accuracy, %"),
        (["accuracy", "f1"], "mean of accuracy and f1, %"),
        (["pearson", "mae"], "pearson, %"),
        (["mae", "rmse"], "minus mean of mae and rmse"),
        (["mine:closeness"], "mine:closeness"),
        (["mine:closeness", "chrf"], "mean of mine:closeness and chrf"),
    ],
)
def test_the_score_s_axis_says_what_the_score_is(metrics: list[str], name: str, tmp_path: Path) -> None:
    write(tmp_path / "run", scores=dict.fromkeys([*metrics, "score"], 1.0))
    assert _score_name([read_finished(tmp_path / "run")]) == name
