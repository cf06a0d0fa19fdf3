"""Finished side networks to answers."""
