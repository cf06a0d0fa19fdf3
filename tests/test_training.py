"""Real DeepSpeed processes on the CPU with gloo."""

from __future__ import annotations

import json
import os
import random
import signal
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from helpers import programs, ranks
from helpers.launchers import launch
from helpers.models import make_t5
from helpers.recipes import recipe_writer
from helpers.runs import final_weights, last_step, losses, newest_step
from helpers.training import train

pytestmark = pytest.mark.slow
STAGES = ("zero0", "zero1", "zero2", "zero2-offload", "zero3", "zero3-nvme")


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[int, str], Path]:
    """Every ZeRO stage on one and on two processes: two launches, twelve runs."""
    folder = tmp_path_factory.mktemp("zero")
    os.environ["NVME_PATH"] = str(folder / "nvme")
    (folder / "nvme").mkdir()
    make = recipe_writer(folder, make_t5(folder / "t5", dropout_rate=0.0))
    runs = {}
    for processes in (1, 2):
        recipes = []
        for stage in STAGES:
            name = f"{stage}-{processes}"
            recipes.append(str(make(name, training__deepspeed=stage)))
            runs[processes, stage] = folder / "runs" / f"{name}-kind-seed0"
        # DeepSpeed compiles its asynchronous I/O at first use: minutes on two cores.
        train(*recipes, processes=processes, timeout=1200)
    return runs


@pytest.mark.parametrize("stage", STAGES)
def test_two_processes_train_to_the_losses_and_weights_of_one(trained: dict[tuple[int, str], Path], stage: str) -> None:
    one, two = trained[1, stage], trained[2, stage]
    assert len(losses(one)) == 8
    # float32 sums in another order; Adam divides by the root of tiny squared gradients, which lifts rounding to about 1e-4 of the step.
    torch.testing.assert_close(torch.tensor(losses(two)), torch.tensor(losses(one)), rtol=1e-4, atol=1e-5)
    expected = final_weights(one)
    for name, weight in final_weights(two).items():
        torch.testing.assert_close(weight, expected[name], rtol=1e-3, atol=2e-4, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("stage", STAGES[1:])
def test_every_zero_stage_trains_to_the_weights_of_stage_0(trained: dict[tuple[int, str], Path], stage: str) -> None:
    expected = final_weights(trained[2, "zero0"])
    for name, weight in final_weights(trained[2, stage]).items():
        torch.testing.assert_close(weight, expected[name], rtol=1e-3, atol=2e-4, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("stage", STAGES[1:])
def test_every_zero_stage_checkpoints_the_moments_of_stage_0(trained: dict[tuple[int, str], Path], stage: str) -> None:
    expected, found = (load_file(max((trained[2, s] / "checkpoints").glob("step-*")) / "moments.safetensors") for s in ("zero0", stage))
    assert found.keys() == expected.keys()
    for name, moment in expected.items():
        torch.testing.assert_close(found[name], moment, rtol=1e-2, atol=1e-3 * float(moment.abs().max()) + 1e-12, msg=name)


def test_an_odd_number_of_parameters_trains(tmp_path: Path) -> None:
    """ZeRO 1 and 2 refuse buffers of an odd number of elements."""
    make = recipe_writer(tmp_path, make_t5(tmp_path / "t5", dropout_rate=0.0))
    short = {"method__side_layers": [2], "method__merge_last": True, "training__max_steps": 1, "training__epochs": 1}
    train(make("odd", training__deepspeed="zero2", **short))
    run = tmp_path / "runs" / "odd-kind-seed0"
    assert sum(weight.numel() for weight in final_weights(run).values()) % 2 == 1


def test_training_lowers_the_loss_and_moves_every_weight(trained: dict[tuple[int, str], Path]) -> None:
    folder = trained[2, "zero2"]
    assert losses(folder)[-1] < losses(folder)[0] - 0.2
    first = load_file(min((folder / "checkpoints").glob("step-*")) / "weights.safetensors")
    assert all(not torch.equal(weight, first[name]) for name, weight in final_weights(folder).items())


def test_a_run_leaves_recipe_result_metrics_and_a_side_network_that_loads(trained: dict[tuple[int, str], Path]) -> None:
    from lst_scale import LadderModel
    from lst_scale.recipe.schema import load_recipe

    folder = trained[2, "zero3"]
    result = json.loads((folder / "result.json").read_text())
    assert {"scores", "majority", "peak_memory_bytes", "tokens_per_second", "trainable_parameters", "versions", "command"} <= result.keys()
    assert result["world_size"] == 2 and result["peak_memory_bytes"] > 0
    recipe = load_recipe(str(folder / "recipe.yaml"))
    assert recipe.model_dump(mode="json") == result["recipe"]
    model = LadderModel.from_pretrained(folder / "side_network")
    assert sum(p.numel() for p in model.parameters()) == result["trainable_parameters"]
    gates = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines() if '"gates"' in line]
    assert gates and all(0 < value < 1 for key, value in gates[-1].items() if key.startswith(("encoder", "decoder")))


@pytest.mark.parametrize("launcher", ["python", "torchrun", "deepspeed"])
def test_python_torchrun_and_deepspeed_all_start_it(launcher: str, write_recipe: Callable[..., Path]) -> None:
    recipe = write_recipe(launcher, training__max_steps=1)
    script = ["-m", "lst_scale.train"] if launcher == "python" else ["lst_scale/train.py"]
    done = launch([*script, "--recipe", str(recipe)], processes=1, launcher=launcher)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "score" in done.stderr + done.stdout


def test_a_checkpoint_of_one_world_resumes_in_another(write_recipe: Callable[..., Path], tmp_path: Path) -> None:
    stop = write_recipe("moved", training__deepspeed="zero3", training__save_every_steps=3, training__keep_checkpoints=9)
    assert ranks.run(programs.train, "--recipe", stop, processes=2).returncode == 0
    folder = tmp_path / "runs" / "moved-kind-seed0"
    whole = final_weights(folder)
    for path in sorted((folder / "checkpoints").glob("step-*"))[1:]:  # back to step 3
        for file in path.iterdir():
            file.unlink()
        path.rmdir()
    again = write_recipe("moved", training__deepspeed="zero1", training__save_every_steps=3, training__keep_checkpoints=9)
    done = ranks.run(programs.train, "--recipe", again, "--resume")
    assert done.returncode == 0, done.stderr[-3000:]
    assert "resuming at step 3" in done.stderr
    for name, weight in final_weights(folder).items():  # the tolerance of two processes against one, above
        torch.testing.assert_close(weight, whole[name], rtol=1e-3, atol=2e-4)


def test_kill_9_at_ten_random_moments_and_resume_ends_bit_identical(write_recipe: Callable[..., Path], tmp_path: Path) -> None:
    changes = {
        "training__epochs": 30,
        "training__save_every_steps": 1,
        "training__evaluate_every": 40,
        "method__dropout": 0.1,
        "training__micro_batch_size": 6,
    }
    train(write_recipe("whole", **changes))
    victim = write_recipe("killed", **changes)
    folder = tmp_path / "runs" / "killed-kind-seed0"
    draw = random.Random(0)
    for number in range(10):
        seen = (newest_step, last_step)[number % 2]  # a checkpoint has just been finished, or a step has and its checkpoint has not
        (rank,) = ranks.start(programs.train, ["--recipe", victim, "--resume"])
        with ranks.ended([rank]):
            goal = newest_step(folder) + draw.randint(1, 3)
            ranks.wait_for(lambda goal=goal, seen=seen: seen(folder) >= goal, [rank])
            assert rank.poll() is None, "the run ended before it could be killed: make it longer"
            rank.kill()
            assert rank.wait() == -signal.SIGKILL
    assert ranks.run(programs.train, "--recipe", victim, "--resume").returncode == 0
    expected = final_weights(tmp_path / "runs" / "whole-kind-seed0")
    found = final_weights(folder)
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    assert losses(folder) == losses(tmp_path / "runs" / "whole-kind-seed0")
