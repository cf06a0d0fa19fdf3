"""A claim as the ranks of one run hold it together."""

from __future__ import annotations

from lst_scale.backbone.cache.claim import Claim
from lst_scale.system import distributed
from lst_scale.system.distributed import World


class WriteLock:
    """Whether a run writes down what it has run of the rows that it claimed: all its ranks do, or none. Unclaimed rows anybody writes."""

    def __init__(self) -> None:
        self._claim: Claim | None = None
        self._granted: bool | None = None  # to all ranks, once; None: a run of one process asks again and again

    def claim(self, claim: Claim, world: World) -> bool:
        """Claim what `claim` names, in place of anything before; return whether this run has it. All ranks must call it."""
        granted = distributed.on_main_rank(world, claim.take)
        self.release()
        self._claim, self._granted = claim, None if world.size == 1 else granted
        return granted

    def held(self) -> bool:
        """Return whether this rank may write now: a run of one process takes over when the one that wrote has ended."""
        if self._claim is None:
            return True
        return self._claim.take() if self._granted is None else self._granted

    @property
    def refused(self) -> str | None:
        """Why nothing can be written here; None when only another run's claim is in the way."""
        return None if self._claim is None else self._claim.refused

    def release(self) -> None:
        """Let others write; the end of the process does, too."""
        if self._claim is not None:
            self._claim.release()
