"""Checkpoint files to tensors in place, in a precision."""
