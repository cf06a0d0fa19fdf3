"""Fetch, clean and split the text that the embedded T5 is pretrained on. All of it is free or may be redistributed.

nlp-corpus 4.4.0 (npm, MIT)                  100,000 sentences of many registers
wordnet-base (Debian; WordNet 3.0 licence)   glosses and examples, less the synsets of the labelled set (labelled.py)
anarchism (Debian, GPL-2)                    a long FAQ in plain argumentative English
r-cran-janeaustenr (Debian; public domain)   six novels

python pretraining/text.py --folder /tmp/pretraining
"""

from __future__ import annotations

import argparse
import html
import json
import random
import re
import struct
import subprocess
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

DEBIAN = ("wordnet-base", "anarchism", "r-cran-janeaustenr")
NPM = "nlp-corpus@4.4.0"
HELD_OUT_SHARE = 0.01


@dataclass(frozen=True, kw_only=True)
class Synset:
    """One WordNet synset: its words, its gloss without examples, its examples, its lexicographer file."""

    key: str  # part of speech and offset, "n00001740"
    words: tuple[str, ...]
    definition: str
    examples: tuple[str, ...]
    lexicographer_file: int


def fetch(folder: Path) -> None:
    """Download the four packages by name with npm and apt and unpack them under `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    subprocess.run(["apt-get", "download", *DEBIAN], cwd=folder, check=True)
    for name in DEBIAN:
        archive = next(folder.glob(f"{name}_*.deb"))
        subprocess.run(["dpkg-deb", "-x", str(archive), str(folder / name)], check=True)
    subprocess.run(["npm", "pack", "--silent", NPM], cwd=folder, check=True)
    subprocess.run(["tar", "xzf", str(next(folder.glob("nlp-corpus-*.tgz")))], cwd=folder, check=True)


def synsets(folder: Path) -> Iterator[Synset]:
    """Read WordNet's data files; the format is described in wndb(5WN)."""
    for part in ("noun", "verb", "adj", "adv"):
        for line in (folder / "wordnet-base/usr/share/wordnet" / f"data.{part}").read_text("latin-1").splitlines():
            if line.startswith("  "):
                continue  # the licence
            data, gloss = line.split(" | ", 1)
            fields = data.split()
            count = int(fields[3], 16)
            words = tuple(re.sub(r"\(.*\)", "", word).replace("_", " ") for word in fields[4 : 4 + 2 * count : 2])
            examples = tuple(re.findall(r'"([^"]+)"', gloss))
            definition = re.sub(r'[;:]?\s*"[^"]*".*', "", gloss).strip()
            yield Synset(
                key=fields[2] + fields[0],
                words=words,
                definition=definition,
                examples=examples,
                lexicographer_file=int(fields[1]),
            )


def documents(folder: Path, excluded_synsets: set[str]) -> Iterator[str]:
    """Yield documents of some hundred words, so that packing keeps neighbours together."""
    for path in sorted((folder / "package/builds").glob("doc-*.json")):
        yield from _join([_clean(sentence) for sentence in json.loads(path.read_text())], 8)
    lines = [_wordnet_line(synset) for synset in synsets(folder) if synset.key not in excluded_synsets and synset.definition]
    random.Random(0).shuffle(lines)
    yield from _join(lines, 8)
    for path in sorted((folder / "anarchism/usr/share/doc/anarchism/html").glob("*.html")):
        paragraphs = re.split(r"</?(?:p|h\d|li|blockquote)\b[^>]*>", path.read_text("utf-8", errors="replace"), flags=re.IGNORECASE)
        yield from _join([text for text in map(_clean, paragraphs) if len(text) > 40], 3)
    yield from _join(list(_novel_paragraphs(folder)), 4)


def split(folder: Path, excluded_synsets: set[str]) -> tuple[list[str], list[str]]:
    """Return (training, held-out) documents, split at random by document with a fixed seed."""
    texts = list(documents(folder, excluded_synsets))
    random.Random(0).shuffle(texts)
    held_out = max(1, int(len(texts) * HELD_OUT_SHARE))
    return texts[held_out:], texts[:held_out]


def _wordnet_line(synset: Synset) -> str:
    example = f' "{synset.examples[0]}"' if synset.examples else ""
    return f"{', '.join(synset.words[:3])}: {synset.definition}.{example}"


def _novel_paragraphs(folder: Path) -> Iterator[str]:
    """Read the strings out of R's lazy-load database: for each object its unpacked length in 4 bytes, then one zlib stream."""
    data = (folder / "r-cran-janeaustenr/usr/lib/R/site-library/janeaustenr/data/Rdata.rdb").read_bytes()
    paragraph: list[str] = []
    while data:
        stream = zlib.decompressobj()
        raw = stream.decompress(data[4:])
        data = stream.unused_data
        for text in _r_strings(raw):
            if text.strip():
                paragraph.append(text.strip())
            elif paragraph:
                yield _clean(" ".join(paragraph))
                paragraph = []


def _r_strings(raw: bytes) -> Iterator[str]:
    """Yield the elements of R character vectors: the flags 0x00040009, a length, the bytes."""
    for match in re.finditer(rb"\x00\x04\x00\x09(....)", raw, flags=re.DOTALL):
        (length,) = struct.unpack(">i", match.group(1))
        if 0 <= length < 2000:
            yield raw[match.end() : match.end() + length].decode("utf-8", errors="replace")


def _clean(text: str) -> str:
    text = html.unescape(re.sub(r"<[^>]+>", " ", text)).replace("\u2019", "'").replace("\u2018", "'")
    text = text.replace("\u201c", '"').replace("\u201d", '"').replace("\u2013", "-").replace("\u2014", "-")
    return re.sub(r"\s+", " ", text).strip()


def _join(lines: list[str], size: int) -> Iterator[str]:
    for start in range(0, len(lines), size):
        yield "\n".join(lines[start : start + size])


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, required=True, help="where the packages are downloaded and unpacked")
    fetch(parser.parse_args().folder)
