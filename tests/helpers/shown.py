"""Commands that the README and the documentation show: in blocks of shell, in indented lines, and within the text."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import dropwhile, groupby
from pathlib import Path

from helpers.paths import ROOT

PAGES = [
    *(ROOT / name for name in ("README.md", "CONTRIBUTING.md", "examples/README.md")),
    *sorted((ROOT / "docs").rglob("*.md")),
    *sorted((ROOT / "lst_scale" / "embedded").rglob("*.md")),
]
PROGRAMS = "lst-scale|python|deepspeed|torchrun|make|bash|pip|jupyter|curl|git|cd|sbatch|OMP_NUM_THREADS=\\d"
SETTING = re.compile(r"[A-Z_]+=\S*")


@dataclass(frozen=True, kw_only=True)
class Shown:
    page: str
    line: str
    words: tuple[str, ...]

    @property
    def program(self) -> str:
        return self.words[0]


def commands() -> list[Shown]:
    """Return each command once, from the first page that shows it. Of `a && b` and `a | b` both; without settings of the environment."""
    found: dict[str, Shown] = {}
    for page in PAGES:
        for line in lines_of(page.read_text()):
            for words in parts_of(line):
                name = page.relative_to(ROOT).as_posix()
                found.setdefault(shlex.join(words), Shown(page=name, line=line, words=words))
    return list(found.values())


def parts_of(line: str) -> Iterator[tuple[str, ...]]:
    """Yield the words of each command in a line of shell."""
    for joined, group in groupby(shlex.split(line.strip(" ()"), comments=True), key=lambda word: word in ("&&", "|")):
        words = list(dropwhile(SETTING.fullmatch, group))
        if words and not joined:
            yield tuple(words)


def lines_of(text: str) -> Iterator[str]:
    """Yield lines of shell, those that a backslash continues as one."""
    text = re.sub(r"\\\n\s*", "", text)
    for block in re.findall(r"```(?:bash|sh|shell|console)\n(.*?)```", text, flags=re.DOTALL):
        yield from (line for line in block.splitlines() if line.strip() and not line.startswith("#"))
    fenced = re.sub(r"```.*?```", "", text, flags=re.DOTALL)
    yield from re.findall(rf"^    \(?((?:{PROGRAMS}) .*)$", fenced, flags=re.MULTILINE)
    yield from re.findall(rf"`((?:{PROGRAMS}) [^`\n]+)`", fenced)


def recipes() -> Iterator[tuple[str, str]]:
    """Yield the name and text of each whole recipe that a page shows."""
    for page in PAGES:
        for text in re.findall(r"```yaml\n(.*?)```", page.read_text(), flags=re.DOTALL):
            name = re.match(r"name: (\w+)\n", text)
            if name is not None:
                yield name[1], text


def folder_of_recipes(folder: Path) -> Path:
    """Write the recipes that pages show, as the commands beside them name them; the first of a name counts."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in reversed(list(recipes())):
        (folder / f"{name}.yaml").write_text(text)
    return folder
