"""`lst-scale chat`: what is told is what generation gives, and it ends as people end a talk."""

from __future__ import annotations

import json
import os
import pty
import select
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from helpers import programs, ranks
from helpers.llama_runs import checkpoint, tokenizer, trained, write
from helpers.paths import EMBEDDED
from helpers.recipes import recipe_writer
from lst_scale import LadderModel
from lst_scale.cli.main import app
from lst_scale.errors import ArgumentError, DataError
from lst_scale.inference.predict import predict_file
from lst_scale.serving.chat import Style, Talk, talking

__all__ = ["checkpoint", "tokenizer", "write"]

TEMPLATE = "{% for m in messages %}<s>{{ m.role }}: {{ m.content }}\n{% endfor %}<s>assistant:"


@pytest.fixture(scope="module")
def t5_run(tmp_path_factory: pytest.TempPathFactory, tiny_t5_dir: Path) -> Callable[[str], Path]:
    def run(method: str) -> Path:
        folder = tmp_path_factory.getbasetemp() / f"chat-{method}"
        if not folder.exists():
            folder.mkdir()
            changes = {} if method == "lst" else {"method": {"name": method}}
            trained(recipe_writer(folder, tiny_t5_dir)(method, task__source=["definition"], training__max_steps=4, **changes))
        return folder / "runs" / f"{method}-kind-seed0"

    return run


@pytest.fixture
def llama_run(write: Callable[..., Path], checkpoint: Callable[[str], Path], tmp_path: Path) -> tuple[Path, str]:
    """A run, and the change that gives its model a chat template."""
    run = trained(write("talk", training__max_steps=4))
    with_template = shutil.copytree(checkpoint("llama"), tmp_path / "with-template")
    (with_template / "chat_template.jinja").write_text(TEMPLATE)
    return run, f"backbone.checkpoint={with_template}"


def expected(run: Path, change: str, text: str, most: int) -> str:
    """Return what a ladder's own generation gives after a text."""
    from transformers import AutoTokenizer

    folder = change.partition("=")[2]
    own = AutoTokenizer.from_pretrained(folder)
    ladder = LadderModel.from_pretrained(run / "side_network", folder)
    ids = own(text, add_special_tokens=False, return_tensors="pt").input_ids
    new = ladder.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=most, do_sample=False)[0, ids.shape[1] :]
    return str(own.decode(new, skip_special_tokens=True))


@pytest.mark.slow
def test_a_conversation_goes_on_after_all_that_was_said(llama_run: tuple[Path, str]) -> None:
    run, change = llama_run
    pieces: list[str] = []
    with talking(run, [change], Style(max_tokens=9, system="Be short.", conversation=True)) as talk:
        assert talk.is_conversation
        first = talk.answer("a bird?", pieces.append)
        second = talk.answer("and a plant?", lambda piece: None)
        talk.forget()
        again = talk.answer("a bird?", lambda piece: None)
    said = "<s>system: Be short.\n<s>user: a bird?\n"
    assert first == again == "".join(pieces) == expected(run, change, f"{said}<s>assistant:", 9)
    said += f"<s>assistant: {first}\n<s>user: and a plant?\n"
    assert second == expected(run, change, f"{said}<s>assistant:", 9)
    assert len(pieces) > 1, "the answer came all at once"


@pytest.mark.slow
def test_the_oldest_turns_are_forgotten_where_a_conversation_is_too_long(llama_run: tuple[Path, str]) -> None:
    run, change = llama_run
    with talking(run, [change], Style(max_tokens=5, prompt_tokens=60, conversation=True)) as talk:
        for number in range(4):
            answer = talk.answer(f"{number} is it a kind of bird or of plant?", lambda piece: None)
        left = [turn["content"] for turn in talk._turns if turn["role"] == "user"]
        assert 0 < len(left) < 4 and left[-1].startswith("3 ")
        with pytest.raises(ArgumentError, match=r"tokens; 60 at most: write less, or --prompt-tokens"):
            talk.answer("bird " * 100, lambda piece: None)
    before = "".join(f"<s>{turn['role']}: {turn['content']}\n" for turn in talk._turns[:-1])
    assert answer == expected(run, change, f"{before}<s>assistant:", 5)


@pytest.mark.slow
@pytest.mark.parametrize("method", ["lst", "bitfit"])
def test_a_single_question_gets_the_answer_that_predict_gives(method: str, t5_run: Callable[[str], Path], tmp_path: Path) -> None:
    run = t5_run(method)
    definitions = [json.loads(line)["definition"] for line in (EMBEDDED / "wordnet/test.jsonl").read_text().splitlines()[:3]]
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(json.dumps({"definition": definition}) + "\n" for definition in definitions))
    predict_file([run], rows, tmp_path / "answers.jsonl", ["evaluation.max_new_tokens=7"])
    answers = [json.loads(line)["prediction"] for line in (tmp_path / "answers.jsonl").read_text().splitlines()]
    done = CliRunner().invoke(app, ["chat", str(run), "--max-tokens", "7"], input="\n".join(definitions) + "\n/exit\nnobody reads this")
    assert done.exit_code == 0 and done.stdout.splitlines() == [answer.strip() for answer in answers]
    with talking(run, [], Style(max_tokens=7)) as talk:
        assert not talk.is_conversation
        assert talk.answer(json.dumps({"definition": definitions[0]}), lambda piece: None).strip() == answers[0]
        with pytest.raises(DataError, match="definition"):
            talk.answer('{"eggs": "x"}', lambda piece: None)
        for line in ("[1, 2, 3]", "[]", "3"):  # a text like any other
            talk.answer(line, lambda piece: None)
        with pytest.raises(ArgumentError, match="--system begins a conversation"):
            Talk(talk._opened, Style(system="x"))
        with pytest.raises(ArgumentError, match="--conversation: the tokenizer of t5 has no chat template"):
            Talk(talk._opened, Style(conversation=True))


@pytest.mark.slow
def test_a_seed_draws_the_same_answer(t5_run: Callable[[str], Path]) -> None:
    found = set()
    for seed in (1, 1, 2, 3, 4):
        with talking(t5_run("lst"), [], Style(max_tokens=8, temperature=5.0, seed=seed)) as talk:
            found.add((seed, talk.answer("a bird", lambda piece: None)))
    assert len(found) == 4 and len({text for _, text in found}) > 1


@pytest.mark.parametrize(
    ("change", "message"),
    [("backbone.placement.name=zero3", "needs several processes, and a pipeline is one"), ("seed=3", "seed has no effect on predictions")],
)
@pytest.mark.slow
def test_what_can_not_be_talked_to_is_one_line(change: str, message: str, t5_run: Callable[[str], Path]) -> None:
    with pytest.raises(ArgumentError, match=message), talking(t5_run("lst"), [change], Style()):
        pass


class Terminal:
    """The command line at a terminal of its own."""

    def __init__(self, *arguments: str) -> None:
        self._end, other = pty.openpty()
        (self.rank,) = ranks.start(programs.at_terminal, [os.ttyname(other), *arguments])
        self.text, self._other = "", other

    def wait_for(self, text: str, seconds: float = ranks.PATIENCE) -> None:
        deadline = time.monotonic() + seconds
        while text not in self.text:
            assert time.monotonic() < deadline, self.text
            if not self._read():
                raise AssertionError(f"it ended: {self.text}")

    def write(self, text: str) -> None:
        self.text = ""
        os.write(self._end, text.encode())

    def status(self) -> int:
        """Return its exit status, once it has ended."""
        status = self.rank.wait()
        while self._read():
            pass
        return status

    def close(self) -> None:
        self.rank.kill()
        os.close(self._end)
        os.close(self._other)

    def _read(self) -> bool:
        """Take what is told within a moment; false: it was nothing, and nobody is there."""
        if not select.select([self._end], [], [], 0.2)[0]:
            return self.rank.poll() is None
        self.text += os.read(self._end, 4096).decode(errors="replace")
        return True


@pytest.fixture
def terminal(t5_run: Callable[[str], Path]) -> Iterator[Callable[..., Terminal]]:
    opened: list[Terminal] = []

    def begin(*options: str) -> Terminal:
        opened.append(Terminal("chat", str(t5_run("lst")), *options))
        opened[-1].wait_for("> ")
        return opened[-1]

    yield begin
    for one in opened:
        one.close()


@pytest.mark.slow
@pytest.mark.parametrize("leave", ["/exit\n", "\x04", "\x03"], ids=["exit", "ctrl-d", "ctrl-c"])
def test_a_talk_at_a_terminal_ends_cleanly(leave: str, terminal: Callable[..., Terminal]) -> None:
    talk = terminal("--max-tokens", "4")
    assert "each line is a question of its own; /exit, Ctrl-D or Ctrl-C ends it" in talk.text
    talk.write("a bird\n")
    talk.wait_for("\n> ")
    # A signal that comes after a prompt is shown and before anybody waits for a key is seen at the next one: a person would press again.
    time.sleep(0.5)
    talk.write(leave)
    assert talk.status() == 0 and "Traceback" not in talk.text and "rror" not in talk.text


@pytest.mark.slow
def test_ctrl_c_ends_a_talk_in_the_middle_of_an_answer(terminal: Callable[..., Terminal]) -> None:
    talk = terminal("--max-tokens", "100000", "--temperature", "50", "--seed", "1")
    talk.write("a bird\n")
    talk.wait_for("a bird\r\n")
    time.sleep(0.5)
    talk.write("\x03")
    assert talk.status() == 0 and "Traceback" not in talk.text
