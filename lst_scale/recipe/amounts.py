"""How much a value of a recipe may be. Imports no torch."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

Share = Annotated[float, Field(ge=0, lt=1)]
Seed = Annotated[int, Field(ge=0, lt=2**32)]
# Counts beyond which nothing would end, or fit any memory.
Width = Annotated[int, Field(ge=1, le=65_536)]  # of a part of a network
Length = Annotated[int, Field(ge=1, le=1_000_000)]  # in tokens
Rows = Annotated[int, Field(ge=1, le=1_000_000)]  # at once
Epochs = Annotated[int, Field(ge=1, le=1_000_000)]
Beams = Annotated[int, Field(ge=1, le=256)]
NewTokens = Annotated[int, Field(ge=1, le=100_000)]
Decay = Annotated[float, Field(gt=0, le=1_000_000)]  # of weights
