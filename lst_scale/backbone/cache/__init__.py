"""Taps remembered on disk."""
