"""What hostile use and first contact met, done to two trees of this project side by side: what each of them answers.

    git worktree add --detach /tmp/old e38b8a0
    python benchmarks/faults.py /tmp/old .            [--only A4 B9]

A case (benchmarks/fault_cases.py) does what a user did, by the real commands, on small files and a copy of the embedded backbone, and says
what would be right. A tree's answer to it is "holds" or what was seen instead: a traceback, success without a word, a message that does
not say what is wrong, something left behind or destroyed, no end in its time. The last column names the test that keeps the case.
"""

from __future__ import annotations

import argparse
import html
import signal
import sys
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from fault_cases import CASES
from fault_place import Case, Place


def answer(case: Case, tree: Path, runs: Path) -> str:
    with tempfile.TemporaryDirectory(prefix="fault-", ignore_cleanup_errors=True) as folder:
        try:
            found = case.run(Place(tree, Path(folder), runs))
        except Exception as error:  # the case itself could not be done on this tree
            found = f"case failed: {type(error).__name__}: {error}"[:120]
    print(f"{tree} {case.id}: {found}", file=sys.stderr, flush=True)
    return found


def finished_runs(tree: Path, folder: Path) -> Path:
    """Train two runs that cases spoil copies of."""
    place = Place(tree, folder, folder)
    for name in ("base", "other"):
        place.recipe(name=name)
        done = place.train("seed=1" if name == "other" else "seed=0")
        assert done.status == 0, done.said[-2000:]
    return folder / "runs"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("trees", type=Path, nargs="+", help="checkouts of this project")
    parser.add_argument("--only", nargs="+", default=[], help="numbers of cases, or beginnings of them")
    parser.add_argument("--at-once", type=int, default=2, help="commands that run beside each other")
    options = parser.parse_args()
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background has it ignored, and what it starts too
    cases = [case for case in CASES if not options.only or case.id.startswith(tuple(options.only))]
    answers: list[Sequence[str]] = []
    with tempfile.TemporaryDirectory(prefix="faults-", ignore_cleanup_errors=True) as folder, ThreadPoolExecutor(options.at_once) as pool:
        for number, tree in enumerate(path.resolve() for path in options.trees):
            (Path(folder) / str(number)).mkdir()
            runs = finished_runs(tree, Path(folder) / str(number))
            answers.append(list(pool.map(lambda case, tree=tree, runs=runs: answer(case, tree, runs), cases)))
            print(f"{tree}: {answers[-1].count('holds')} of {len(cases)} hold", file=sys.stderr, flush=True)
    print("| case | what was done | " + " | ".join(str(tree) for tree in options.trees) + " | kept by |")
    print("| --- " * (3 + len(answers)) + "|")
    for number, case in enumerate(cases):
        what = html.escape(case.what, quote=False)
        print(f"| {case.id} | {what} | " + " | ".join(found[number] for found in answers) + f" | {case.test} |")


if __name__ == "__main__":
    main()
