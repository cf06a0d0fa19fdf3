"""Make the embedded labelled set: what kind of thing does a WordNet noun name?

One row a synset: a word, its definition, and the synset's lexicographer file as label. Eight kinds, equally many rows of each, so
the majority class scores 12.5 %. No synset is in two splits, and none is in the pretraining text.

    python pretraining/labelled.py --folder /tmp/pretraining --output lst_scale/embedded/wordnet
"""

from __future__ import annotations

import argparse
import json
import random
from pathlib import Path

from text import Synset, synsets

KINDS = {4: "act", 6: "artifact", 7: "attribute", 9: "cognition", 10: "communication", 13: "food", 18: "person", 26: "state"}
ROWS_A_KIND = {"train": 600, "validation": 60, "test": 125}


def choose(folder: Path) -> dict[str, list[Synset]]:
    """Return the synsets of each split: a seeded draw, balanced over the kinds."""
    pools: dict[str, list[Synset]] = {kind: [] for kind in KINDS.values()}
    for synset in synsets(folder):
        kind = KINDS.get(synset.lexicographer_file)
        if kind is not None and synset.key[0] == "n" and 3 <= len(synset.definition.split()) <= 40:
            pools[kind].append(synset)
    splits: dict[str, list[Synset]] = {name: [] for name in ROWS_A_KIND}
    draw = random.Random(42)
    for pool in pools.values():
        draw.shuffle(pool)
        start = 0
        for name, count in ROWS_A_KIND.items():
            splits[name] += pool[start : start + count]
            start += count
    for chosen in splits.values():
        draw.shuffle(chosen)
    return splits


def write(splits: dict[str, list[Synset]], output: Path) -> None:
    """Write train.jsonl, validation.jsonl and test.jsonl with the fields word, definition, kind."""
    output.mkdir(parents=True, exist_ok=True)
    for name, chosen in splits.items():
        rows = [{"word": s.words[0], "definition": s.definition, "kind": KINDS[s.lexicographer_file]} for s in chosen]
        (output / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, required=True, help="where text.py unpacked WordNet")
    parser.add_argument("--output", type=Path, required=True)
    options = parser.parse_args()
    write(choose(options.folder), options.output)
