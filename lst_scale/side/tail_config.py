"""What trains in the design "tail"; imports no torch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from lst_scale.errors import LadderError


@dataclass(frozen=True, kw_only=True)
class TailConfig:
    """Low-rank updates of matrices of the backbone's last blocks: y = W x + alpha / rank * B A x (LoRA, Hu et al. 2022).

    Args:
        rank: of each update.
        alpha: updates weigh alpha / rank.
        targets: the matrices that have one, by the names of the backbone's family; q, k, v and o beside any.
    """

    rank: int = 8
    alpha: int = 16
    targets: Sequence[str] = ("q", "v")

    def __post_init__(self) -> None:
        for name in ("rank", "alpha"):
            value = getattr(self, name)
            if type(value) is not int or value < 1:
                raise LadderError(f"tail.{name} {value!r} must be a whole number of at least 1")
        if isinstance(self.targets, str) or not self.targets:
            raise LadderError(f"tail.targets {self.targets!r} must be a list of matrices, such as [q, v]")
        vars(self)["targets"] = tuple(self.targets)  # frozen from here on
