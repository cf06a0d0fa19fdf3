"""A backbone divided over ranks answers as the whole one does, whoever joins and leaves."""

from __future__ import annotations

import signal
import threading
from pathlib import Path
from typing import Any

import httpx
import pytest

from helpers import programs, ranks
from helpers.launchers import free_port
from helpers.served import save_sides
from helpers.serving import Served, made, measure

__all__ = ["made"]
pytestmark = pytest.mark.slow


def command(made: Any, placement: str, port: int) -> list[str]:
    checkpoint, sides = made
    words = ["serve", "--backbone", str(checkpoint), "--precision", "fp32", "--placement", placement, "--port", str(port)]
    return [*words, *(word for name, folder in sides.items() for word in ("--side", f"{name}={folder}"))]


def answers(url: str) -> bool:
    try:
        return httpx.get(f"{url}/health").status_code == 200
    except httpx.ConnectError:
        return False


@pytest.mark.parametrize(
    ("placement", "design"), [("tensor_parallel", "transformer"), ("zero3", "transformer"), ("tensor_parallel", "tail")]
)
def test_two_ranks_answer_as_one(placement: str, design: str, made: Any, tmp_path: Path) -> None:
    port = free_port()
    if design == "tail":
        made = made[0], save_sides(str(made[0]), tmp_path, 3, design=design)
    served = Served(f"http://127.0.0.1:{port}", *made, tmp_path, [])
    started = ranks.start(programs.command, command(made, placement, port), processes=2)
    with ranks.ended(started):
        ranks.wait_for(lambda: answers(served.url), alive=started)
        client, found = served.client, {}

        def ask(name: str, text: str, most: int) -> None:
            answer = client.completions.create(model=name, prompt=text, max_tokens=most, temperature=0)
            found[name, text, most] = answer.choices[0].text

        asked = [(name, text, most) for name in served.sides for text, most in (("a bird", 3), ("a kind of bird", 12), ("a plant", 20))]
        threads = [threading.Thread(target=ask, args=each) for each in asked]
        for thread in threads:
            thread.start()
        with httpx.stream("POST", f"{served.url}/v1/completions", json={"model": "side0", "prompt": "a", "stream": True}) as answer:
            next(answer.iter_lines())  # and it leaves
        for thread in threads:
            thread.join()
        assert {each: served.expected(*each) for each in asked} == found
        body = {"models": list(served.sides), "input": "a text", "labels": ["person", "food", "plant"]}
        labelled = served.post("/v1/classify", body).json()["results"]
        assert sum(labelled[0]["rows"][0]["probabilities"].values()) == pytest.approx(1)
        assert measure(served.url, "lst_rows_running") == 0
        started[0].send_signal(signal.SIGTERM)
        assert ranks.finish(started).returncode == 0


def test_a_side_network_that_does_not_fit_ends_all_ranks(made: Any, tmp_path: Path) -> None:
    done = ranks.run(programs.command, *command(made, "zero3", free_port()), "--side", f"none={tmp_path}", processes=2)
    assert done.returncode == 1 and str(tmp_path) in done.stderr and "Traceback" not in done.stderr
