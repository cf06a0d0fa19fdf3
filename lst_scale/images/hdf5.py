"""Features that an image model made elsewhere, one HDF5 file an image, as the release stores them: NAME.h5 with a data set NAME/features.

They stay where they are and are read when a batch asks for them. Needs h5py, of the extra [hdf5].
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from lst_scale.errors import DataError, fence
from lst_scale.images.made import refuse_no_grid, refuse_other_features
from lst_scale.images.rows import numbers_of, row_called
from lst_scale.inputs.images import Images
from lst_scale.recipe.vision import VisionRecipe
from lst_scale.system.extras import require


class StoredReader:
    """Gives rows the features of their images, out of files.

    Raises:
        ArgumentError: h5py is not installed.
    """

    def __init__(self, recipe: VisionRecipe) -> None:
        require("h5py", "hdf5", asked_by="vision.image_model=hdf5")
        self._recipe = recipe

    def read(self, rows: Iterable[tuple[str, ...]], where: str = "", first: int = 1) -> StoredOfRows:
        """Return the images of rows, given the files of each one's features.

        Raises:
            DataError: a row's file is missing, or holds no features of an image.
            LadderError: the features are others than the recipe says.
        """
        place: dict[str, int] = {}
        numbers = [[place.setdefault(file, len(place)) for file in row] for row in rows]
        found = StoredOfRows(list(place), numbers, where, first)
        refuse_other_features(self._recipe, found.shape)
        refuse_no_grid("hdf5", found.shape[0])
        return found


class StoredOfRows:
    """Which files each row of a split has, and what they hold: (G, F) each, of one shape."""

    def __init__(self, files: Sequence[str], numbers: Sequence[Sequence[int]], where: str, first: int) -> None:
        self._files, self._where, self._first = files, where, first
        self._numbers = np.array(numbers, np.int32)  # (rows, I): which of the files
        for file, number in zip(files, self._first_rows(), strict=True):
            if not Path(file).is_file():
                raise DataError(f"{self._called(number)}: {file} is gone: put the image's features there, or remove the row")
        states = [f"{file} {Path(file).stat().st_size}" for file in files]
        self.digest = hashlib.sha256("\n".join(states).encode() + self._numbers.tobytes()).hexdigest()
        self.shape: tuple[int, ...] = self._read(0, 0).shape

    def of(self, rows: Sequence[int]) -> Images:
        """Return those of a batch; a filler row has the first row's.

        Raises:
            DataError: a file holds no features, or of another shape than the first; names row and file.
        """
        numbers = numbers_of(self._numbers, rows)
        features = [[self._checked(int(number), row) for number in images] for images, row in zip(numbers, rows, strict=True)]
        return Images(features_BIGF=torch.from_numpy(np.array(features)))

    def _called(self, row: int) -> str:
        return row_called(self._where, row + self._first)

    def _first_rows(self) -> NDArray[np.int64]:
        """Return the first row that has each of the files, in order."""
        first: NDArray[np.int64] = np.unique(self._numbers.ravel(), return_index=True)[1] // self._numbers.shape[1]
        return first

    def _checked(self, number: int, row: int) -> NDArray[np.floating]:
        found = self._read(number, max(row, 0))
        if found.shape != self.shape:
            where, other = self._called(max(row, 0)), f"those of {self._files[0]} are {self.shape}"
            raise DataError(f"{where}: the features in {self._files[number]} are {found.shape}, and {other}: store one shape")
        return found

    def _read(self, number: int, row: int) -> NDArray[np.floating]:
        import h5py

        file = self._files[number]
        name = f"{Path(file).stem}/features"
        with fence(DataError, f"{self._called(row)}: {file} is no whole file of features"), h5py.File(file, "r") as stored:
            if name not in stored:
                raise DataError(f"{self._called(row)}: {file} holds no data set {name}, but {', '.join(stored) or 'nothing'}")
            features: NDArray[np.floating] = stored[name][...]
        if features.ndim != 2 or features.dtype.kind != "f" or not np.isfinite(features).all():
            found = f"{features.dtype} {features.shape}"
            raise DataError(f"{self._called(row)}: {file} holds {found}, and should hold finite (positions, channels)")
        return features
