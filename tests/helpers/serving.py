"""A server of three side networks beside a small Llama, in this process and over HTTP."""

from __future__ import annotations

import contextlib
import socket
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
import uvicorn
from transformers import AutoModelForCausalLM, AutoTokenizer

from helpers.llama_runs import ENDS, make_tokenizer
from helpers.llamas import make_llama
from helpers.served import alone, save_sides
from lst_scale.serving.start import Options, build

LADDER = {"start_as_backbone": True, "merge_last": True}
TEMPLATE = "{% for message in messages %}{{ message['role'] }}: {{ message['content'] }}\n{% endfor %}assistant:"


@dataclass
class Served:
    url: str
    checkpoint: Path
    sides: dict[str, Path]
    folder: Path
    said: list[str]

    @property
    def client(self) -> openai.OpenAI:
        return openai.OpenAI(base_url=f"{self.url}/v1", api_key="none", max_retries=0)

    def post(self, path: str, body: Any, **options: Any) -> httpx.Response:
        return httpx.post(f"{self.url}{path}", json=body, timeout=60, **options)

    def expected(self, name: str, text: str, most: int) -> str:
        tokenizer = AutoTokenizer.from_pretrained(self.checkpoint)
        model = AutoModelForCausalLM.from_pretrained(self.checkpoint)
        prompt = tokenizer(text).input_ids
        return str(tokenizer.decode(alone(self.sides[name], model)(prompt, most), skip_special_tokens=True))


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Path]]:
    folder, tokenizer = tmp_path_factory.mktemp("served"), make_tokenizer(**ENDS)
    tokenizer.chat_template = TEMPLATE
    checkpoint = folder / "checkpoint"
    make_llama("llama", vocab_size=len(tokenizer), bos_token_id=0, eos_token_id=1, pad_token_id=None).save_pretrained(checkpoint)
    tokenizer.save_pretrained(checkpoint)
    return checkpoint, save_sides(str(checkpoint), folder, 3, **LADDER)


@contextlib.contextmanager
def serving(made: tuple[Path, dict[str, Path]], folder: Path, **options: Any) -> Iterator[Served]:
    checkpoint, sides = made
    said: list[str] = []
    app, watcher = build(Options(checkpoint=str(checkpoint), sides=sides, folder=folder, precision="fp32", **options), said.append)
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        server = uvicorn.Server(uvicorn.Config(app, log_level="error", timeout_graceful_shutdown=5))  # type: ignore[arg-type]
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]})
        thread.start()
        try:
            while not server.started:
                time.sleep(0.01)
            yield Served(f"http://127.0.0.1:{listening.getsockname()[1]}", checkpoint, sides, folder, said)
        finally:
            server.should_exit = True
            thread.join(60)
            if watcher is not None:
                watcher.stop()


def measure(url: str, name: str) -> float:
    """Return a number of /metrics."""
    lines = httpx.get(f"{url}/metrics").text.splitlines()
    return float(next(line.split()[1] for line in lines if line.startswith(f"{name} ")))
