"""Two servers behind nginx, by the configuration that is shipped: requests spread, and one server may go."""

from __future__ import annotations

import contextlib
import shutil
import socket
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest

from helpers.serving import made, measure, serving

__all__ = ["made"]
SHIPPED = Path(__file__).parents[1] / "deploy/nginx.conf"


@contextlib.contextmanager
def balanced(urls: list[str], folder: Path) -> Iterator[str]:
    """Run nginx by the shipped configuration, with other ports."""
    path = shutil.which("nginx", path="/usr/sbin:/usr/bin")
    assert path, "make debian installs nginx-light, behind which two servers are tried"
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    text = SHIPPED.read_text()
    for shipped, own in zip(("8001", "8002", "8000"), [*(url.rpartition(":")[2] for url in urls), str(port)], strict=True):
        assert text.count(f"127.0.0.1:{shipped}") == 1
        text = text.replace(f"127.0.0.1:{shipped}", f"127.0.0.1:{own}")
    (folder / "nginx.conf").write_text(text)
    process = subprocess.Popen([path, "-p", folder, "-c", folder / "nginx.conf", "-e", "stderr", "-g", f"daemon off; pid {folder}/pid;"])
    try:
        deadline = time.monotonic() + 30
        while True:
            assert time.monotonic() < deadline and process.poll() is None
            with contextlib.suppress(httpx.ConnectError):
                httpx.get(f"http://127.0.0.1:{port}/health")
                break
            time.sleep(0.1)
        yield f"http://127.0.0.1:{port}"
    finally:
        process.terminate()
        process.wait(30)


@pytest.mark.slow
def test_requests_spread_over_two_servers_and_one_may_go(made: Any, tmp_path: Path) -> None:
    with contextlib.ExitStack() as second, serving(made, tmp_path) as one:
        other = second.enter_context(serving(made, tmp_path))
        with balanced([one.url, other.url], tmp_path) as url:
            client = openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0)
            expected = one.expected("side1", "a bird", 6)

            def ask() -> str:
                return client.completions.create(model="side1", prompt="a bird", max_tokens=6, temperature=0).choices[0].text

            assert [ask() for _ in range(8)] == [expected] * 8
            assert measure(one.url, "lst_tokens_total") and measure(other.url, "lst_tokens_total")
            pieces = list(client.completions.create(model="side1", prompt="a bird", max_tokens=6, temperature=0, stream=True))
            assert "".join(piece.choices[0].text for piece in pieces) == expected and len(pieces) > 2
            second.close()
            assert [ask() for _ in range(8)] == [expected] * 8
