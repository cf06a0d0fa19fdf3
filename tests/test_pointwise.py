"""The design whose positions know nothing of each other, beside decoder-only models: what it reads, trains, generates, keeps."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache

from helpers import llama_runs, programs, ranks
from helpers.llama_runs import METHOD, trained
from helpers.llamas import FAMILIES, make_llama
from helpers.runs import assert_same_weights, final_weights, result
from helpers.tiny import tiny_t5
from lst_scale import LadderConfig, LadderModel
from lst_scale.backbone import as_backbone
from lst_scale.backbone.families import family_of, numbers_of
from lst_scale.backbone.taps import StackTaps
from lst_scale.errors import LadderError, NotReady
from lst_scale.recipe.method import LstRecipe
from lst_scale.recipe.schema import load_recipe
from lst_scale.side.ensemble import LadderEnsemble
from lst_scale.training.preflight import check_before_start

tokenizer, checkpoint, write = llama_runs.tokenizer, llama_runs.checkpoint, llama_runs.write
CONFIG = {"design": "pointwise", "reduction_factor": 8, "side_layers": [1, 3], "start_as_backbone": True}
POINTWISE = {"method": METHOD | {"design": "pointwise"}}


@pytest.fixture(params=FAMILIES, scope="module")
def model(request: pytest.FixtureRequest) -> Any:
    return make_llama(request.param)


def ladder(model: Any, *, trained: bool = False, **changes: Any) -> LadderModel:
    made = LadderModel(model, LadderConfig(**(CONFIG | changes))).eval()
    if trained:
        torch.manual_seed(1)
        for parameter in made.parameters():
            parameter.data.add_(torch.randn_like(parameter) * 0.1)
    return made


def texts(rows: int = 2, length: int = 9) -> Tensor:
    return torch.randint(3, 97, (rows, length), generator=torch.Generator().manual_seed(0))


def test_first_predictions_are_the_model_s_own_bit_for_bit_and_a_step_moves_the_side_network_alone(model: Any) -> None:
    ids, made = texts(), ladder(model)
    with torch.no_grad():
        assert torch.equal(made(input_ids=ids).logits, model(ids).logits)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    optimizer, losses = torch.optim.AdamW(made.train().parameters(), lr=1e-2), []
    for _ in range(6):
        loss = made(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
        assert all(parameter.grad is not None for parameter in made.parameters())
        optimizer.zero_grad()
    assert losses[-1] < losses[0]
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize("options", [{"do_sample": False}, {"num_beams": 3}], ids=["greedy", "beams"])
def test_a_cache_changes_no_answer_and_holds_the_backbone_s_layers_alone(model: Any, options: dict[str, Any]) -> None:
    made, ids = ladder(model, trained=True), texts()
    cached = made.generate(ids, max_new_tokens=10, **options)
    assert cached.shape[1] > ids.shape[1] + 3 and made.side.num_cache_layers == 0
    assert torch.equal(made.generate(ids, max_new_tokens=10, use_cache=False, **options), cached)
    found = made(input_ids=ids, use_cache=True)
    assert isinstance(found.past_key_values, DynamicCache) and len(found.past_key_values.layers) == 4


def test_left_padding_changes_nothing(model: Any) -> None:
    ids, made = texts(), ladder(model, trained=True)
    padding = torch.zeros(2, 3, dtype=torch.long)
    padded, mask = torch.cat([padding, ids], 1), torch.cat([padding, torch.ones_like(ids)], 1)
    expected = made.generate(ids, max_new_tokens=8, do_sample=False)
    assert torch.equal(made.generate(padded, attention_mask=mask, max_new_tokens=8, do_sample=False)[:, 3:], expected)


def test_it_generates_after_a_context() -> None:
    model = make_llama("llama")
    before, ids = [5, 9, 11, 4], texts()
    after = LadderModel(as_backbone(model).after(before), ladder(model, trained=True).side)
    cached = after.generate(ids, max_new_tokens=8, do_sample=False)
    assert torch.equal(after.generate(ids, max_new_tokens=8, do_sample=False, use_cache=False), cached)
    whole = torch.cat([torch.tensor([before] * 2), ids], 1)
    in_text = ladder(model, trained=True).generate(whole, max_new_tokens=8, do_sample=False)
    assert torch.equal(in_text[:, len(before) :], cached)


def test_a_position_reads_its_own_taps_alone_and_nothing_of_the_source() -> None:
    made = ladder(make_llama("llama"), trained=True)
    ids, mask = texts(), torch.ones(2, 6, dtype=torch.long)
    assert not made.side.request.source
    read = made.read(ids[:, :6], mask)
    assert read.taps.hidden == () and read.taps.embedding.shape[1] == 0
    state = made.backbone.extend(ids[:, 6:], read, made.side.request)
    with torch.no_grad():
        whole = made.side.stack(state.taps)
        second = tuple(tensor[:, 1:2] for tensor in state.taps.tensors)
        one = made.side.stack(StackTaps(layers=(1, 3), embedding=state.taps.embedding[:, 1:2], hidden=second))
    torch.testing.assert_close(whole[:, 1:2], one)


def test_what_is_saved_reads_back_and_its_count_is_known(model: Any, tmp_path: Path) -> None:
    made, ids = ladder(model, trained=True), texts()
    made.save_pretrained(tmp_path / "side")
    with torch.no_grad():
        assert torch.equal(LadderModel.from_pretrained(tmp_path / "side", model)(input_ids=ids).logits, made(input_ids=ids).logits)
    spec = family_of(model.config.model_type, "it").spec(model.config)
    method = LstRecipe(name="lst", **(CONFIG | {"side_layers": (1, 3), "merge_last": True, "initialization": "random"}))
    count = numbers_of(model.config.model_type, "it").trainable_parameters(spec, False, method)
    assert count == sum(parameter.numel() for parameter in made.parameters())


def test_it_answers_together_with_a_ladder_along_the_source() -> None:
    model, ids = make_llama("llama"), texts()
    each = [ladder(model, trained=True).side, ladder(model, trained=True, design="transformer").side]
    for sides in (each, each[:1] * 2):
        together = LadderEnsemble(model, sides)
        cached = together.generate(ids, max_new_tokens=6, do_sample=False)
        assert torch.equal(together.generate(ids, max_new_tokens=6, do_sample=False, use_cache=False), cached)
    (logits,) = LadderEnsemble(model, each[:1] * 2).logits_for_targets(ids[:, :6], torch.ones(2, 6, dtype=torch.long), [ids[:, 6:]])
    (alone,) = ladder(model, trained=True).logits_for_targets(ids[:, :6], torch.ones(2, 6, dtype=torch.long), [ids[:, 6:]])
    torch.testing.assert_close(logits, alone.log_softmax(-1), rtol=1e-4, atol=1e-4)


def test_recomputed_blocks_and_packed_taps_leave_the_gradient_right() -> None:
    model, ids, found = make_llama("llama"), texts(), []
    for recompute in (False, True):
        made = ladder(model, trained=True, recompute=recompute, dropout=0.1, tap_storage="int8").train()
        torch.manual_seed(3)
        made(input_ids=ids, labels=ids).loss.backward()
        found.append({name: p.grad for name, p in made.named_parameters()})
    for name, gradient in found[0].items():
        torch.testing.assert_close(found[1][name], gradient, msg=name)


@pytest.mark.parametrize("answers", ["generation", "likelihood"])
def test_a_cache_of_answers_alone_trains_to_the_live_weights(answers: str, write: Callable[..., Path], tmp_path: Path) -> None:
    common = POINTWISE | {"data__shuffle_seed": 0, "training__epochs": 1, "evaluation__method": answers}
    live = trained(write("live", **common))
    cached: dict[str, Any] = {"cache": {"enabled": True, "dtype": "fp32", "folder": str(tmp_path / "taps")}}
    first, second = (trained(write(name, **common, **cached)) for name in ("first", "second"))
    for folder in (first, second):
        assert_same_weights(folder, final_weights(live))
        assert result(folder)["scores"] == result(live)["scores"]
    assert result(second)["cache"]["rows_run"] < result(first)["cache"]["rows_run"]
    (key,) = (tmp_path / "taps").glob("*/key.json")
    assert json.loads(key.read_text())["target_only"] is True
    tokens = sum(path.stat().st_size for path in key.parent.glob("*.taps")) / (4 * 64 * 3)  # two blocks and the final state
    assert tokens == int(tokens)
    if answers == "generation":
        assert tokens < 22 * 8, "labels and what begins them, no prompts"


@pytest.mark.parametrize(
    ("changes", "message"),
    [({"side_heads": 2}, "^side_heads has no effect on design pointwise"), ({"vision": {"feature_dim": 4}}, "reads no images")],
    ids=str,
)
def test_what_does_not_fit_is_one_line(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(LadderError, match=message):
        ladder(make_llama("llama"), **changes)


def test_beside_an_encoder_decoder_it_is_refused() -> None:
    with pytest.raises(LadderError, match=r"^design pointwise stands beside a decoder-only model: beside a t5 write design transformer"):
        LadderModel(tiny_t5(), LadderConfig(design="pointwise", reduction_factor=2, side_layers=(0, 2)))
    with pytest.raises(NotReady, match=r"beside a t5 write method\.design=transformer"):
        method = ["method.design=pointwise", "method.initialization=random"]
        check_before_start([load_recipe("quickstart", [*method, "output_dir=/tmp/nowhere"])], resume=False)


@pytest.mark.slow
def test_a_real_step_needs_what_was_planned(write: Callable[..., Path]) -> None:
    path = write("planned", **POINTWISE)
    for rows in ("2", "16"):
        done = ranks.run(programs.script, "benchmarks/planned.py", "--one", path, rows)
        assert done.returncode == 0, done.stderr[-2000:]
        found = json.loads(next(line for line in done.stdout.splitlines() if line.startswith("{")))
        assert found["planned"] == pytest.approx(found["measured"], rel=0.05), found
