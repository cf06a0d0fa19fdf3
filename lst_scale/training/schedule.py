"""The learning rate as a function of the step: nothing to save, nothing to restore."""

from __future__ import annotations

from lst_scale.recipe.schema import OptimizerRecipe


def warmup_steps(optimizer: OptimizerRecipe, total_steps: int) -> int:
    """Return the warm-up in steps: an int in the recipe is steps (the paper: 500), a fraction is a share of all steps."""
    if isinstance(optimizer.warmup, float):
        return round(optimizer.warmup * total_steps)
    return optimizer.warmup


def learning_rate(optimizer: OptimizerRecipe, step: int, total_steps: int) -> float:
    """Return the rate of the 0-based `step`: a linear rise over the warm-up, then linear decay to 0 or a constant.

    The first step of a warm-up of n has rate 1/n, not 0 as in transformers, where it is spent for nothing.
    """
    warmup = warmup_steps(optimizer, total_steps)
    if step < warmup:
        return optimizer.learning_rate * (step + 1) / warmup
    if optimizer.schedule == "constant":
        return optimizer.learning_rate
    return optimizer.learning_rate * (total_steps - step) / max(1, total_steps - warmup)
