"""How a side network reads images; imports no torch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from lst_scale.errors import LadderError, did_you_mean

OBJECT_ORDERS = ("backbone", "random")


@dataclass(frozen=True, kw_only=True)
class VisionConfig:
    """Image tokens for the side network alone, as CLIP-T5 makes them (Sung et al. 2022, section 4; VL-T5, Cho et al. 2021).

    Args:
        feature_dim: channels of the frozen image encoder's features.
        pooled_grid: a square grid of features is max-pooled to this many rows and columns, so an image is pooled_grid^2 tokens.
        num_images: how many images come with each text: a number, or several of them where batches differ, such as (1, 2).
        object_order: what tells the tokens of an image apart. "backbone": the last rows of its word table, counted from the end, as the
            release does on a table that it made longer. "random": N(0, 1), which is what those rows of the release are on a T5 whose
            vocabulary ends before them. Frozen in both, and stored with the side network.
        scale_image_rows: multiply the image rows by the gate's mu like the text rows, though no tap is mixed into them: at mu = 1/2 an
            image is halved before every block. So in the release; without it easy-VQA gained 10 points (one seed, validation pictures).
    """

    feature_dim: int
    pooled_grid: int = 6
    num_images: int | Sequence[int] = 1
    object_order: str = "backbone"
    scale_image_rows: bool = True

    def __post_init__(self) -> None:
        for name in ("feature_dim", "pooled_grid"):
            _refuse_no_count(name, getattr(self, name))
        if isinstance(self.num_images, Sequence) and not isinstance(self.num_images, str):
            vars(self)["num_images"] = tuple(self.num_images)  # frozen from here on
        if not self.image_counts:
            raise LadderError("vision.num_images [] must name at least one number of images, such as 1")
        for count in self.image_counts:
            _refuse_no_count("num_images", count)
        if self.object_order not in OBJECT_ORDERS:
            raise LadderError(f"vision.object_order {self.object_order!r} is unknown.{did_you_mean(self.object_order, OBJECT_ORDERS)}")

    @property
    def image_counts(self) -> tuple[int, ...]:
        """All numbers of images that a text may come with."""
        return self.num_images if isinstance(self.num_images, tuple) else (self.num_images,)  # type: ignore[return-value]

    @property
    def tokens_per_image(self) -> int:
        return self.pooled_grid**2


def _refuse_no_count(name: str, value: Any) -> None:
    if type(value) is not int or value < 1:
        raise LadderError(f"vision.{name} {value!r} must be a whole number of at least 1")
