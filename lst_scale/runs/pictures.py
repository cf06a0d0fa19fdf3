"""What all pictures share: one colour for one thing in each of them, labels that do not cover one another, no window.

Colours are Okabe and Ito's, which people with any colour vision tell apart, and lighter shades of them.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lst_scale.errors import ArgumentError
from lst_scale.system.extras import require

METHODS = {
    "lst": "#0072B2",
    "lora": "#D55E00",
    "full": "#555555",
    "adapters": "#009E73",
    "bitfit": "#CC79A7",
    "prompt": "#E69F00",
    "ensemble": "#56B4E9",
    "probe": "#F0E442",
}
OTHER = "#999999"
Place = tuple[float, float, str]  # points to the right and up, and which side of the text is there
_NEAR: list[Place] = [(8, 0, "left"), (0, 9, "center"), (0, -9, "center"), (-8, 0, "right")]
_FAR: list[Place] = [(8, 8, "left"), (8, -8, "left"), (-8, 8, "right"), (-8, -8, "right"), (0, 9, "center"), (0, -9, "center")]
_PLACES = _NEAR + [(right * times, up * times, side) for times in (2, 3, 4.5, 6, 8, 11) for right, up, side in _FAR]


def check_picture(path: Path) -> None:
    """Refuse a picture that can't be drawn, before anything is computed for it.

    Raises:
        ArgumentError: the file's ending is another, its folder is missing, or matplotlib is.
    """
    if path.suffix not in (".png", ".svg"):
        raise ArgumentError(f"--plot {path}: write a file that ends in .png or .svg")
    if path.is_dir():
        raise ArgumentError(f"--plot {path}: is a folder: write a file's name")
    if not path.parent.is_dir():
        raise ArgumentError(f"--plot {path}: there is no folder {path.parent}")
    require("matplotlib", "plot", asked_by="--plot")


def figure(width: float, height: float) -> Any:
    """Return an empty figure in inches; it belongs to no window and no global state."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    drawn = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(drawn)
    return drawn


def save(drawn: Any, path: Path) -> None:
    """Write a figure.

    Raises:
        ArgumentError: the disk refused.
    """
    try:
        drawn.savefig(path, dpi=150)
    except OSError as error:
        raise ArgumentError(f"--plot {path}: {error.strerror or error}") from error


def label_points(axis: Any, points: Sequence[tuple[float, float]], texts: Sequence[str]) -> None:
    """Write a text beside each point where it covers no other text and no point: near, or further away with a line to its point."""
    axis.figure.draw_without_rendering()  # where things are is known from now on
    renderer = axis.figure.canvas.get_renderer()
    taken = [_around_point(axis, point) for point in points]
    if axis.get_legend() is not None:
        taken.append(axis.get_legend().get_window_extent(renderer))
    frame = axis.get_window_extent(renderer)
    for point, text in sorted(zip(points, texts, strict=True), key=lambda pair: -pair[0][1]):
        tried: list[tuple[float, Place]] = []
        for place in _PLACES:
            label = _write(axis, text, point, place)
            box = _text_box(label, renderer)
            tried.append((sum(_shared(box, other) for other in taken) + 3 * _outside(box, frame), place))
            label.remove()
            if tried[-1][0] == 0:
                break
        _, place = min(tried, key=lambda pair: pair[0])
        taken.append(_text_box(_write(axis, text, point, place), renderer))


def _write(axis: Any, text: str, point: tuple[float, float], place: Place) -> Any:
    right, up, side = place
    vertical = "center" if up == 0 else "bottom" if up > 0 else "top"
    far = max(abs(right), abs(up)) > 12
    arrow = {"arrowstyle": "-", "color": OTHER, "linewidth": 0.6, "shrinkB": 3} if far else None
    return axis.annotate(text, point, xytext=(right, up), textcoords="offset points", fontsize=8, ha=side, va=vertical, arrowprops=arrow)


def _text_box(label: Any, renderer: Any) -> Any:
    """Return where an annotation's words are, without its line."""
    from matplotlib.text import Text

    label.update_positions(renderer)
    return Text.get_window_extent(label, renderer)


def _around_point(axis: Any, point: tuple[float, float]) -> Any:
    from matplotlib.transforms import Bbox

    x, y = axis.transData.transform(point)
    return Bbox([[x - 7, y - 7], [x + 7, y + 7]])


def _shared(one: Any, other: Any) -> float:
    """Return the area that two boxes share, in pixels."""
    width = min(one.x1, other.x1) - max(one.x0, other.x0)
    height = min(one.y1, other.y1) - max(one.y0, other.y0)
    return float(width * height) if width > 0 and height > 0 else 0.0


def _outside(box: Any, frame: Any) -> float:
    return float(box.width * box.height) - _shared(box, frame)
