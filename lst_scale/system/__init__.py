"""Processes, signals, disk, and the files that ship with the package."""
