"""The tap cache's index with a million records: opening it, asking which rows are there, one look-up, the name of a claim.

    python benchmarks/tap_index.py --records 1000000 [--tree /tmp/old]

Payloads are one token of four numbers and never read here; what is timed is the index. Each number is of a process of its own, on a warm
page cache; memory is what the open cache adds to the process.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def made(folder: Path, count: int) -> None:
    """Write an index of random digests, and a file of payloads that has the right size and no contents."""
    import numpy as np

    record = np.dtype([("digest", np.uint8, 16), ("offset", "<u8"), ("tokens", "<u4"), ("checksum", "<u4")])
    records = np.zeros(count, record)
    records["digest"] = np.random.default_rng(0).integers(0, 256, (count, 16), np.uint8)
    records["offset"], records["tokens"] = np.arange(count) * 16, 1
    records.tofile(folder / "writer.index")
    with (folder / "writer.taps").open("wb") as file:
        file.truncate(count * 16)


def measure(root: Path, count: int) -> dict[str, float]:
    """Open the cache below `root` and look up every digest, and as many that are not there."""
    import numpy as np

    from lst_scale.backbone.cache.key import CacheKey
    from lst_scale.backbone.cache.store import TapCache

    key = CacheKey(fingerprint="f", precision="fp32", layers=(0,), decoder_final=False, d_model=4, dtype="fp32")
    if not (root / key.folder).exists():
        (root / key.folder).mkdir(parents=True)
        made(root / key.folder, count)
    before, start = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.perf_counter()
    cache = TapCache(root, key)
    opened, memory = time.perf_counter() - start, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    there = np.random.default_rng(0).integers(0, 256, (count, 16), np.uint8)
    other = np.random.default_rng(1).integers(0, 256, (count, 16), np.uint8)
    found = {"open_s": opened, "open_mb": memory / 1024}
    start = time.perf_counter()
    if hasattr(cache, "has_each"):
        assert cache.has_each(there).all() and not cache.has_each(other).any()
    else:
        assert all(row.tobytes() in cache for row in there) and not any(row.tobytes() in cache for row in other)
    found["ask_for_all_twice_s"] = time.perf_counter() - start
    start = time.perf_counter()
    some = there[:10_000]
    for row in some:
        assert row.tobytes() in cache
    found["one_look_up_us"] = (time.perf_counter() - start) / len(some) * 1e6
    return {name: round(value, 3) for name, value in found.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--records", type=int, default=1_000_000)
    parser.add_argument("--tree", type=Path, default=ROOT, help="a source tree of lst_scale")
    parser.add_argument("--one", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        print(json.dumps(measure(options.one, options.records)))
        return
    with tempfile.TemporaryDirectory() as folder:
        for _ in range(2):  # the first one writes the index
            command = [sys.executable, __file__, "--records", str(options.records), "--one", folder]
            done = subprocess.run(command, env=os.environ | {"PYTHONPATH": str(options.tree)}, capture_output=True, text=True, check=False)
            if done.returncode:
                raise SystemExit(done.stderr[-2000:])
        print(f"{options.records:,} records: {done.stdout.strip()}")


if __name__ == "__main__":
    main()
