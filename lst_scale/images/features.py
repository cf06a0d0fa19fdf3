"""The images of a split's rows, as a batch takes them: features out of the store, by each row's pictures."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from typing import Protocol

import numpy as np
import torch

from lst_scale.data.pictures import PictureError
from lst_scale.errors import DataError
from lst_scale.images.made import refuse_other_features
from lst_scale.images.model import load_image_model
from lst_scale.images.rows import numbers_of, row_called
from lst_scale.images.store import FeatureStore, digest_of_file
from lst_scale.inputs.images import Images
from lst_scale.recipe.vision import STORED, VisionRecipe


class AnyImagesOfRows(Protocol):
    """Which images each row of a split has, and their features."""

    digest: str

    def of(self, rows: Sequence[int]) -> Images: ...


class RowReader(Protocol):
    """Gives rows the features of their images, by the files that they name."""

    def read(self, rows: Iterable[tuple[str, ...]], where: str = "", first: int = 1) -> AnyImagesOfRows:
        """Return the images of rows, given each one's files; in messages the rows are in `where`, from number `first` on."""
        ...


def image_reader(recipe: VisionRecipe) -> RowReader:
    """Return what reads the images that a recipe's rows name: pictures, or features that an image model made elsewhere.

    Raises:
        LadderError: the image model can't be had.
        ArgumentError: what it needs is not installed.
    """
    if recipe.image_model == STORED:
        from lst_scale.images.hdf5 import StoredReader

        return StoredReader(recipe)
    return ImageReader(recipe)


class ImagesOfRows:
    """Which images each row of a split has, and their features."""

    def __init__(self, store: FeatureStore, digests: Sequence[str], numbers: Sequence[Sequence[int]]) -> None:
        self._store, self._digests = store, digests
        self._numbers = np.array(numbers, np.int32)  # (rows, I): which of the digests
        self.digest = hashlib.sha256("".join(digests).encode() + self._numbers.tobytes()).hexdigest()

    def of(self, rows: Sequence[int]) -> Images:
        """Return those of a batch; a filler row has the first row's."""
        numbers = numbers_of(self._numbers, rows)
        features = np.stack([np.stack([self._store[self._digests[number]] for number in row]) for row in numbers])
        return Images(features_BIGF=torch.from_numpy(features))


class ImageReader:
    """Gives rows the features of their pictures; those that are not on disk yet are made.

    Raises:
        LadderError: the image model can't be had.
    """

    def __init__(self, recipe: VisionRecipe) -> None:
        self._recipe, self._store = recipe, FeatureStore(load_image_model(recipe))
        self._digests: dict[str, str] = {}  # of each file

    def read(self, rows: Iterable[tuple[str, ...]], where: str = "", first: int = 1) -> ImagesOfRows:
        """Return the images of rows, given the files of each one's pictures.

        Raises:
            DataError: a picture can't be read; names its first row.
            LadderError: the image model makes other features than the recipe says.
        """
        files = list(rows)
        try:
            for file in dict.fromkeys(file for row in files for file in row):
                if file not in self._digests:
                    self._digests[file] = digest_of_file(file)
            pictures = {self._digests[file]: file for row in files for file in row}
            self._store.fill(pictures)
        except PictureError as error:
            number = next(number for number, row in enumerate(files, start=first) if error.file in row)
            raise DataError(f"{row_called(where, number)}: {error}") from error
        order = list(pictures)
        refuse_other_features(self._recipe, self._store[order[0]].shape)
        place = {digest: number for number, digest in enumerate(order)}
        return ImagesOfRows(self._store, order, [[place[self._digests[file]] for file in row] for row in files])
