"""What a recipe says of images beside the texts. Imports no torch."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field, field_validator, model_validator

from lst_scale.recipe.decode import Section
from lst_scale.system.names import PathText

Channels = Annotated[int, Field(ge=1, le=65_536)]
Grid = Annotated[int, Field(ge=1, le=256)]
Pixels = Annotated[int, Field(ge=8, le=4096)]
OWN, FROM_TIMM, FROM_TRANSFORMERS = "efficientnet-lite0", "timm:", "transformers:"
STORED = "hdf5"  # features that an image model made elsewhere


class VisionRecipe(Section):
    """Images of `task.images`: a frozen image model makes features of them, once an image and machine. Of these come image tokens, which
    enter the side network alone; with a method that trains inside the backbone, the backbone."""

    # efficientnet-lite0, or timm:NAME, or transformers:NAME-OR-FOLDER of a vision tower; or hdf5, where rows name files of features and not
    # pictures: NAME.h5 with a data set NAME/features (positions, channels), as the release stores them
    image_model: PathText
    image_size: Pixels | None = None  # images are resized to a square of so many pixels a side; None: the image model's own
    feature_dim: Channels  # channels of the image model's features
    pooled_grid: Grid = 6  # their grid is max-pooled to this, so an image is pooled_grid^2 tokens
    # of methods that train inside the backbone, where the word table's last rows tell an image's tokens apart: it is lengthened to so many
    # rows for them (the release: 32200); None: it stays as it is
    vocab_size: Annotated[int, Field(ge=1, le=10**8)] | None = None

    @field_validator("image_model")
    @classmethod
    def _known(cls, name: str) -> str:
        for prefix in (FROM_TIMM, FROM_TRANSFORMERS):
            if name.startswith(prefix) and name != prefix:
                return name
        if name not in (OWN, STORED):
            known = f"{OWN}, {FROM_TIMM}resnet50.a1_in1k, {FROM_TRANSFORMERS}openai/clip-vit-base-patch32 or {STORED}"
            raise ValueError(f"{name!r} is not valid: write {known}")
        return name

    @model_validator(mode="after")
    def _size_of_pictures(self) -> VisionRecipe:
        if self.image_model == STORED and self.image_size is not None:
            raise ValueError("image_size has no effect on image_model hdf5, whose features are made: remove it")
        return self
