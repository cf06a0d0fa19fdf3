"""What a frozen image model made of the images of a batch. Shapes: B rows, I images a row, G positions an image, F channels."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from lst_scale.inputs.batch import moved


@dataclass(frozen=True, kw_only=True)
class Images:
    """Features of the images beside some texts; which text has which image was settled when the batch was put together."""

    features_BIGF: Tensor  # of a square grid, row by row
    boxes_BIG4: Tensor | None = None  # where a feature lies (x1, x2, y1, y2, from 0 to 1); None: all zeros, as for grids in the release

    def to(self, device: torch.device) -> Images:
        boxes_BIG4 = None if self.boxes_BIG4 is None else moved(self.boxes_BIG4, device)
        return Images(features_BIGF=moved(self.features_BIGF, device), boxes_BIG4=boxes_BIG4)
