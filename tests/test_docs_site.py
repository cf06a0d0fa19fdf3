"""The documentation as a site: it builds without a warning, leads nowhere that is not there, and needs nothing from elsewhere."""

from __future__ import annotations

import functools
import html
import http.server
import importlib.util
import re
import subprocess
import sys
import threading
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path

import pytest
from playwright.sync_api import Browser

from helpers.browser import chromium, fits
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
    names = re.findall(r'<tr class="doc-section-item">\s*<td>(.*?)</td>', text, flags=re.DOTALL)
    assert len(names) > 50 and not [name for name in names if "," in name], "arguments that share a line lose their types and defaults"


@pytest.mark.slow
def test_no_list_breaks_off(site: Path) -> None:
    """A code block that is not indented by four ends one, and what follows becomes a paragraph with numbers in it."""
    broken = {path.name: re.findall(r"<p>\d+\. .{40}", path.read_text()) for path in site.rglob("*.html")}
    assert {name: found for name, found in broken.items() if found} == {}


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with chromium() as found:
        yield found


@pytest.fixture(scope="module")
def address(site: Path) -> Iterator[str]:
    handler = functools.partial(_Silent, directory=str(site))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


class _Silent(http.server.SimpleHTTPRequestHandler):
    def log_message(self, format: str, *args: object) -> None:
        pass


@pytest.mark.slow
@pytest.mark.parametrize("width", [400, 1280])
def test_every_page_fits_a_real_browser(site: Path, address: str, browser: Browser, width: int) -> None:
    wrong: list[str] = []
    page = browser.new_page(viewport={"width": width, "height": 900})
    page.on("pageerror", lambda error: wrong.append(f"{page.url}: {error}"))
    page.on("response", lambda response: wrong.append(f"{page.url}: {response.url}: {response.status}") if response.status >= 400 else None)
    for path in sorted(site.rglob("*.html")):
        page.goto(f"{address}/{path.relative_to(site)}")
        if not fits(page):
            wrong.append(f"{page.url}: something stands beyond the window's edge")
    page.close()
    assert wrong == []


@pytest.mark.slow
def test_the_search_finds_a_page(address: str, browser: Browser) -> None:
    page = browser.new_page(viewport={"width": 1280, "height": 900})
    page.goto(f"{address}/index.html")
    field = page.get_by_placeholder("Search")
    field.click()  # the index is fetched then; what is written before it is there may be lost
    ready = "() => !document.querySelector('.md-search-result__meta').textContent.includes('Initializing')"
    page.wait_for_function(ready, timeout=120_000)
    field.press_sequentially("preemption", delay=20)
    page.locator(".md-search-result__item").first.click()
    page.wait_for_url("**/slurm.html*")
    page.close()


def test_the_page_on_what_works_with_what_is_fresh() -> None:
    path = ROOT / "docs" / "make_support_md.py"
    spec = importlib.util.spec_from_file_location("make_support_md", path)
    assert spec is not None and spec.loader is not None
    maker = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(maker)
    assert (ROOT / "docs" / "support.md").read_text() == maker.page(), "python docs/make_support_md.py"
