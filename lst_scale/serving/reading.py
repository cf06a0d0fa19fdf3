"""Prompts as the backbone reads them: equal ones once, those that were read lately not again, and what stands before many of them once."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence

from lst_scale.backbone.taps import TapRequest
from lst_scale.serving.jobs import Generation, PromptKey, Scoring, key_of
from lst_scale.serving.networks import Networks
from lst_scale.serving.passes import Passes, Prompt
from lst_scale.serving.rows import Rows
from lst_scale.side.network import SideNetwork


class Reader:
    """Reads prompts.

    Args:
        prompt_bytes: of prompts that are kept for others that are equal.
    """

    def __init__(self, passes: Passes, networks: Networks, prompt_bytes: int) -> None:
        self._passes, self._networks = passes, networks
        self._prompts = _Kept(prompt_bytes)
        self._contexts: dict[tuple[int, ...], Rows] = {}
        self.reused = 0

    def request(self, jobs: Sequence[Generation | Scoring]) -> TapRequest:
        """Return the states that the side networks of these jobs read, and all others that may be asked next."""
        asked: list[SideNetwork] = [job.network.side for job in jobs if job.network.side is not None]
        return self._passes.request([*self._networks.sides, *asked])

    def read(self, jobs: Sequence[Generation | Scoring]) -> dict[PromptKey, Prompt]:
        """Return what the backbone makes of prompts: those that are kept, and the others in one pass a context."""
        request = self.request(jobs)
        wanted = dict.fromkeys(map(key_of, jobs))
        found = {key: kept for key in wanted if (kept := self._prompts.get((key, request.layers))) is not None}
        self.reused += len(jobs) - (len(wanted) - len(found))
        for context in dict.fromkeys(context for context, _ in wanted):
            missing = [prompt for at, prompt in wanted if at == context and (at, prompt) not in found]
            if missing:
                for prompt, read in zip(missing, self._passes.read(missing, self._context(context), request), strict=True):
                    found[context, prompt] = read
                    self._prompts.put(((context, prompt), request.layers), read)
        return found

    def _context(self, ids: tuple[int, ...]) -> Rows | None:
        if not ids:
            return None
        if ids not in self._contexts:
            self._contexts[ids] = self._passes.read_context(ids)
        return self._contexts[ids]


class _Kept:
    """What the backbone made of prompts lately, up to a number of bytes."""

    def __init__(self, most_bytes: int) -> None:
        self._most, self._bytes = most_bytes, 0
        self._there: OrderedDict[object, Prompt] = OrderedDict()

    def get(self, key: object) -> Prompt | None:
        if key in self._there:
            self._there.move_to_end(key)
        return self._there.get(key)

    def put(self, key: object, prompt: Prompt) -> None:
        self._there[key] = prompt
        self._bytes += prompt.nbytes
        while self._bytes > self._most and self._there:
            _, gone = self._there.popitem(last=False)
            self._bytes -= gone.nbytes
