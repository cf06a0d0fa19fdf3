"""Many side networks on one backbone, served: throughput, time to the first token, and what more side networks cost.

    OMP_NUM_THREADS=2 python benchmarks/serving.py tiny-t5
    OMP_NUM_THREADS=2 python benchmarks/serving.py data/smollm2-135m --requests 2
    python benchmarks/serving.py tiny-t5 --clients 8 --sides 4 --apart 2 --more 1 4      # a small machine

Side networks have random weights, far from their start, for what they answer does not matter to how long it takes. The server is a process
of its own, clients are coroutines of this one. Every answer is compared, token for token, with `generate` of its side network alone.

- together: 64 clients on 32 side networks; beside it one server process a side network (as many as --apart, with their share of the
  clients), and PEFT's LoRA with `adapter_names`, in batches of 64 without a server.
- more: the same load on 1, 8, 64 and 256 side networks, in turns.
- labels: one text by one classifier and by twenty.
- soak: 10,000 requests over ten minutes on 32 side networks, of which every tenth leaves in the middle; the server's memory on the way.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import os
import random
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import torch

from lst_scale import LadderConfig, LadderModel
from lst_scale.backbone import load_backbone
from lst_scale.backbone.taps import Backbone
from lst_scale.data.tokenizer import load_tokenizer
from lst_scale.system.assets import resolve

WORDS = [
    "a",
    "small",
    "bird",
    "that",
    "sings",
    "in",
    "trees",
    "person",
    "who",
    "makes",
    "bread",
    "from",
    "corn",
    "an",
    "act",
    "of",
    "going",
]
TOKENS = 16


@dataclass
class Load:
    """What came of a load: tokens a second, and seconds to the first token of each request."""

    tokens: int
    seconds: float
    first: list[float]
    answers: dict[tuple[str, str], str]

    @property
    def rate(self) -> float:
        return self.tokens / self.seconds


def make_sides(backbone: Backbone, folder: Path, count: int) -> list[str]:
    """Save side networks of one design, each with weights of its own."""
    one_stack = backbone.spec.one_stack
    depth = backbone.spec.depth
    layers = list(range(2, depth, 3)) if one_stack else list(range(depth))
    config = LadderConfig(reduction_factor=8 if one_stack else 4, side_layers=layers, start_as_backbone=one_stack, merge_last=one_stack)
    names = [f"side{number}" for number in range(count)]
    for number, name in enumerate(names):
        if (folder / name).exists():
            continue
        torch.manual_seed(number)
        ladder = LadderModel(backbone, config)
        with torch.no_grad():
            for parameter in ladder.side.parameters():
                parameter.add_(torch.randn_like(parameter) * 0.05)
        ladder.save_pretrained(folder / name)
    return names


@contextlib.contextmanager
def server(checkpoint: str, sides: dict[str, Path], threads: int = 2) -> Iterator[str]:
    """Run a server with these side networks and give its address."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with tempfile.TemporaryDirectory() as folder:
        for name, path in sides.items():
            (Path(folder) / name).symlink_to(path)
        command = [sys.executable, "-m", "lst_scale.cli", "serve", "--backbone", checkpoint, "--precision", "fp32", "--port", str(port)]
        environment = os.environ | {"OMP_NUM_THREADS": str(threads)}
        process = subprocess.Popen([*command, "--side-folder", folder], stderr=subprocess.DEVNULL, env=environment)
        try:
            url = f"http://127.0.0.1:{port}"
            while True:
                with contextlib.suppress(httpx.TransportError):
                    if httpx.get(f"{url}/health").status_code == 200:
                        break
                assert process.poll() is None, "the server has ended"
                time.sleep(0.2)
            yield url
        finally:
            process.terminate()
            process.wait()


def prompts(count: int) -> list[str]:
    draw = random.Random(0)
    return [" ".join(draw.choice(WORDS) for _ in range(draw.randint(10, 30))) for _ in range(count)]


async def load(targets: Sequence[tuple[str, str]], requests: int) -> Load:
    """Let each client, given its server and its model, ask one request after another."""
    first: list[float] = []
    answers: dict[tuple[str, str], str] = {}
    texts = prompts(len(targets) * requests)

    async def client(http: httpx.AsyncClient, number: int, url: str, model: str) -> int:
        tokens = 0
        for prompt in texts[number * requests : (number + 1) * requests]:
            body = {"model": model, "prompt": prompt, "max_tokens": TOKENS, "temperature": 0, "ignore_eos": True, "stream": True}
            began, told = time.perf_counter(), ""
            async with http.stream("POST", f"{url}/v1/completions", json=body) as answer:
                assert answer.status_code == 200, await answer.aread()
                seen = False
                async for line in answer.aiter_lines():
                    if line.startswith("data: {"):
                        if not seen:
                            first.append(time.perf_counter() - began)
                            seen = True
                        told += _text(line)
            answers[model, prompt] = told
            tokens += TOKENS
        return tokens

    limits = httpx.Limits(max_connections=None, max_keepalive_connections=len(targets))
    async with httpx.AsyncClient(timeout=600, limits=limits) as http:
        began = time.perf_counter()
        made = await asyncio.gather(*(client(http, number, url, model) for number, (url, model) in enumerate(targets)))
        return Load(tokens=sum(made), seconds=time.perf_counter() - began, first=first, answers=answers)


def _text(line: str) -> str:
    import json

    text: str = json.loads(line[6:])["choices"][0]["text"]
    return text


def check(backbone: Backbone, tokenizer: Any, folder: Path, answers: dict[tuple[str, str], str]) -> str:
    """Compare answers with `generate` of each side network alone."""
    equal = 0
    for (model, prompt), told in answers.items():
        ladder = LadderModel.from_pretrained(folder / model, backbone)
        ids = torch.tensor([tokenizer(prompt).input_ids])
        # Neither ends early, for neither may: the token that ends texts is one like any other here.
        found = ladder.generate(ids, torch.ones_like(ids), max_new_tokens=TOKENS, do_sample=False, eos_token_id=-1)[0].tolist()
        new = found[ids.shape[1] :] if backbone.spec.one_stack else found[1:]
        equal += tokenizer.decode(new, skip_special_tokens=True) == told
    return f"{equal} of {len(answers)} answers are those of generate alone, token for token"


def lora(checkpoint: str, count: int, requests: int, clients: int) -> float:
    """Return tokens a second of PEFT's LoRA on batches whose rows have adapters of their own."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(checkpoint, padding_side="left")
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    kind = AutoModelForSeq2SeqLM if "t5" in checkpoint else AutoModelForCausalLM
    targets = ["q", "v"] if "t5" in checkpoint else ["q_proj", "v_proj"]
    config = LoraConfig(r=8, target_modules=targets, init_lora_weights=False)
    model = get_peft_model(kind.from_pretrained(checkpoint, dtype=torch.float32), config, adapter_name="a0").eval()
    for number in range(1, count):
        model.add_adapter(f"a{number}", config)
    names = [f"a{number % count}" for number in range(clients)]
    began = time.perf_counter()
    texts = prompts(clients * requests)
    for first in range(0, len(texts), clients):
        batch = tokenizer(texts[first : first + clients], return_tensors="pt", padding=True)
        batch.pop("token_type_ids", None)
        with torch.no_grad():
            model.generate(**batch, adapter_names=names, max_new_tokens=TOKENS, min_new_tokens=TOKENS, do_sample=False)
    return clients * requests * TOKENS / (time.perf_counter() - began)


def together(checkpoint: str, backbone: Backbone, tokenizer: Any, folder: Path, options: argparse.Namespace) -> None:
    requests, apart, clients, sides = options.requests, options.apart, options.clients, options.sides
    names = make_sides(backbone, folder, sides)
    with server(checkpoint, {name: folder / name for name in names}) as url:
        asyncio.run(load([(url, names[0])], 1))  # the first pass of a process sets up much
        ours = asyncio.run(load([(url, names[number % sides]) for number in range(clients)], requests))
        few = asyncio.run(load([(url, names[number % apart]) for number in range(2 * apart)], requests))
    first = sorted(ours.first)
    print(f"{clients} clients on {sides} side networks: {ours.rate:.1f} tokens/s; "
          f"first token after {statistics.median(first):.2f} s (p50), {first[int(0.99 * (len(first) - 1))]:.2f} s (p99)")  # fmt: skip
    print(check(backbone, tokenizer, folder, ours.answers))
    with contextlib.ExitStack() as stack:
        urls = [stack.enter_context(server(checkpoint, {name: folder / name}, threads=1)) for name in names[:apart]]
        for number in range(apart):
            asyncio.run(load([(urls[number], names[number])], 1))
        each = asyncio.run(load([(urls[number % apart], names[number % apart]) for number in range(2 * apart)], requests))
    print(f"{2 * apart} clients on {apart} side networks: one server {few.rate:.1f} tokens/s, {apart} servers {each.rate:.1f}: "
          f"{few.rate / each.rate:.2f} times")  # fmt: skip
    rate = lora(resolve(checkpoint), sides, requests, clients)
    print(
        f"PEFT LoRA, {sides} adapters, adapter_names in batches of {clients}, no server: {rate:.1f} tokens/s: {ours.rate / rate:.2f} times"
    )


def more(checkpoint: str, backbone: Backbone, folder: Path, options: argparse.Namespace) -> None:
    clients, names = options.clients, make_sides(backbone, folder, max(options.more))
    rates: dict[int, list[float]] = {count: [] for count in options.more}
    with server(checkpoint, {name: folder / name for name in names}) as url:
        asyncio.run(load([(url, names[0])], 1))
        for _ in range(options.rounds):
            for count, found in rates.items():
                draw = random.Random(0)
                which = [names[draw.randrange(count)] if count > clients else names[number % count] for number in range(clients)]
                found.append(asyncio.run(load([(url, model) for model in which], options.requests)).rate)
    first = statistics.median(rates[options.more[0]])
    for count, found in rates.items():
        median = statistics.median(found)
        print(f"{clients} clients on {count} side networks: {median:.1f} tokens/s, {median / first:.2f} of {options.more[0]}'s")


def labels(checkpoint: str, backbone: Backbone, folder: Path) -> None:
    names, told = make_sides(backbone, folder, 20), ["person", "food", "plant", "act"]
    seconds: dict[int, list[float]] = {1: [], 20: []}
    with server(checkpoint, {name: folder / name for name in names}) as url:
        for number in range(12):
            for count, found in seconds.items():
                body = {"models": names[:count], "input": f"{prompts(1)[0]} {number} {count}", "labels": told}
                began = time.perf_counter()
                assert httpx.post(f"{url}/v1/classify", json=body, timeout=60).status_code == 200
                found.append(time.perf_counter() - began)
    one, twenty = (statistics.median(found[2:]) for found in seconds.values())
    print(f"one text, four labels: one classifier {one * 1e3:.0f} ms, twenty {twenty * 1e3:.0f} ms: {twenty / one:.2f} times")


def soak(checkpoint: str, backbone: Backbone, folder: Path, options: argparse.Namespace) -> None:
    count, seconds, names = options.count, options.seconds, make_sides(backbone, folder, options.sides)
    with server(checkpoint, {name: folder / name for name in names}) as url:
        asyncio.run(load([(url, name) for name in names], 1))
        found = asyncio.run(_requests(url, names, count, seconds))
    print(f"{count:,} requests in {seconds:.0f} s: statuses {found['statuses']}; {found['left']} clients left in the middle")
    print("server's resident memory at each tenth, MB: " + ", ".join(f"{size:.0f}" for size in found["memory"]))


async def _requests(url: str, names: Sequence[str], count: int, seconds: float) -> dict[str, Any]:
    """Send requests at an even pace, whatever becomes of those before."""
    draw, statuses, memory, left = random.Random(0), Counter[int](), [_memory_of(url)], 0
    texts = prompts(500)

    async def one(http: httpx.AsyncClient, number: int) -> None:
        nonlocal left
        body: dict[str, Any] = {"model": draw.choice(names), "prompt": draw.choice(texts), "max_tokens": 4, "temperature": 0}
        if number % 10 == 0:  # such a client leaves after the first line
            async with http.stream("POST", f"{url}/v1/completions", json=body | {"stream": True, "max_tokens": 200}) as answer:
                async for _ in answer.aiter_lines():
                    break
            left += 1
        elif number % 10 == 1:
            body = {"models": [draw.choice(names) for _ in range(3)], "input": draw.choice(texts), "labels": ["person", "food"]}
            statuses[(await http.post(f"{url}/v1/classify", json=body)).status_code] += 1
        else:
            statuses[(await http.post(f"{url}/v1/completions", json=body)).status_code] += 1

    async with httpx.AsyncClient(timeout=120, limits=httpx.Limits(max_connections=None)) as http:
        began, tasks = time.perf_counter(), []
        for number in range(count):
            await asyncio.sleep(max(0.0, began + number * seconds / count - time.perf_counter()))
            tasks.append(asyncio.create_task(one(http, number)))
            if (number + 1) % max(1, count // 10) == 0:
                memory.append(_memory_of(url))
        await asyncio.gather(*tasks)
    return {"statuses": dict(statuses), "memory": memory, "left": left}


def _memory_of(url: str) -> float:
    """Return the resident memory of who listens there, in MB."""
    port = url.rpartition(":")[2]
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            words = (folder / "cmdline").read_bytes().split(b"\0")
            if b"serve" in words and port.encode() in words:
                line = next(line for line in (folder / "status").read_text().splitlines() if line.startswith("VmRSS"))
                return int(line.split()[1]) / 1e3
    return 0.0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint")
    parser.add_argument("--requests", type=int, default=4, help="of each client")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--clients", type=int, default=64)
    parser.add_argument("--sides", type=int, default=32, help="side networks of together and soak")
    parser.add_argument("--more", nargs="+", type=int, default=[1, 8, 64, 256], help="numbers of side networks, compared with the first")
    parser.add_argument("--count", type=int, default=10_000, help="requests of the soak")
    parser.add_argument("--seconds", type=float, default=600, help="of the soak")
    parser.add_argument("--apart", type=int, default=8, help="server processes, one a side network")
    parser.add_argument("--parts", nargs="+", default=["together", "more", "labels"], choices=["together", "more", "labels", "soak"])
    options = parser.parse_args()
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "2")))
    checkpoint = "embedded:tiny-t5" if options.checkpoint == "tiny-t5" else options.checkpoint
    backbone = load_backbone(checkpoint, revision=None, precision="fp32")
    tokenizer = load_tokenizer(checkpoint)
    with tempfile.TemporaryDirectory() as made:
        folder = Path(made)
        if "together" in options.parts:
            together(checkpoint, backbone, tokenizer, folder, options)
        if "more" in options.parts:
            more(checkpoint, backbone, folder, options)
        if "labels" in options.parts:
            labels(checkpoint, backbone, folder)
        if "soak" in options.parts:
            soak(checkpoint, backbone, folder, options)


if __name__ == "__main__":
    main()
