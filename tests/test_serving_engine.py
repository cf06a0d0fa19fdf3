"""Rows of many side networks that join and leave one running batch: each gets what it would get alone."""

from __future__ import annotations

import math
import random
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import T5ForConditionalGeneration

from helpers.llama_runs import ENDS, make_tokenizer
from helpers.llamas import make_llama
from helpers.models import make_t5
from helpers.served import Asked, alone, engine_of, save_sides, scores_of
from lst_scale import LadderModel
from lst_scale.backbone import as_backbone
from lst_scale.data.tokenizer import load_tokenizer
from lst_scale.errors import ArgumentError, LadderError
from lst_scale.serving.engine import Engine
from lst_scale.serving.jobs import Ended, TooManyWait
from lst_scale.serving.rows import Rows
from lst_scale.serving.sampling import Chosen

LADDER = {"start_as_backbone": True, "merge_last": True}


@pytest.fixture(params=["t5", "llama", "gemma2", "mistral", "llama pointwise", "llama tail", "gemma2 tail"])
def served(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[Any, dict[str, Path], Any]:
    """A model, side networks beside it, and a tokenizer."""
    if request.param == "t5":
        folder = make_t5(tmp_path / "t5", num_layers=4, num_decoder_layers=4, dropout_rate=0.0)
        model = as_backbone(T5ForConditionalGeneration.from_pretrained(folder))
        return model, save_sides(model, tmp_path, 5), load_tokenizer(str(folder))
    tokenizer = make_tokenizer(**ENDS)
    model_type, _, design = request.param.partition(" ")
    model = as_backbone(make_llama(model_type, vocab_size=len(tokenizer), bos_token_id=0, eos_token_id=1, pad_token_id=None))
    added = {} if design == "tail" else LADDER
    return model, save_sides(model, tmp_path, 5, **added, design=design or "transformer"), tokenizer


def prompts_of(count: int, vocabulary: int) -> list[list[int]]:
    draw = random.Random(0)
    return [[draw.randrange(5, vocabulary) for _ in range(draw.randint(2, 14))] for _ in range(count)]


def test_rows_that_join_and_leave_at_any_token_get_what_they_would_alone(served: Any) -> None:
    model, sides, tokenizer = served
    engine, networks = engine_of(model, sides, tokenizer, most_rows=6)
    draw, asked = random.Random(1), []
    for prompt in prompts_of(24, min(model.spec.vocab_size, 300)):
        name = draw.choice(list(sides))
        asked.append((name, Asked(engine, networks.get(name), prompt, draw.randint(1, 12))))
        time.sleep(draw.choice([0, 0, 0.02]))
    found = [one.tokens() for _, one in asked]
    engine.stop()
    by_name = {name: alone(folder, model) for name, folder in sides.items()}
    for (name, one), tokens in zip(asked, found, strict=True):
        assert tokens == by_name[name](one.prompt, one.job.max_tokens)
    assert engine.counts.rows_in_rounds > engine.counts.rounds, "no two rows ever ran together"


def test_the_backbone_answers_too(served: Any) -> None:
    model, sides, tokenizer = served
    engine, networks = engine_of(model, sides, tokenizer)
    prompt = prompts_of(1, 300)[0]
    tokens = Asked(engine, networks.get("backbone"), prompt, 6).tokens()
    engine.stop()
    ids = torch.tensor([prompt])
    whole = model.give_model().generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=6, do_sample=False)[0].tolist()
    new = whole[len(prompt) :] if model.spec.one_stack else whole[1:]
    assert tokens == [token for token in new if token != model.spec.eos_token_id]


def test_labels_get_the_likelihoods_that_each_gives_alone_and_equal_prompts_run_once(served: Any) -> None:
    model, sides, tokenizer = served
    engine, networks = engine_of(model, sides, tokenizer)
    first, second = prompts_of(2, 300)
    targets = [[7, 8, 1], [9, 1], [10, 11, 12, 1]]
    asked = [(networks.get(name), prompt, targets) for name in sides for prompt in (first, second)]
    found = scores_of(engine, asked)
    assert engine.passes.prompts_run <= 2
    engine.stop()
    for (network, prompt, _), scores in zip(asked, found, strict=True):
        ladder = LadderModel.from_pretrained(sides[network.name], model)
        expected = [_likelihood(ladder, prompt, target) for target in targets]
        torch.testing.assert_close(torch.tensor(scores), torch.tensor(expected), rtol=1e-4, atol=1e-4)


def _likelihood(ladder: LadderModel, prompt: list[int], target: list[int]) -> float:
    ids = torch.tensor([prompt])
    with torch.no_grad():
        if ladder.spec.one_stack:
            logits = ladder(input_ids=torch.tensor([[*prompt, *target]])).logits[:, len(prompt) - 1 : -1]
        else:
            logits = ladder(input_ids=ids, attention_mask=torch.ones_like(ids), labels=torch.tensor([target])).logits
    return float(logits.log_softmax(-1)[0, torch.arange(len(target)), target].sum())


def test_a_row_whose_client_has_gone_leaves_and_others_go_on(served: Any) -> None:
    model, sides, tokenizer = served
    engine, networks = engine_of(model, sides, tokenizer)
    first, second = prompts_of(2, 300)
    left = Asked(engine, networks.get("side0"), first, 100_000)
    stays = Asked(engine, networks.get("side1"), second, 30)
    left.events.get(timeout=60)
    left.job.cancelled = True
    tokens, deadline = stays.tokens(), time.monotonic() + 30
    while engine.num_running:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    engine.stop()
    assert tokens == alone(sides["side1"], model)(second, 30)


def test_a_full_queue_refuses_and_a_stop_finishes_what_was_taken(served: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    model, sides, tokenizer = served
    engine, networks = engine_of(model, sides, tokenizer, most_rows=1, most_waiting=2)
    prompts, go_on, extend = prompts_of(4, 300), threading.Event(), engine.passes.extend

    def held_up(*arguments: Any) -> Any:
        assert go_on.wait(60)
        return extend(*arguments)

    monkeypatch.setattr(engine.passes, "extend", held_up)
    taken = [Asked(engine, networks.get("side0"), prompts[0], 25)]
    while engine.num_waiting or not engine.num_running:
        time.sleep(0.001)
    taken += [Asked(engine, networks.get("side0"), prompt, 5) for prompt in prompts[1:3]]
    with pytest.raises(TooManyWait):
        Asked(engine, networks.get("side0"), prompts[3], 5)
    go_on.set()
    engine.stop(60)
    expected = alone(sides["side0"], model)
    assert [one.tokens(1) for one in taken] == [expected(one.prompt, one.job.max_tokens) for one in taken]
    with pytest.raises(TooManyWait):
        Asked(engine, networks.get("side0"), prompts[3], 5)


def test_a_seed_draws_the_same_and_top_p_leaves_out_what_is_unlikely(served: Any) -> None:
    model, sides, tokenizer = served
    engine, networks = engine_of(model, sides, tokenizer)
    prompt = prompts_of(1, 300)[0]

    def drawn(**sampling: Any) -> list[int]:
        return Asked(engine, networks.get("side1"), prompt, 8, **sampling).tokens()

    assert drawn(temperature=1.0, seed=3) == drawn(temperature=1.0, seed=3)
    assert len({tuple(drawn(temperature=5.0, seed=seed)) for seed in range(8)}) > 1
    assert drawn(temperature=1.0, top_p=1e-9, seed=1) == drawn()
    engine.stop()


@pytest.mark.parametrize("served", ["t5", "llama"], indirect=True)
def test_a_tiny_temperature_takes_the_likeliest(served: Any) -> None:
    model, sides, tokenizer = served
    engine, networks = engine_of(model, sides, tokenizer)
    prompt = prompts_of(1, 300)[0]
    found = [Asked(engine, networks.get("side1"), prompt, 8, temperature=temperature).tokens() for temperature in (1e-40, 0.0)]
    engine.stop()
    assert found[0] == found[1]


@pytest.mark.parametrize("served", ["t5", "llama"], indirect=True)
def test_a_token_that_can_not_be_chosen_ends_its_row_alone(served: Any) -> None:
    model, sides, tokenizer = served
    engine, networks = engine_of(model, sides, tokenizer, most_rows=8)
    first, second = prompts_of(2, 300)
    stays = Asked(engine, networks.get("side0"), first, 30)
    fails = Asked(engine, networks.get("side0"), second, 30, temperature=math.nan)
    assert fails.events.get(timeout=60).reason == "error"
    tokens = stays.tokens()
    engine.stop()
    assert tokens == alone(sides["side0"], model)(first, 30)


def test_a_network_that_is_replaced_or_removed_finishes_its_rows_first(served: Any) -> None:
    model, sides, tokenizer = served
    engine, networks = engine_of(model, sides, tokenizer)
    prompt = prompts_of(1, 300)[0]
    before = Asked(engine, networks.get("side0"), prompt, 20)
    networks.add("side0", sides["side1"])
    after = Asked(engine, networks.get("side0"), prompt, 20)
    networks.remove("side0")
    found = before.tokens(), after.tokens()
    engine.stop()  # a model is used by one thread at a time
    assert found == (alone(sides["side0"], model)(prompt, 20), alone(sides["side1"], model)(prompt, 20))
    with pytest.raises(ArgumentError, match="there is no model 'side0'"):
        networks.get("side0")


def test_weights_that_were_not_asked_for_leave_at_a_limit_and_come_back(served: Any) -> None:
    model, sides, tokenizer = served
    engine, networks = engine_of(model, {}, tokenizer)
    networks._most_bytes = 1
    for name, folder in sides.items():
        networks.add(name, folder)
    assert len(networks.sides) == 1 and len(networks.names) == len(sides) + 1
    prompt = prompts_of(1, 300)[0]
    found = {name: Asked(engine, networks.get(name), prompt, 5).tokens() for name in sides}
    engine.stop()
    assert found == {name: alone(sides[name], model)(prompt, 5) for name in sides}


def test_a_pass_that_fails_ends_its_rows_and_the_next_ones_are_answered(served: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    model, sides, tokenizer = served
    engine, networks = engine_of(model, sides, tokenizer)
    prompt = prompts_of(1, 300)[0]

    def fail(*_: Any) -> None:
        raise RuntimeError("out of memory")

    with monkeypatch.context() as patched:
        patched.setattr(engine.passes, "extend", fail)
        asked = Asked(engine, networks.get("side0"), prompt, 5)
        events = [asked.events.get(timeout=60)]
        while not isinstance(events[-1], Ended):
            events.append(asked.events.get(timeout=60))
        assert events[-1].reason in ("error", "stop")
    tokens = Asked(engine, networks.get("side0"), prompt, 5).tokens()
    engine.stop()
    assert tokens == alone(sides["side0"], model)(prompt, 5)


@pytest.mark.parametrize("served", ["t5", "llama"], indirect=True)
def test_a_join_that_fails_leaves_those_that_run_as_they_were(served: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    model, sides, tokenizer = served
    engine, networks = engine_of(model, sides, tokenizer)
    first, second = prompts_of(2, 300)
    expected = Asked(engine, networks.get("side0"), first, 200, past_the_end=True).tokens()
    _without_memory_for_those_that_run(engine, monkeypatch)
    runs = Asked(engine, networks.get("side0"), first, 200, past_the_end=True)
    begun = [runs.events.get(timeout=60).token for _ in range(2)]  # the second comes once it has joined
    with monkeypatch.context() as patched:
        patched.setattr("lst_scale.serving.engine.joined", _out_of_memory)
        joins = [Asked(engine, networks.get(name), second, 5, past_the_end=True) for name in ("side0", "side1")]
        for one in joins:
            assert isinstance(one.events.get(timeout=60), Chosen) and one.events.get(timeout=60).reason == "error"
    assert [*begun, *runs.tokens()] == expected
    engine.stop()


@pytest.mark.parametrize("served", ["t5", "llama"], indirect=True)
def test_rows_that_can_not_be_copied_end_and_the_next_ones_are_answered(served: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    model, sides, tokenizer = served
    engine, networks = engine_of(model, sides, tokenizer)
    first, second = prompts_of(2, 300)
    stays, goes = (Asked(engine, networks.get(name), first, 100_000, past_the_end=True) for name in ("side0", "side1"))
    while engine.num_running < 2:
        time.sleep(0.001)
    wait = engine._wait

    def cancelled_between_rounds() -> bool:
        goes.job.cancelled = True
        return wait()

    with monkeypatch.context() as patched:
        _without_memory_for_those_that_run(engine, patched)
        patched.setattr(engine, "_wait", cancelled_between_rounds)
        while isinstance(event := stays.events.get(timeout=60), Chosen):
            pass
        assert event.reason == "error"
    tokens = Asked(engine, networks.get("side0"), second, 5).tokens()
    engine.stop()
    assert tokens == alone(sides["side0"], model)(second, 5)


def _out_of_memory(*_: Any) -> None:
    raise torch.OutOfMemoryError


def _without_memory_for_those_that_run(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let what is kept of running rows be too large to be copied."""
    of = Rows.of
    monkeypatch.setattr(Rows, "of", lambda rows, chosen: _out_of_memory() if rows is engine._held else of(rows, chosen))


@pytest.mark.parametrize("served", ["t5", "llama"], indirect=True)
def test_a_row_that_can_not_begin_ends_and_the_next_ones_are_answered(served: Any) -> None:
    model, sides, tokenizer = served
    engine, networks = engine_of(model, sides, tokenizer)
    prompt = prompts_of(1, 300)[0]
    assert Asked(engine, networks.get("side0"), prompt, 5, seed=1 << 64).events.get(timeout=10).reason == "error"
    tokens = Asked(engine, networks.get("side0"), prompt, 5).tokens()
    engine.stop()
    assert tokens == alone(sides["side0"], model)(prompt, 5)


def test_a_side_network_of_another_backbone_is_refused(tmp_path: Path) -> None:
    tokenizer = make_tokenizer(**ENDS)
    shape = {"vocab_size": len(tokenizer), "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": None}
    sides = save_sides(make_llama("qwen3", **shape), tmp_path, 1, **LADDER)
    engine, networks = engine_of(make_llama("llama", **shape), {}, tokenizer)
    with pytest.raises(LadderError, match="serve it beside its own"):
        networks.add("other", sides["side0"])
    engine.stop()
