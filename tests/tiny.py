"""Old place of `helpers.tiny`."""

from helpers.tiny import batch, tiny_ladder, tiny_t5

__all__ = ["batch", "tiny_ladder", "tiny_t5"]
