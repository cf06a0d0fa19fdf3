"""What only a GPU can show: its kernels give the CPU's numbers, blocks that stream on a stream of their own are the resident ones, and
training live, from a tap cache and after a resume is one and the same.

    python -m pytest tests/test_gpu.py
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from helpers.cached import batches
from helpers.ladders import LADDERS, generate, source
from helpers.launchers import launch
from helpers.models import make_t5
from helpers.runs import final_weights, losses, result
from helpers.tiny import batch, tiny_ladder, tiny_t5
from helpers.training import train
from lst_scale import LadderModel
from lst_scale.backbone.placement.load import load_placed
from lst_scale.backbone.placement.replicated import LocalBackbone
from lst_scale.backbone.taps import TapRequest, Taps
from lst_scale.recipe.backbone import BackboneRecipe
from lst_scale.system import distributed

pytestmark = pytest.mark.gpu
REQUEST = TapRequest(layers=(0, 1, 2), target_final=True)
# Sums in another order: of float32 1e-5; of bf16, which int8 and NF4 multiply in, its 8 bits over three blocks. NF4's scales are
# rounded by other code than on the CPU.
TOLERANCE = {"fp32": 1e-5, "bf16": 0.03, "int8": 0.03, "nf4": 0.05}
PRECISIONS = tuple(TOLERANCE)
STREAMED: dict[str, Any] = {"host": "streamed", "disk": {"name": "streamed", "source": "disk"}}


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A T5 whose rows NF4's blocks divide."""
    return make_t5(tmp_path_factory.mktemp("wide"), dropout_rate=0.0, d_model=64, d_ff=256, d_kv=64)


def of(taps: Taps) -> list[Tensor]:
    assert taps.final_BTD is not None
    return [*taps.source.hidden, *taps.target.hidden, taps.final_BTD]


@pytest.mark.parametrize("precision", PRECISIONS)
def test_taps_are_those_of_the_cpu(precision: str, wide: Path) -> None:
    (inputs,) = batches(1)
    expected = of(LocalBackbone.load(str(wide), precision=precision, device="cpu")(inputs, REQUEST))
    found = of(LocalBackbone.load(str(wide), precision=precision, device="cuda")(inputs.to(torch.device("cuda")), REQUEST))
    for ours, theirs in zip(found, expected, strict=True):
        assert ours.is_cuda
        keep = inputs.source_mask_BS.bool() if theirs.shape[1] == 9 else torch.ones(theirs.shape[:2]).bool()
        difference, size = (ours.cpu().float() - theirs.float())[keep].norm(), theirs.float()[keep].norm()
        assert difference <= TOLERANCE[precision] * size, float(difference / size)


@pytest.mark.parametrize("kind", STREAMED)
@pytest.mark.parametrize("precision", PRECISIONS)
def test_streamed_blocks_are_the_resident_ones_bit_for_bit(precision: str, kind: str, wide: Path, tmp_path: Path) -> None:
    world = distributed.connect()
    placed = STREAMED[kind] | {"folder": str(tmp_path)} if kind == "disk" else STREAMED[kind]
    resident, streamed = (
        load_placed(BackboneRecipe.model_validate({"checkpoint": str(wide), "precision": precision, "placement": placement}), world)
        for placement in ("replicated", placed)
    )
    for inputs in batches(4):  # several passes in a row, nothing waited for between: a slot written too early would show
        inputs = inputs.to(world.device)
        pairs = list(zip(of(resident(inputs, REQUEST)), of(streamed(inputs, REQUEST)), strict=True))
        assert all(torch.equal(a, b) for a, b in pairs)


@pytest.mark.parametrize("kind", LADDERS)
def test_loss_gradients_and_generation_are_those_of_the_cpu(kind: str) -> None:
    here, there = (tiny_ladder(tiny_t5(), **LADDERS[kind]) for _ in range(2))
    there.to("cuda")
    rows = batch()
    moved = {name: tensor.cuda() for name, tensor in rows.items()}
    ours, theirs = there(**moved), here(**rows)
    torch.testing.assert_close(ours.loss.cpu(), theirs.loss, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(ours.logits.cpu(), theirs.logits, rtol=1e-4, atol=1e-4)
    ours.loss.backward()
    theirs.loss.backward()
    expected = dict(here.named_parameters())
    for name, parameter in there.named_parameters():
        wanted = expected[name].grad
        assert parameter.grad is not None and wanted is not None
        torch.testing.assert_close(parameter.grad.cpu(), wanted, rtol=1e-3, atol=1e-4 * float(wanted.abs().max()) + 1e-7, msg=name)
    _assert_same_text(there, here)


def _assert_same_text(there: LadderModel, here: LadderModel) -> None:
    inputs = source()
    moved = {name: tensor.cuda() for name, tensor in inputs.items()}
    for options in ({"do_sample": False}, {"num_beams": 3}):
        with_cache, without = (generate(there, moved, use_cache=use_cache, **options) for use_cache in (True, False))
        assert torch.equal(with_cache, without)
        assert torch.equal(with_cache.cpu(), generate(here, inputs, **options))


def test_recorded_steps_are_those_of_a_run_that_records_nothing(wide: Path, write_recipe: Callable[..., Path]) -> None:
    common: dict[str, Any] = {"backbone__checkpoint": str(wide), "method__recompute": True, "method__dropout": 0.1}
    train(write_recipe("plain", **common), path := write_recipe("recorded", logging__profile_steps=[3, 5], **common))
    recorded, plain = (path.parent / "runs" / f"{name}-kind-seed0" for name in ("recorded", "plain"))
    torch.testing.assert_close(torch.tensor(losses(recorded)), torch.tensor(losses(plain)), rtol=2e-3, atol=1e-4)
    assert {file.suffix for file in (recorded / "profile").iterdir()} == {".json", ".pickle"}


@pytest.mark.parametrize("precision", ["bf16", "int8", "nf4"])
def test_training_live_from_the_cache_and_after_a_resume_is_the_same(precision: str, wide: Path, write_recipe: Callable[..., Path]) -> None:
    common: dict[str, Any] = {"backbone__checkpoint": str(wide), "backbone__precision": precision, "evaluation__method": "likelihood"}
    common |= {"training__save_every_steps": 4, "training__keep_checkpoints": 9}
    cache = {"cache__enabled": True, "cache__dtype": "bf16", "cache__folder": str(wide.parent / f"taps-{precision}")}
    recipes = {
        name: write_recipe(name, **(common | more)) for name, more in {"live": {}, "cached": cache, "again": cache, "cut": {}}.items()
    }
    folders = {name: path.parent / "runs" / f"{name}-kind-seed0" for name, path in recipes.items()}
    train(*recipes.values())
    shutil.rmtree(folders["cut"] / "checkpoints" / "step-00000008")
    train("--resume", recipes["cut"])
    assert result(folders["again"])["cache"]["backbone_loaded"] is False
    assert "NVIDIA" in result(folders["live"])["device"]
    expected = final_weights(folders["live"])
    for name in ("cached", "again", "cut"):
        # Atomic additions come in another order each time, so not bit for bit; Adam lifts rounding to about 1e-4 of a step.
        torch.testing.assert_close(torch.tensor(losses(folders[name])[:8]), torch.tensor(losses(folders["live"])), rtol=2e-3, atol=1e-4)
        for weight, found in final_weights(folders[name]).items():
            torch.testing.assert_close(found, expected[weight], rtol=1e-2, atol=2e-3, msg=lambda m, w=f"{name}: {weight}": f"{w}: {m}")


def test_the_deepspeed_command_trains_on_it(wide: Path, write_recipe: Callable[..., Path]) -> None:
    path = write_recipe("launched", backbone__checkpoint=str(wide), training__max_steps=1)
    done = launch(["lst_scale/train.py", "--recipe", str(path)])
    assert done.returncode == 0, (done.stderr + done.stdout)[-3000:]
    assert "NVIDIA" in result(path.parent / "runs" / "launched-kind-seed0")["device"]
