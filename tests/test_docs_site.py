"""The documentation as a site: it builds without a warning, leads nowhere that is not there, and needs nothing from elsewhere."""

from __future__ import annotations

import html
import importlib.util
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest

from helpers.paths import ROOT


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("site")
    build = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(folder)]
    done = subprocess.run(build, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return folder


class _Page(HTMLParser):
    def __init__(self, path: Path) -> None:
        super().__init__()
        self.names: set[str] = set()
        self.leads_to: list[str] = []
        self.feed(path.read_text())

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        for name, value in attrs:
            if name in ("id", "name") and value:
                self.names.add(value)
            elif name in ("href", "src") and value:
                self.leads_to.append(value)


@pytest.mark.slow
def test_every_link_leads_to_a_page_and_a_place_on_it(site: Path) -> None:
    pages = {path: _Page(path) for path in site.rglob("*.html") if path.name != "404.html"}
    broken = []
    for path, page in pages.items():
        for link in page.leads_to:
            if re.match(r"[a-z]+:", link):
                continue
            file, _, place = link.partition("#")
            target = (path.parent / file).resolve() if file else path
            if not target.exists() or (place and target in pages and place not in pages[target].names):
                broken.append(f"{path.relative_to(site)} -> {link}")
    assert len(pages) >= 25 and not broken


@pytest.mark.slow
def test_the_page_of_examples_shows_their_files(site: Path) -> None:
    text = html.unescape(re.sub(r"<[^>]*>", "", (site / "examples.html").read_text()))
    for name in ("with_trainer.py", "with_peft.py", "with_trl.py", "plain_pytorch.py", "own_csv/kinds.yaml"):
        lines = (ROOT / "examples" / name).read_text().strip().splitlines()
        assert "\n".join(lines[-12:]) in text, name


@pytest.mark.slow
def test_nothing_is_loaded_from_elsewhere(site: Path) -> None:
    loads = re.compile(r"""<(?:script|img|link rel="(?:stylesheet|icon|preload)")[^>]*(?:src|href)="(https?:[^"]*)""")
    assert [found for path in site.rglob("*.html") for found in loads.findall(path.read_text())] == []


@pytest.mark.slow
def test_the_reference_shows_arguments_shapes_and_errors(site: Path) -> None:
    text = (site / "api.html").read_text()
    for part in ("LadderModel", "LadderConfig", "reduction_factor", "Raises", "LadderError"):
        assert part in text


def test_the_page_on_what_works_with_what_is_fresh() -> None:
    path = ROOT / "docs" / "make_support_md.py"
    spec = importlib.util.spec_from_file_location("make_support_md", path)
    assert spec is not None and spec.loader is not None
    maker = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(maker)
    assert (ROOT / "docs" / "support.md").read_text() == maker.page(), "python docs/make_support_md.py"
