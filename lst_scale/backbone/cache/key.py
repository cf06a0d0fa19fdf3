"""The mark of a tap cache: key.json says what its taps were computed from, and the folder's name is the digest of that.

Whoever lists, checks or removes caches asks `read_key` first: a folder whose mark does not fit its name is somebody else's.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from lst_scale.errors import BackboneError, fence

FORMAT = 1
KEY = "key.json"
OURS = ("*.taps", "*.index", "*.claim", f".{KEY}.*.partial", KEY)  # all that a cache's folder holds; the mark goes last
SINCE = {"context", "target_only"}  # what a mark says only where there is something to say
_BYTES = {"bf16": (2, 0), "fp32": (4, 0), "int8": (1, 4)}  # of a value, and of a token beside its values


@dataclass(frozen=True, kw_only=True)
class CacheKey:
    """All that a row's taps depend on, but for its token ids."""

    fingerprint: str
    precision: str  # of the backbone
    layers: tuple[int, ...]
    decoder_final: bool  # whether the target's final state is there too; the name in key.json
    d_model: int
    dtype: str  # of storage: bf16, fp32, or int8 with one scale a token
    context: str = ""  # a digest of what the backbone has read before every row
    target_only: bool = False  # nothing of sources is kept

    @property
    def folder(self) -> str:
        return hashlib.sha256(json.dumps(self.as_json(), sort_keys=True).encode()).hexdigest()[:20]

    def as_json(self) -> dict[str, Any]:
        known = asdict(self) | {"format": FORMAT}
        for name in SINCE:  # without them it is what it was before there were any
            if not known[name]:
                del known[name]
        return known

    def bytes_a_token(self) -> int:
        """Return what one state of one token takes on disk."""
        value, beside = _BYTES[self.dtype]
        return value * self.d_model + beside

    def bytes_of(self, source_tokens: int, target_tokens: int) -> int:
        """Return what rows with so many tokens take on disk."""
        target_states = len(self.layers) + self.decoder_final
        source_states = 0 if self.target_only else len(self.layers)
        return self.bytes_a_token() * (source_tokens * source_states + target_tokens * target_states)


def read_key(folder: Path) -> CacheKey:
    """Return what the taps in `folder` were computed from.

    Raises:
        BackboneError: it is no tap cache of this version, or its mark is damaged.
    """
    path = folder / KEY
    with fence(BackboneError, str(path)):
        tree = json.loads(path.read_text(encoding="utf-8"))
        names = {field.name for field in fields(CacheKey)} | {"format"}
        if not isinstance(tree, dict) or set(tree) | SINCE != names:
            raise ValueError("not the mark of a tap cache")
        if tree.pop("format") != FORMAT:
            raise ValueError("the mark of another version's tap cache")
        key = CacheKey(**tree | {"layers": tuple(tree["layers"])})
        if key.folder != folder.name or key.bytes_a_token() < 1:
            raise ValueError("the mark of another tap cache: a cache's folder is named by what its taps were computed from")
    return key


def files_of(folder: Path) -> Iterator[Path]:
    """Yield what belongs to the cache in `folder`: files by our names, no folders; the mark last."""
    for pattern in OURS:
        yield from (path for path in sorted(folder.glob(pattern)) if path.is_symlink() or not path.is_dir())
