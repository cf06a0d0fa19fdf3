"""The planner's table as stacked bars: the same colour for the same part in every picture, a legend of what is there."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from lst_scale.plan.footprint import BACKWARD, FORWARD, GRADIENTS, METHOD, OPTIMIZER, PARTS, SAVED, STEP, TAPS, TRAINED, WEIGHTS
from lst_scale.plan.report import Line
from lst_scale.runs.pictures import figure, save

COLOURS = {
    WEIGHTS: "#7F7F7F",
    TRAINED: "#0072B2",
    OPTIMIZER: "#56B4E9",
    TAPS: "#009E73",
    SAVED: "#E69F00",
    GRADIENTS: "#CC79A7",
    FORWARD: "#F0E442",
    METHOD: "#B8A300",
    BACKWARD: "#D55E00",
    STEP: "#882255",
}
SLIVER = 0.004  # of the widest bar: thinner parts are not seen, and not in the legend


def draw(found: Sequence[Line], path: Path, *, title: str, memory: int | None, option: str | None) -> None:
    """Draw the peaks as stacked bars into a .png or .svg that `check_picture` let pass.

    Args:
        option: how the memory was written after --gpu-memory.
    """
    drawn = figure(9.5, 1.6 + 0.38 * len(found))
    axis = drawn.subplots()
    widest = max(line.found.peak for line in found)
    shown = [part for part in PARTS if any(line.found.parts.get(part, 0) > SLIVER * widest for line in found)]
    for place, line in enumerate(found):
        left = 0.0
        for part in PARTS:
            width = line.found.parts.get(part, 0) / 1e9
            axis.barh(place, width, left=left, height=0.7, color=COLOURS[part], linewidth=0)
            left += width
        axis.annotate(f"{left:.2f}", (left, place), xytext=(4, 0), textcoords="offset points", va="center", fontsize=8)
    axis.set_yticks(range(len(found)), [line.name for line in found])
    axis.set_xlim(0, max(widest, memory or 0) / 1e9 * 1.08)
    axis.invert_yaxis()
    axis.set_xlabel("peak memory of tensors on a rank, GB")
    axis.set_title(title, fontsize=10)
    handles = [axis.barh(0, 0, color=COLOURS[part], label=part) for part in shown]
    if memory is not None:
        handles.append(axis.axvline(memory / 1e9, color="black", linestyle="--", linewidth=1, label=f"--gpu-memory {option}"))
    drawn.legend(handles=handles, loc="outside right upper", fontsize=8)
    save(drawn, path)
