"""The server by its own protocol: OpenAI's client, labels, what comes and goes while it answers, and everything that clients do wrong."""

from __future__ import annotations

import asyncio
import contextlib
import json
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from typer.testing import CliRunner

from helpers.llama_runs import ENDS, make_tokenizer
from helpers.llamas import make_llama
from helpers.serving import Served, made, measure, serving
from helpers.t5gemmas import make_t5gemma
from lst_scale.backbone import as_backbone
from lst_scale.cli.main import app
from lst_scale.data.prompts import PromptTokenizer
from lst_scale.errors import ArgumentError
from lst_scale.serving.networks import Networks
from lst_scale.serving.start import OPEN_TO_ALL, Options, build, serve

__all__ = ["made"]


@pytest.fixture(scope="module")
def served(made: tuple[Path, dict[str, Path]], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    with serving(made, tmp_path_factory.mktemp("more")) as found:
        yield found


def test_openai_s_client_lists_models_and_gets_what_generation_gives(served: Served) -> None:
    client = served.client
    assert [model.id for model in client.models.list()] == ["backbone", "side0", "side1", "side2"]
    for name in served.sides:
        answer = client.completions.create(model=name, prompt="a kind of bird", max_tokens=12, temperature=0)
        assert answer.choices[0].text == served.expected(name, "a kind of bird", 12)
        assert answer.usage is not None and answer.usage.completion_tokens <= 12
    several = client.completions.create(model="side1", prompt=["a bird", "a very small bird"], max_tokens=5, temperature=0)
    assert [choice.text for choice in several.choices] == [served.expected("side1", text, 5) for text in ("a bird", "a very small bird")]


def test_a_streamed_answer_is_the_whole_one_in_pieces(served: Served) -> None:
    asked: dict[str, Any] = {"model": "side1", "prompt": "a kind of bird", "max_tokens": 20, "temperature": 0}
    pieces = list(served.client.completions.create(**asked, stream=True))
    assert "".join(piece.choices[0].text for piece in pieces) == served.expected("side1", "a kind of bird", 20)
    assert len({piece.id for piece in pieces}) == 1
    assert len(pieces) > 2 and pieces[-1].choices[0].finish_reason in ("stop", "length")


def test_a_chat_goes_through_the_template(served: Served) -> None:
    asked: dict[str, Any] = {"model": "side2", "max_tokens": 8, "temperature": 0}
    answer = served.client.chat.completions.create(messages=[{"role": "user", "content": "a bird?"}], **asked)
    expected = served.expected("side2", "user: a bird?\nassistant:", 8)
    assert answer.choices[0].message.content == expected
    pieces = served.client.chat.completions.create(messages=[{"role": "user", "content": "a bird?"}], stream=True, **asked)
    assert "".join(piece.choices[0].delta.content or "" for piece in pieces) == expected


def test_a_chat_begins_once_and_one_that_the_template_refuses_is_told(tmp_path: Path) -> None:
    tokenizer = make_tokenizer(**ENDS)
    tokenizer.chat_template = (
        "{{ bos_token }}{% for message in messages %}{% if message['role'] == 'tool' %}{{ raise_exception('no tools here') }}{% endif %}"
        "{{ message['content'] }}{% endfor %}"
    )
    networks = Networks(as_backbone(make_llama("llama", vocab_size=len(tokenizer))), PromptTokenizer(tokenizer))
    asked = [{"role": "user", "content": "a bird"}]
    assert networks.bare.conversation(asked) == tuple(tokenizer.apply_chat_template(asked, add_generation_prompt=True, return_dict=False))
    with pytest.raises(ArgumentError, match=r"the chat template refuses this conversation: .*no tools here"):
        networks.bare.conversation([{"role": "tool", "content": "a bird"}])


def test_a_kind_of_backbone_that_is_not_served_is_told_before_it_is_loaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_t5gemma().save_pretrained(tmp_path)
    monkeypatch.setattr("lst_scale.serving.start.load_alone", _never)
    with pytest.raises(ArgumentError, match="a t5gemma2 is not served: use lst-scale predict"):
        serve(Options(checkpoint=str(tmp_path), sides={}), "127.0.0.1", 0, say=print)


def test_a_stop_text_ends_before_itself(served: Served) -> None:
    whole = served.expected("side0", "a plant", 20)
    stop = whole[6:8]
    answer = served.client.completions.create(model="side0", prompt="a plant", max_tokens=20, temperature=0, stop=[stop])
    assert answer.choices[0].text == whole[: whole.index(stop)] and answer.choices[0].finish_reason == "stop"


def test_log_probabilities_come_with_the_likeliest(served: Served) -> None:
    answer = served.client.completions.create(model="side0", prompt="a plant", max_tokens=4, temperature=0, logprobs=3)
    found = answer.choices[0].logprobs
    assert found is not None and found.token_logprobs and found.top_logprobs
    for chosen, best in zip(found.token_logprobs, found.top_logprobs, strict=True):
        assert chosen is not None and best is not None and chosen <= 0 and chosen == max(best.values())


def test_a_seed_gives_the_same_draw(served: Served) -> None:
    asked: dict[str, Any] = {"model": "side1", "prompt": "a plant", "max_tokens": 12, "temperature": 2.0}
    one, same = (served.client.completions.create(**asked, seed=5).choices[0].text for _ in range(2))
    others = {served.client.completions.create(**asked, seed=seed).choices[0].text for seed in range(6)}
    assert one == same and len(others) > 1


def test_several_models_label_one_text_on_one_pass(served: Served) -> None:
    before = measure(served.url, "lst_prompts_run_total")
    body = {"models": list(served.sides), "input": "a text that nobody else asks for", "labels": ["person", "food", "plant"]}
    results = served.post("/v1/classify", body).json()["results"]
    assert [each["model"] for each in results] == list(served.sides)
    for each in results:
        shares = each["rows"][0]["probabilities"]
        assert sum(shares.values()) == pytest.approx(1) and each["rows"][0]["label"] == max(shares, key=shares.__getitem__)
    assert measure(served.url, "lst_prompts_run_total") == before + 1


WRONG: dict[str, tuple[str, Any, int, str]] = {
    "unknown model": ("/v1/completions", {"model": "nobody", "prompt": "x"}, 404, "there is no model 'nobody'"),
    "no model": ("/v1/completions", {"prompt": "x"}, 400, "model: Field required"),
    "no prompt": ("/v1/completions", {"model": "side0", "prompt": []}, 400, "prompt"),
    "two answers": ("/v1/completions", {"model": "side0", "prompt": "x", "n": 2}, 400, "n must be 1"),
    "logprobs in a stream": ("/v1/completions", {"model": "side0", "prompt": "x", "stream": True, "logprobs": 1}, 400, "not streamed"),
    "too hot": ("/v1/completions", {"model": "side0", "prompt": "x", "temperature": 99}, 400, "temperature"),
    "a seed beyond 64 bits": ("/v1/completions", {"model": "side0", "prompt": "x", "seed": 1 << 64}, 400, "seed"),
    "too long": ("/v1/completions", {"model": "side0", "prompt": "word " * 5000}, 400, "the prompt has"),
    "a path as a name": ("/v1/side-networks", {"name": "../../etc"}, 400, "name"),
    "an unknown folder": ("/v1/side-networks", {"name": "nothing"}, 404, "there is no 'nothing'"),
    "no labels": ("/v1/classify", {"model": "side0", "input": "x"}, 400, "was not trained on labels"),
    "two ways to name models": ("/v1/classify", {"model": "side0", "models": ["side1"], "input": "x"}, 400, "write model, or models"),
    "too many answers": ("/v1/classify", {"models": ["side0"] * 200, "input": ["x", "y"], "labels": ["a", "b"]}, 400, "ask in parts"),
    "fields without a template": ("/v1/classify", {"model": "side0", "input": {"a": "b"}, "labels": ["a", "b"]}, 400, "give a text"),
    "a list as the body": ("/v1/completions", [1, 2], 400, "body"),
}


@pytest.mark.parametrize("wrong", WRONG)
def test_what_can_not_be_answered_is_one_line(wrong: str, served: Served) -> None:
    path, body, status, message = WRONG[wrong]
    answer = served.post(path, body)
    assert (answer.status_code, message in answer.json()["error"]["message"]) == (status, True), answer.text
    assert "Traceback" not in answer.text and str(served.folder) not in answer.text


def test_broken_json_and_a_body_that_is_too_large_are_refused(served: Served) -> None:
    url, kind = f"{served.url}/v1/completions", {"content-type": "application/json"}
    assert httpx.post(url, content=b'{"model": ', headers=kind).status_code == 400
    large = json.dumps({"model": "side0", "prompt": "x" * (9 << 20)}).encode()
    assert httpx.post(url, content=large, headers=kind).status_code == 413

    def pieces() -> Iterator[bytes]:
        yield from (large[first : first + 65536] for first in range(0, len(large), 65536))

    with contextlib.suppress(httpx.WriteError):  # it may be refused before all is sent
        assert httpx.post(url, content=pieces(), headers=kind).status_code == 413
    assert httpx.get(f"{served.url}/health").json() == {"status": "ok"}


def test_a_client_that_leaves_makes_room(served: Served) -> None:
    body = {"model": "side0", "prompt": "a bird", "max_tokens": 4000, "ignore_eos": True, "stream": True}
    with httpx.stream("POST", f"{served.url}/v1/completions", json=body) as answer:
        next(answer.iter_lines())
    with pytest.raises(httpx.TimeoutException):
        httpx.post(f"{served.url}/v1/completions", json=body | {"stream": False}, timeout=0.5)
    deadline = time.monotonic() + 30
    while measure(served.url, "lst_rows_running"):
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_a_client_that_sends_or_reads_too_slowly_holds_nobody_up(made: Any, tmp_path: Path) -> None:
    with serving(made, tmp_path, seconds=3, most_rows=2) as served:
        address = ("127.0.0.1", int(served.url.rpartition(":")[2]))
        body = json.dumps({"model": "side0", "prompt": "a bird", "max_tokens": 4000, "ignore_eos": True, "stream": True}).encode()
        head = f"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\ncontent-length: {len(body)}\r\n\r\n".encode()
        with socket.create_connection(address) as sender, socket.create_connection(address) as reader:
            sender.sendall(head + body[:10])  # and no more
            reader.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            reader.sendall(head + body)  # and reads nothing
            answer = served.client.completions.create(model="side1", prompt="a bird", max_tokens=6, temperature=0)
            assert answer.choices[0].text == served.expected("side1", "a bird", 6)
            sender.settimeout(30)
            assert sender.recv(4096).startswith(b"HTTP/1.1 408")
            deadline = time.monotonic() + 30
            while measure(served.url, "lst_rows_running"):
                assert time.monotonic() < deadline
                time.sleep(0.05)


def test_side_networks_come_and_go_in_the_folder_and_a_broken_one_disturbs_nobody(made: Any, tmp_path: Path) -> None:
    _, sides = made
    with serving((made[0], {"side0": sides["side0"]}), tmp_path) as served:
        shutil.copytree(sides["side1"], tmp_path / ".new")
        (tmp_path / ".new").rename(tmp_path / "new")
        broken = tmp_path / "broken"
        shutil.copytree(sides["side2"], broken)
        (broken / "side_network.safetensors").write_bytes(b"nothing")
        _until(served, lambda names: "new" in names and any("broken is not served" in line for line in served.said))
        answer = served.client.completions.create(model="new", prompt="a bird", max_tokens=6, temperature=0)
        served.sides = sides | {"new": sides["side1"]}
        assert answer.choices[0].text == served.expected("new", "a bird", 6)
        assert served.post("/v1/side-networks", {"name": "broken"}).status_code == 400
        shutil.rmtree(tmp_path / "new")
        _until(served, lambda names: "new" not in names)
        assert httpx.delete(f"{served.url}/v1/side-networks/side0").json()["deleted"]
        assert httpx.delete(f"{served.url}/v1/side-networks/side0").status_code == 404
        for name in ("first", "second"):  # one that a request removed before its folder went disturbs nobody either
            shutil.copytree(sides["side1"], tmp_path / f".{name}")
            (tmp_path / f".{name}").rename(tmp_path / name)
            _until(served, lambda names, name=name: name in names)
            if name == "first":
                assert httpx.delete(f"{served.url}/v1/side-networks/first").json()["deleted"]
                shutil.rmtree(tmp_path / "first")


def _until(served: Served, condition: Any) -> None:
    deadline = time.monotonic() + 30
    while not condition([model.id for model in served.client.models.list()]):
        assert time.monotonic() < deadline, served.said
        time.sleep(0.1)


def test_keys_are_asked_for_by_all_but_health_and_the_page(made: Any, tmp_path: Path) -> None:
    with serving(made, tmp_path, keys=["first", "second"]) as served:
        assert httpx.get(f"{served.url}/health").status_code == 200 and httpx.get(f"{served.url}/").status_code == 200
        for path in ("/v1/models", "/metrics"):
            assert httpx.get(f"{served.url}{path}").status_code == 401
            assert httpx.get(f"{served.url}{path}", headers={"authorization": "Bearer third"}).status_code == 401
            assert httpx.get(f"{served.url}{path}", headers={"authorization": "Bearer second"}).status_code == 200


def test_health_is_that_of_the_thread_that_answers(made: Any, tmp_path: Path) -> None:
    app, _ = build(Options(checkpoint=str(made[0]), sides={}, precision="fp32"), print)
    inner = app._app  # type: ignore[attr-defined]

    async def statuses() -> list[int]:
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app=inner), base_url="http://here") as client:
            async with inner.router.lifespan_context(inner):
                running = await client.get("/health")
            return [running.status_code, (await client.get("/health")).status_code]

    assert asyncio.run(statuses()) == [200, 503]


def test_a_full_queue_and_a_late_answer_are_told(made: Any, tmp_path: Path) -> None:
    with serving(made, tmp_path, most_rows=1, most_waiting=1, seconds=2) as served:
        body = {"model": "side0", "prompt": "a bird", "max_tokens": 4000, "ignore_eos": True}
        found: list[httpx.Response] = []
        threads = [threading.Thread(target=lambda: found.append(served.post("/v1/completions", body))) for _ in range(6)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        statuses = [answer.status_code for answer in found]
        assert 429 in statuses and 504 in statuses and not set(statuses) - {200, 429, 504}
        assert all("retry-after" in answer.headers for answer in found if answer.status_code == 429)


@pytest.mark.slow
def test_sigterm_answers_what_was_taken_and_takes_no_more(made: Any, tmp_path: Path) -> None:
    checkpoint, sides = made
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "lst_scale.cli", "serve", "--backbone", str(checkpoint), "--precision", "fp32", "--port", str(port)]
    command += ["--seconds", "600"]  # a busy machine needs minutes for the answers below
    command += [word for name, folder in sides.items() for word in ("--side", f"{name}={folder}")]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        try:
            url, deadline = f"http://127.0.0.1:{port}", time.monotonic() + 240
            while True:
                assert time.monotonic() < deadline
                assert process.poll() is None, process.stderr.read()  # type: ignore[union-attr]
                with contextlib.suppress(httpx.ConnectError):
                    if httpx.get(f"{url}/health").status_code == 200:
                        break
                time.sleep(0.2)
            found: list[httpx.Response] = []
            body = {"model": "side1", "prompt": "a bird", "max_tokens": 1500, "ignore_eos": True, "temperature": 0}
            threads = [
                threading.Thread(target=lambda: found.append(httpx.post(f"{url}/v1/completions", json=body, timeout=600))) for _ in range(8)
            ]
            for thread in threads:
                thread.start()
            while measure(url, "lst_rows_running") < 8:  # all have been taken
                assert time.monotonic() < deadline and not found, "one was answered before the last was taken: let them take longer"
                time.sleep(0.05)
            process.send_signal(signal.SIGTERM)
            for thread in threads:
                thread.join()
            assert len(found) == 8 and {answer.status_code for answer in found} == {200}
            assert len({answer.json()["choices"][0]["text"] for answer in found}) == 1
            assert process.wait(60) == 0
            assert "Traceback" not in process.stderr.read()  # type: ignore[union-attr]
        finally:
            process.kill()


def _never(*_: Any) -> None:
    raise AssertionError("the backbone was loaded")


MISTAKEN: dict[str, tuple[list[str], str]] = {
    "precision": (["--precision", "fp8"], "--precision 'fp8' is not one that serve has: write fp32, bf16, int8 or nf4"),
    "placement": (
        ["--placement", "cloud"],
        "write replicated, streamed, tensor_parallel or zero3",
    ),
    "alone": (["--placement", "zero3"], "start them by torchrun"),
    "side": (["--side", "runs/reviews"], "--side 'runs/reviews' must be a name and a folder"),
    "twice": (["--side", "a=b", "--side", "a=c"], "--side names a twice"),
    "folder": (["--side-folder", "/nowhere"], "--side-folder /nowhere is no folder"),
    "keys": (["--api-key-file", "/nowhere"], "--api-key-file /nowhere can't be read"),
    "host": (["--host", "192.0.2.1"], "192.0.2.1 port 8000 can't be listened on"),
}


@pytest.mark.parametrize("mistake", MISTAKEN)
def test_a_mistaken_option_is_one_line_before_anything_is_loaded(mistake: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lst_scale.serving.start.build", _never)
    options, message = MISTAKEN[mistake]
    found = CliRunner().invoke(app, ["serve", "--backbone", "anything", *options])
    assert isinstance(found.exception, ArgumentError)
    assert message in str(found.exception) and "\n" not in str(found.exception)


def test_a_port_that_is_taken_is_told_before_anything_is_loaded() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(ArgumentError, match=f"127.0.0.1 port {port} can't be listened on"):
            serve(Options(checkpoint="nothing", sides={}), "127.0.0.1", port, say=print)


@pytest.mark.parametrize(("host", "keys", "warned"), [("0.0.0.0", [], True), ("0.0.0.0", ["key"], False), ("127.0.0.1", [], False)])
def test_an_address_that_others_reach_without_a_key_is_told(
    host: str, keys: list[str], warned: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    said: list[str] = []
    monkeypatch.setattr("lst_scale.serving.start.build", lambda *_: (None, None))
    monkeypatch.setattr("uvicorn.Server.run", lambda *_, **__: None)
    serve(Options(checkpoint="nothing", sides={}, keys=keys), host, 0, say=said.append)
    assert (OPEN_TO_ALL in said) == warned
