"""Rows and the numbers of their images."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from lst_scale.inputs.keys import FILLER


def row_called(where: str, number: int) -> str:
    """Return what a message calls a row, counted from 1."""
    return f"{where}: row {number}" if where else f"row {number}"


def numbers_of(numbers: NDArray[np.int32], rows: Sequence[int]) -> NDArray[np.int32]:
    """Return the images' numbers of some rows; a filler row has the first row's."""
    chosen: NDArray[np.int32] = numbers[[0 if row == FILLER else row for row in rows]]
    return chosen
