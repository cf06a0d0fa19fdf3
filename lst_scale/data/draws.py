"""Answers drawn anew each epoch: of the rows that are answers to one question one is taken, in proportion to what each answer is worth.

rows      0    1    2 | 3 | 4    5          questions of 3, 1 and 2 answers
scores   .3   1.0  .3 | 1 | .6  .6
totals 0 .3   1.3 1.6 2.6  3.2 3.8          a point between a question's first and last total lies in the row that is drawn
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from lst_scale.data.columns import Numbers

APART = 500_000_003  # from the seeds that order rows


@dataclass(frozen=True, kw_only=True)
class Draws:
    """Which rows are answers to one question, and how often each is drawn."""

    starts: Numbers  # of each question's rows, and last the number of rows
    totals: NDArray[np.float64]  # of the scores before each row, and last of all

    @classmethod
    def of(cls, questions: Numbers, scores: NDArray[np.float64]) -> Draws:
        """Group rows whose questions, given by number, follow one another."""
        first = np.flatnonzero(np.diff(questions, prepend=questions[0] - 1))
        return cls(starts=np.append(first, len(questions)), totals=np.concatenate([[0.0], np.cumsum(scores)]))

    def __len__(self) -> int:
        return len(self.starts) - 1

    def of_epoch(self, epoch: int, seed: int) -> Numbers:
        """Return the row that is drawn for each question."""
        generator = torch.Generator().manual_seed(seed * 1_000_003 + epoch + APART)
        share = torch.rand(len(self), generator=generator, dtype=torch.float64).numpy()
        low, high = self.totals[self.starts[:-1]], self.totals[self.starts[1:]]
        rows = np.searchsorted(self.totals, low + share * (high - low), side="right") - 1
        return np.clip(rows, self.starts[:-1], self.starts[1:] - 1)
