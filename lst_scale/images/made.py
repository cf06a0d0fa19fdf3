"""What image models make: by what it is known, and whether it is what a recipe says."""

from __future__ import annotations

import hashlib

from torch import nn

from lst_scale.errors import LadderError
from lst_scale.recipe.vision import VisionRecipe


def digest_of_weights(model: nn.Module, *said: object) -> str:
    """Return what changes when a weight does, or what is said beside."""
    digest = hashlib.sha256(repr(said).encode())
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()


def refuse_no_grid(name: str, positions: int) -> None:
    """Raise LadderError unless an image model's positions make a square."""
    if round(positions**0.5) ** 2 != positions:
        raise LadderError(f"vision.image_model={name} makes {positions} features of an image, which is no square grid: choose another")


def refuse_other_features(recipe: VisionRecipe, shape: tuple[int, ...]) -> None:
    """Compare what an image model makes of an image (G, F) with what the recipe says.

    Raises:
        LadderError: names the key and the value to write.
    """
    positions, channels = shape
    if channels != recipe.feature_dim:
        raise LadderError(
            f"vision.feature_dim is {recipe.feature_dim}, but {recipe.image_model} makes {channels} channels: write {channels}"
        )
    grid = round(positions**0.5)
    if grid < recipe.pooled_grid:
        size = "" if recipe.image_size is None else ", or a larger vision.image_size"
        raise LadderError(
            f"vision.pooled_grid {recipe.pooled_grid} is finer than the {grid} x {grid} features of an image: write {grid} or less{size}"
        )
