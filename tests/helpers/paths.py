"""Where the tree is."""

from __future__ import annotations

from pathlib import Path

TESTS = Path(__file__).parent.parent
ROOT = TESTS.parent
EMBEDDED = ROOT / "lst_scale" / "embedded"
