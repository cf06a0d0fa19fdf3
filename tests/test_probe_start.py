"""A side network that starts as a linear map of the backbone's states: that it is one, that ranks and members agree, what is refused."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from helpers import llama_runs
from helpers.llama_runs import METHOD, trained
from helpers.llamas import make_llama
from helpers.models import make_t5
from helpers.recipes import recipe_writer
from helpers.runs import assert_same_weights, final_weights, losses, result
from helpers.training import train
from lst_scale import LadderConfig, LadderModel
from lst_scale.backbone.taps import StackTaps, Taps
from lst_scale.errors import BackboneError, DataError, NotReady, RecipeError
from lst_scale.methods.linear import cross_validated, fits
from lst_scale.methods.lst import SharedPasses
from lst_scale.recipe.schema import load_recipe
from lst_scale.side.initialize import initialize_random
from lst_scale.side.probe_start import Reading, rows_of_head, start_as
from lst_scale.training import probe_start
from lst_scale.training.preflight import check_before_start
from lst_scale.training.run import run, run_together

tokenizer, checkpoint, write = llama_runs.tokenizer, llama_runs.checkpoint, llama_runs.write
PROBE = METHOD | {"initialization": "probe", "reduction_factor": 4}
SCORED = {"evaluation": {"method": "likelihood", "score_start": True}}
ROWS, SOURCE, TARGET = 40, 6, 3


def numbers(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def made_of(model: LadderModel, source_BSD: Tensor, target_BTD: Tensor) -> Taps:
    """Return taps that are the same in every block, and a final state."""
    (*_,) = model.side.config.layers
    blocks = len(model.side.config.layers)
    layers = model.side.config.layers
    return Taps(
        source=StackTaps(layers=layers, embedding=source_BSD, hidden=(source_BSD,) * blocks),
        target=StackTaps(layers=layers, embedding=target_BTD, hidden=(target_BTD,) * blocks),
        source_mask_BS=torch.ones(source_BSD.shape[:2], dtype=torch.long),
        final_BTD=numbers(*target_BTD.shape, seed=5),
    )


def normed(states: Tensor) -> Tensor:
    return torch.nn.functional.rms_norm(states, states.shape[-1:], eps=1e-6)


@pytest.mark.parametrize("model_type", ["llama", "gemma2", "granite"])
@pytest.mark.parametrize(
    "changes", [{}, {"start_as_backbone": False}, {"design": "pointwise"}, {"gate": "none"}, {"gate": "per_channel"}], ids=str
)
def test_the_first_logits_are_the_map_s_and_no_other_token_is_likelier(model_type: str, changes: dict[str, Any]) -> None:
    """Up to the length of the side state, which differs a little between positions."""
    backbone = make_llama(model_type, num_attention_heads=8, num_key_value_heads=4)
    config = {"reduction_factor": 4, "side_layers": [1, 3], "start_as_backbone": True} | changes
    model = LadderModel(backbone, LadderConfig(**config)).eval()
    initialize_random(model.side, seed=0)
    source, target = numbers(ROWS, SOURCE, 64), numbers(ROWS, TARGET, 64, seed=1)
    taps, means = made_of(model, source, target), config.get("design") != "pointwise"
    own = normed(target)[:, :, None].expand(-1, -1, 2, -1)
    so_far = (normed(source).sum(1, keepdim=True) + normed(target).cumsum(1)) / (SOURCE + torch.arange(1, TARGET + 1))[:, None]
    states = [own.flatten(2)] + ([so_far[:, :, None].expand(-1, -1, 2, -1).flatten(2)] if means else [])
    tokens, head = torch.tensor([11, 40, 71]), model.backbone.head
    added = model.side.config.merge_last
    reading = Reading(
        tokens_K=tokens,
        own_KLD=numbers(3, 2, 64, seed=2) * 0.2,
        mean_KLD=numbers(3, 2, 64, seed=3) * 0.4 if means else None,
        bias_K=torch.tensor([0.5, -0.3, 0.1]),
        states_NF=torch.cat(states, -1).flatten(0, 1),
        final_ND=taps.final_BTD.flatten(0, 1) if added and taps.final_BTD is not None else None,
    )
    start_as(model.side, reading, head, taps)
    with torch.no_grad():
        hidden = model.side(taps)
    said = torch.einsum("btld,kld->btk", own, reading.own_KLD) + reading.bias_K
    if reading.mean_KLD is not None:
        said = said + torch.einsum("btd,kld->btk", so_far, reading.mean_KLD)
    given = taps.final_BTD @ rows_of_head(head, tokens).T if added else 0
    found = hidden @ rows_of_head(head, tokens).T - given
    found, said = (each - each.mean(-1, keepdim=True) for each in (found, said))
    assert torch.corrcoef(torch.stack([found.flatten(), said.flatten()]))[0, 1] > 0.94
    assert (found.argmax(-1) == said.argmax(-1)).float().mean() > 0.9
    if head.soft_cap is None:
        logits = head(hidden).float().softmax(-1)
        assert logits[..., tokens].sum(-1).mean() > 0.9


def test_the_decay_is_what_serves_rows_that_were_held_out_and_odds_that_are_given_are_kept() -> None:
    states, labels, folds = numbers(200, 6), torch.arange(200) % 3, torch.arange(200) // 10 % 5
    states[:, 0] += 3.0 * labels
    nothing = torch.zeros(200, 3)
    fitted, decay, loss = cross_validated(states, labels, nothing, [1e-4, 1e2], folds)
    ((_, same),) = [each for each in fits(states, labels, 3, [1e-4, 1e2]) if each[0] == decay]
    assert decay == 1e-4 and loss < 0.3
    assert torch.allclose(fitted.weight_LF, same.weight_LF, atol=1e-4)
    known, _, _ = cross_validated(states, labels, same(states), [1e-4], folds)
    assert known.weight_LF.norm() < 0.5 * same.weight_LF.norm()
    _, strong, _ = cross_validated(numbers(200, 6, seed=4), labels, nothing, [1e-6, 1e2], folds)
    assert strong == 1e2, "noise is not fitted"


def test_a_run_starts_with_a_lower_loss_than_at_random(write: Callable[..., Path]) -> None:
    probe, random = (trained(write(name, method=method, training__epochs=1)) for name, method in (("probe", PROBE), ("random", METHOD)))
    assert "starts as a linear map of 2 blocks' states to 20 tokens, fitted to 90 positions of 22 rows" in (probe / "log.txt").read_text()
    assert losses(probe)[0] < 0.7 * losses(random)[0]


def test_two_processes_start_as_one_does_and_zero3_divides_it(write: Callable[..., Path]) -> None:
    still = {"method": PROBE, "training__epochs": 1, "optimizer__learning_rate": 1e-30, **SCORED}
    alone = trained(write("alone", **still))
    path = write("divided", training__deepspeed="zero3", **still)
    train(path, processes=2)
    recipe = load_recipe(str(path))
    divided = Path(recipe.output_dir) / recipe.run_name
    weights = final_weights(divided)
    assert all(torch.allclose(tensor, weights[name], atol=2e-3) for name, tensor in final_weights(alone).items())
    assert result(alone)["start_scores"] == pytest.approx(result(divided)["start_scores"], abs=1)


def test_members_share_the_pass_and_the_map(write: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> None:
    passes, fitted = [], []
    monkeypatch.setattr(
        SharedPasses, "all_of", lambda self, batch, real=SharedPasses.all_of: passes.append(len(batch.indices)) or real(self, batch)
    )
    monkeypatch.setattr(probe_start, "cross_validated", lambda *given, real=cross_validated: fitted.append(1) or real(*given))
    both = [
        load_recipe(str(write(name, method=PROBE, training__epochs=1, optimizer__learning_rate=rate)))
        for name, rate in (("a", 1e-3), ("b", 1e-4))
    ]
    run_together(both)
    assert sum(passes) == 22 + 4 * 6 and len(fitted) == 1, "once to fit, once in the only epoch"


def test_a_resumed_run_and_one_that_starts_from_another_fit_nothing(write: Callable[..., Path]) -> None:
    folder = trained(write("whole", method=PROBE))
    weights = final_weights(folder)
    (folder / "result.json").unlink()
    said = train(write("whole", method=PROBE), "--resume")
    assert "starts as a linear map" not in said
    assert_same_weights(folder, weights)
    said = train(write("again", method=PROBE, training__start_from=str(folder)))
    assert "starts as a linear map" not in said and "starting from the weights in" in said


@pytest.mark.parametrize(
    ("method", "message"),
    [
        ({"design": "adapter"}, "initialization probe stands beside a decoder-only model, and design adapter does not: write random"),
        ({"downsample_rank": 4}, "initialization probe sets whole downsamples: remove downsample_rank"),
        ({"start_as_backbone": False}, "adds to the backbone's final state or stands alone: write start_as_backbone: true too"),
    ],
    ids=lambda value: str(value)[:30],
)
def test_a_method_that_has_no_place_for_it_is_refused(method: dict[str, Any], message: str, write: Callable[..., Path]) -> None:
    with pytest.raises(RecipeError, match=re.escape(message)):
        load_recipe(str(write("no", method=PROBE | method)))


def test_an_encoder_decoder_and_answers_of_many_tokens_are_refused_before_the_backbone_is_loaded(
    write: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    beside_t5 = recipe_writer(tmp_path, make_t5(tmp_path / "t5"))("t5", method=PROBE | {"side_layers": [1]})
    with pytest.raises(NotReady, match=r"^initialization probe stands beside a decoder-only model: write method\.initialization=random"):
        check_before_start([load_recipe(str(beside_t5))], resume=False)
    monkeypatch.setattr(probe_start, "MOST_TOKENS", 3)
    path = write("many", method=PROBE)
    with pytest.raises(
        DataError, match=r"^method\.initialization=probe starts from answers of few tokens, .* different ones \(at most 3\)"
    ):
        run(load_recipe(str(path)))
    recipe = load_recipe(str(path))
    assert not (Path(recipe.output_dir) / recipe.run_name).exists()


def test_states_that_are_not_finite_are_one_line(write: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> None:
    real = probe_start.prepare_tap
    monkeypatch.setattr(probe_start, "prepare_tap", lambda tap, normalize: real(tap, normalize=normalize) * float("nan"))
    with pytest.raises(
        BackboneError, match=r"^the backbone's states are not finite: look at its weights, or write backbone\.precision=fp32"
    ):
        run(load_recipe(str(write("wrong", method=PROBE))))


def test_rows_are_as_many_as_a_map_can_be_fitted_to(write: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(probe_start, "MOST_POSITIONS", 100)
    folder = trained_here(load_recipe(str(write("few", method=PROBE | {"design": "pointwise"}, training__epochs=1))))
    positions = re.search(r"fitted to (\d+) positions", (folder / "log.txt").read_text())
    assert positions is not None and 30 < int(positions[1]) <= 120


def trained_here(recipe: Any) -> Path:
    run(recipe)
    return Path(recipe.output_dir) / recipe.run_name
