"""Backbones that are divided over ranks or come to the device block by block: the same taps, the same training, and no hanging."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from helpers import placements, programs, ranks
from helpers.inputs import inputs_of
from helpers.launchers import free_port, fresh
from helpers.llama_runs import ENDS, METHOD, TEMPLATE, make_tokenizer, save_with_tokenizer
from helpers.llamas import make_llama
from helpers.models import make_t5
from helpers.paths import ROOT
from helpers.ranks import Rank
from helpers.recipes import recipe_writer
from helpers.runs import assert_same_weights, final_weights, losses, result
from helpers.t5gemmas import make_t5gemma
from helpers.training import train
from lst_scale.backbone.placement import streamed
from lst_scale.backbone.placement.load import load_alone, load_placed
from lst_scale.backbone.placement.replicated import LocalBackbone
from lst_scale.backbone.taps import TapRequest
from lst_scale.backbone.weights.precision import Int8Linear
from lst_scale.errors import BackboneError
from lst_scale.plan.footprint import WEIGHTS, Setting, footprint
from lst_scale.recipe.backbone import BackboneRecipe
from lst_scale.recipe.schema import load_recipe
from lst_scale.side.count import shape_of
from lst_scale.system.distributed import World

pytestmark = pytest.mark.slow
DISK = {"name": "streamed", "source": "disk"}
PAIR = {"name": "tensor_parallel", "size": 2}
# Widths that 64 divides after halving, so that NF4's blocks are those of the undivided matrix.
WIDE = {"dropout_rate": 0.0, "d_model": 64, "d_ff": 256, "d_kv": 64}
ONE_STACK: dict[str, Any] = {"method": METHOD, "task__template": TEMPLATE}
# What differs between the kinds of model that are trained on. Gemma 2 sees a window of tokens, in which what fills up the rows of a group
# counts where it stands between a context and a row: without a context it stands before the row, and nothing does.
CHANGES: dict[str, dict[str, Any]] = {
    "t5": {},
    "llama": ONE_STACK | {"backbone__context": {"text": "Kinds of words."}},
    "gemma2": ONE_STACK,
    "t5gemma2": ONE_STACK,  # a side network beside both stacks, which the same lines describe
}
# Of models that run like others only what is their own: which placements are trained under, by processes.
FEWER: dict[str, dict[int, tuple[str, ...]]] = {"t5gemma2": {1: ("replicated",), 2: ("zero3", "tensor"), 4: ("pair",)}}
WIDE_STACK = {"vocab_size": 4096, "num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 64, "intermediate_size": 256}
# Streamed and gathered blocks are the same bytes, run by the same code on the same rows. Divided matrices sum in another order: in
# float32 1e-6, in bf16 (also for int8 and NF4, whose activations are bf16) its 8 bits over three blocks, and NF4's nested scales.
TOLERANCE = {"fp32": 1e-5, "bf16": 0.03, "int8": 0.03, "nf4": 0.04}


# Taps


@pytest.fixture(scope="module")
def folder_of_models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("placements")


@pytest.fixture(scope="module")
def compared(folder_of_models: Path) -> dict[tuple[str, int, str], Any]:
    """Errors of taps and bytes held, for both kinds of T5 and for models of one stack, on two and on four processes."""
    folder = folder_of_models
    precisions = ("fp32", "bf16", "int8", "nf4")
    whole = [f"{p}:{q}" for p in ("streamed", json.dumps(DISK), "zero3") for q in precisions]
    divided = [f"{json.dumps(PAIR)}:{q}" for q in precisions]
    on_two = {
        "gated": whole + divided,
        "llama": whole + divided,  # biases, also where outputs are sums over ranks
        "gemma2": [*whole[::4], divided[0], divided[2]],  # a window shorter than the rows, soft caps, a scaled embedding
        "t5gemma2": [*whole[8:11:2], *divided],  # streamed: tests/test_t5gemma.py
        **{name: divided[:1] for name in ("qwen2", "mistral", "gemma", "gemma3_text", "smollm3", "granite")},
    }
    on_four = {name: [*whole[::4], divided[0], "tensor_parallel:fp32", "tensor_parallel:int8"] for name in ("v1", "qwen3", "t5gemma2")}
    found = {}
    for processes, wanted in ((2, on_two), (4, on_four)):
        arguments = [text for name, items in wanted.items() for text in (f"@{_checkpoint(folder / name)}", *items)]
        done = ranks.run(placements.compare, folder / "blocks", *arguments, processes=processes)
        assert done.returncode == 0, done.stderr[-3000:] + done.stdout[-3000:]
        records = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
        found |= {(record["model"], processes, record["item"]): record["ranks"] for record in records}
        assert len(records) == sum(map(len, wanted.values()))
    return found


def _checkpoint(folder: Path) -> Path:
    """Save the model that a folder is named after."""
    if folder.name == "gated":
        return make_t5(folder, **WIDE, feed_forward_proj="gated-gelu", tie_word_embeddings=False)
    if folder.name == "v1":
        return make_t5(folder, **WIDE)
    (_plain_t5gemma() if folder.name == "t5gemma2" else make_llama(folder.name, **WIDE_STACK)).save_pretrained(folder)
    return folder


def _plain_t5gemma() -> Any:
    """Return one whose norms after sublayers do not multiply by five, and with that what bf16 rounds."""
    model = make_t5gemma(**WIDE_STACK)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "post_" in name:
                parameter.zero_()
    return model


def test_every_placement_gives_the_taps_of_the_replicated_backbone(compared: dict[tuple[str, int, str], Any]) -> None:
    for (name, processes, item), found in compared.items():
        assert len(found) == processes
        placement, precision = item.rsplit(":", 1)
        allowed = TOLERANCE[precision] if "tensor" in placement else 0.0
        errors = [error for error, _, _ in found]
        assert max(errors) <= allowed, f"{name} on {processes}, {item}: {errors}"


def test_answers_of_one_stack_are_those_beside_a_whole_backbone_however_early_a_rank_is_done(tmp_path: Path) -> None:
    """Blocks that are gathered from all ranks are gathered until the last of them is done."""
    wanted = ["streamed", "zero3", "tensor_parallel"]
    done = ranks.run(placements.generate, _checkpoint(tmp_path / "llama"), *wanted, processes=2)
    assert done.returncode == 0, done.stderr[-3000:]
    found = {record["placement"]: record["ranks"] for record in map(json.loads, done.stdout.splitlines())}
    assert list(found) == wanted
    for placement, answers in found.items():
        assert all(same for same, _ in answers), f"{placement}: {found}"
    (_, first), (_, second) = found["zero3"]
    assert first != second, "the ranks end together: the test says nothing"


def test_two_ranks_hold_little_more_than_half_each(compared: dict[tuple[str, int, str], Any]) -> None:
    embeddings = 2 * 4096 * 64 * 4  # and the head, whole on each rank
    for name in ("gated", "llama"):
        for _, held, whole in compared[name, 2, f"{json.dumps(PAIR)}:fp32"]:
            assert (held - embeddings) / (whole - embeddings) < 0.52


@pytest.mark.parametrize("name", ["gated", "llama", "t5gemma2"])
def test_a_plan_knows_what_each_rank_holds(name: str, compared: dict[tuple[str, int, str], Any], folder_of_models: Path) -> None:
    shape = shape_of(str(folder_of_models / name))
    assert shape is not None
    for (model, processes, item), found in compared.items():
        if model == name:
            placement, precision = item.rsplit(":", 1)
            chosen = [
                f"backbone.checkpoint={folder_of_models / name}",
                f"backbone.placement={placement}",
                f"backbone.precision={precision}",
            ]
            recipe = load_recipe("quickstart", [*chosen, "method.side_layers=[0,2]", "method.initialization=random"])
            planned = footprint(recipe, shape, Setting(rows=1, source=8, target=4, world_size=processes, on_gpu=False)).parts[WEIGHTS]
            # Tensors that travel start at multiples of 256 bytes, and an NF4 matrix is six of them, most of them smaller than that here.
            for _, held, _ in found:
                assert planned == pytest.approx(held, rel=0.03 if precision == "nf4" else 0.01), f"{item}: {planned}, {held}"


def test_int8_shards_are_those_of_the_undivided_matrix() -> None:
    weight = torch.randn(48, 64, generator=torch.Generator().manual_seed(0))
    whole = Int8Linear.pack(weight)["packed"]
    largest = weight.abs().amax(1)
    parts = [Int8Linear.of_part(part, largest).packed for part in weight.split(32, dim=1)]
    difference = (torch.cat(parts, 1).int() - whole.int()).abs()
    assert difference.max() <= 1 and (difference > 0).float().mean() < 0.01  # ties between two levels


# Training


def _trainable(folder: Path, kind: str) -> Path:
    """Save a model with a tokenizer, whose heads four ranks can divide."""
    if kind == "t5":
        return make_t5(folder / "t5", dropout_rate=0.0)
    return save_with_tokenizer(kind, make_tokenizer(**ENDS), folder / kind, num_key_value_heads=4)


@pytest.fixture(scope="module", params=list(CHANGES))
def trained(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Four steps, the last of them short, then an evaluation by generation: one process, and every placement on two and four."""
    folder = tmp_path_factory.mktemp("placed")
    make = recipe_writer(folder, _trainable(folder, request.param))
    disk = DISK | {"folder": str(folder / "blocks")}
    wanted: dict[int, dict[str, Any]] = {
        1: {"replicated": "replicated", "tensor": "tensor_parallel"},
        2: {"streamed": "streamed", "disk": disk, "zero3": "zero3", "tensor": "tensor_parallel"},
        4: {"zero3": "zero3", "pair": PAIR, "tensor": "tensor_parallel"},
    }
    runs = {}
    for processes, chosen in wanted.items():
        recipes = []
        for name, placement in chosen.items():
            if name not in FEWER.get(request.param, wanted)[processes]:
                continue
            key = f"{name}-{processes}"
            changes = {"backbone__placement": placement, "training__max_steps": 4, "training__micro_batch_size": 1}
            changes |= CHANGES[request.param]
            recipes.append(str(make(key, **changes, evaluation__max_new_tokens=5)))
            runs[key] = folder / "runs" / f"{key}-kind-seed0"
        train(*recipes, processes=processes)
    return runs


def test_every_placement_trains_to_the_losses_and_weights_of_one_process(trained: dict[str, Path]) -> None:
    reference = trained["replicated-1"]
    expected, score = final_weights(reference), json.loads((reference / "result.json").read_text())["scores"]
    assert len(losses(reference)) == 4
    for key, run in trained.items():
        torch.testing.assert_close(torch.tensor(losses(run)), torch.tensor(losses(reference)), rtol=1e-4, atol=1e-5)
        for name, weight in final_weights(run).items():  # tolerances as in test_training.py
            torch.testing.assert_close(weight, expected[name], rtol=1e-3, atol=2e-4, msg=lambda m, k=key, n=name: f"{k} {n}: {m}")
        assert json.loads((run / "result.json").read_text())["scores"] == score, key


@pytest.mark.parametrize("precision", ["int8", "nf4"])
def test_packed_blocks_of_one_stack_train_alike_under_every_placement(precision: str, tmp_path: Path) -> None:
    """Widths that 64 divides; tolerances are those of taps, of losses that a few steps of training have moved by a tenth."""
    folder = save_with_tokenizer("llama", make_tokenizer(**ENDS), tmp_path / "llama", **WIDE_STACK)
    make = recipe_writer(tmp_path, folder)
    changes: dict[str, Any] = ONE_STACK | {"backbone__precision": precision, "training__max_steps": 4, "data__max_eval_rows": 4}
    paths = {name: make(name, backbone__placement=name, **changes) for name in ("replicated", "streamed", "zero3", "tensor_parallel")}
    train(*paths.values(), processes=2)
    found = {name: losses(tmp_path / "runs" / f"{name}-kind-seed0") for name in paths}
    assert found["streamed"] == found["zero3"] == found["replicated"], found
    assert abs(found["replicated"][-1] - found["replicated"][0]) > 0.1
    assert found["tensor_parallel"] == pytest.approx(found["replicated"], rel=TOLERANCE[precision]), found


@pytest.mark.parametrize(("kind", "precision"), [("t5", "fp32"), ("llama", "int8")])
def test_blocks_that_are_streamed_fill_a_tap_cache(kind: str, precision: str, tmp_path: Path) -> None:
    make = recipe_writer(tmp_path, _trainable(tmp_path, kind))
    # One epoch: in later ones remembered rows are padded as others stood beside them, and float32 rounds otherwise.
    common = CHANGES[kind] | {"backbone__precision": precision, "data__shuffle_seed": 0, "training__epochs": 1}
    common |= {"evaluation__method": "likelihood"}
    cache = {"enabled": True, "dtype": "fp32", "folder": str(tmp_path / "taps")}
    placement = DISK | {"folder": str(tmp_path / "blocks")}
    streamed = [make(name, **common, backbone__placement=placement, cache=cache) for name in ("first", "again")]
    train(make("live", **common), *streamed)
    live, first, again = (tmp_path / "runs" / f"{name}-kind-seed0" for name in ("live", "first", "again"))
    for folder in (first, again):
        assert_same_weights(folder, final_weights(live))
        assert result(folder)["scores"] == result(live)["scores"]
    assert result(first)["cache"]["rows_run"] > result(again)["cache"]["rows_run"] == 0


def test_a_checkpoint_of_one_placement_resumes_under_another(tmp_path: Path, tiny_t5_dir: Path) -> None:
    make = recipe_writer(tmp_path, tiny_t5_dir)
    first = make("moved", backbone__placement=PAIR, training__save_every_steps=3, training__keep_checkpoints=9)
    assert ranks.run(programs.train, "--recipe", first, processes=2).returncode == 0
    folder = tmp_path / "runs" / "moved-kind-seed0"
    whole = final_weights(folder)
    for path in sorted((folder / "checkpoints").glob("step-*"))[1:]:
        shutil.rmtree(path)
    again = make("moved", backbone__placement="streamed", training__save_every_steps=3, training__keep_checkpoints=9)
    done = ranks.run(programs.train, "--recipe", again, "--resume")
    assert done.returncode == 0 and "resuming at step 3" in done.stderr, done.stderr[-2000:]
    for name, weight in final_weights(folder).items():
        torch.testing.assert_close(weight, whole[name], rtol=1e-3, atol=2e-4)


def test_predictions_are_the_same_under_every_placement(trained: dict[str, Path], tmp_path: Path) -> None:
    run, inputs = trained["replicated-1"], tmp_path / "inputs.jsonl"
    inputs.write_text(
        "".join(json.dumps({"word": w, "definition": f"a kind of {w}"}) + "\n" for w in ("cat", "salt", "rage", "walk", "a b"))
    )
    texts = {}
    for name, placement, processes in (("one", "replicated", 1), ("streamed", "streamed", 1), ("tensor", "tensor_parallel", 2)):
        output = tmp_path / f"{name}.jsonl"
        command = ["predict", run, inputs, f"backbone.placement={placement}", "--output", output]
        done = ranks.run(programs.command, *command, processes=processes)
        assert done.returncode == 0, done.stderr[-2000:]
        texts[name] = output.read_text()
    assert texts["one"].count("\n") == 5 and texts["streamed"] == texts["one"] == texts["tensor"]


# The conveyor


def load(folder: Path, placement: Any, precision: str = "fp32") -> LocalBackbone:
    from lst_scale.system import distributed

    recipe = BackboneRecipe.model_validate({"checkpoint": str(folder), "precision": precision, "placement": placement})
    return load_placed(recipe, distributed.connect())


def batch() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    ids = torch.randint(3, 4000, (2, 7), generator=torch.Generator().manual_seed(0))
    return ids, torch.ones_like(ids), ids[:, :3]


@pytest.mark.parametrize("source", ["host", "disk"])
def test_blocks_come_in_order_once_a_pass_and_two_at_most_are_there(source: str, tiny_t5_dir: Path, tmp_path: Path) -> None:
    placement = {"name": "streamed", "source": source} | ({"folder": str(tmp_path)} if source == "disk" else {})
    backbone = load(tiny_t5_dir, placement)
    conveyor = backbone.conveyor
    assert conveyor is not None
    copies: list[tuple[int, int, int]] = []
    conveyor.on_copy = lambda block, slot, nbytes: copies.append((block, slot, nbytes))
    filled: list[int] = []
    for block in conveyor.blocks:
        block.register_forward_pre_hook(lambda *_: filled.append(sum(any(p.numel() for p in b.parameters()) for b in conveyor.blocks)))
    request = TapRequest(layers=(0, 1, 2))
    for _ in range(3):
        backbone(inputs_of(*batch()), request)
    assert [block for block, _, _ in copies] == [0, 1, 2, 3, 4, 5] * 3 + [0], "every block once a pass; the next pass's first is on its way"
    assert [slot for _, slot, _ in copies] == [0, 1] * 9 + [0], "never into the slot of the block that runs"
    assert all(nbytes == conveyor.source.layouts[block].nbytes for block, _, nbytes in copies)
    assert max(filled) == 1 and not any(p.numel() for b in conveyor.blocks for p in b.parameters())
    assert conveyor.resident_bytes == 2 * max(layout.nbytes for layout in conveyor.source.layouts)


def test_a_wrong_guess_costs_a_copy_and_nothing_else(tiny_t5_dir: Path) -> None:
    whole, backbone = load(tiny_t5_dir, "replicated"), load(tiny_t5_dir, "streamed")
    inputs = inputs_of(*batch())
    for layers in ((0, 1, 2), (0,), (0, 1), (0, 1, 2), (0,)):  # the decoder ends early: the block brought next is not the one run next
        request = TapRequest(layers=layers)
        for _ in range(2):
            found, expected = backbone(inputs, request), whole(inputs, request)
            assert torch.equal(found.target.hidden[-1], expected.target.hidden[-1])
            assert torch.equal(found.source.hidden[-1], expected.source.hidden[-1])


@pytest.mark.parametrize("kind", ["v1", "llama"])
@pytest.mark.parametrize("precision", ["int8", "nf4"])
def test_quantized_blocks_travel_quantized(precision: str, kind: str, tmp_path: Path) -> None:
    folder = _checkpoint(tmp_path / kind)
    moved = {}
    for p in ("bf16", precision):
        conveyor = load(folder, "streamed", p).conveyor
        assert conveyor is not None
        moved[p] = sum(layout.nbytes for layout in conveyor.source.layouts)
    assert moved[precision] / moved["bf16"] < {"int8": 0.54, "nf4": 0.34}[precision]  # half and a quarter, and small blocks' padding


@pytest.mark.parametrize("damage", ["truncate", "delete", "header", "index"])
def test_block_files_that_are_not_whole_are_written_again(damage: str, tiny_t5_dir: Path, tmp_path: Path) -> None:
    placement = DISK | {"folder": str(tmp_path)}
    expected = load(tiny_t5_dir, placement)(inputs_of(*batch()), TapRequest(layers=(2,)))
    (folder,) = tmp_path.glob("[!.]*")
    victim = folder / ("decoder.block.1.safetensors" if damage != "index" else streamed.INDEX)
    if damage == "delete":
        victim.unlink()
    elif damage == "header":
        victim.write_bytes(victim.read_bytes()[:8] + b"\xff" + victim.read_bytes()[9:])
    else:
        victim.write_bytes(victim.read_bytes()[:-9])
    assert not streamed.is_whole(folder)
    found = load(tiny_t5_dir, placement)(inputs_of(*batch()), TapRequest(layers=(2,)))
    assert streamed.is_whole(folder)
    assert torch.equal(found.target.hidden[0], expected.target.hidden[0])


@pytest.mark.parametrize("damage", ["flip", "truncate"])
def test_a_block_file_that_can_not_be_used_ends_the_run_and_the_next_start_writes_it_again(
    damage: str, tiny_t5_dir: Path, tmp_path: Path
) -> None:
    placement = DISK | {"folder": str(tmp_path)}
    backbone = load(tiny_t5_dir, placement)
    expected = backbone(inputs_of(*batch()), TapRequest(layers=(2,)))
    (victim,) = tmp_path.rglob("decoder.block.1.safetensors")
    raw = victim.read_bytes()
    victim.write_bytes(raw[:-1] + bytes([raw[-1] ^ 1]) if damage == "flip" else raw[:-9])
    if damage == "flip":
        backbone = load(tiny_t5_dir, placement)
    with pytest.raises(BackboneError, match=r"block.1.safetensors can't be used \(.*\): start again, and all blocks are written anew$"):
        backbone(inputs_of(*batch()), TapRequest(layers=(2,)))
    found = load(tiny_t5_dir, placement)(inputs_of(*batch()), TapRequest(layers=(2,)))
    assert torch.equal(found.target.hidden[0], expected.target.hidden[0]) and victim.read_bytes() == raw


def test_block_files_that_were_copied_serve_as_they_are(tiny_t5_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = load(tiny_t5_dir, DISK | {"folder": str(tmp_path / "blocks")})(inputs_of(*batch()), TapRequest(layers=(2,)))
    shutil.copytree(tmp_path / "blocks", tmp_path / "copied")
    monkeypatch.setattr(streamed, "write_blocks", lambda *_: pytest.fail("they were written again"))
    found = load(tiny_t5_dir, DISK | {"folder": str(tmp_path / "copied")})(inputs_of(*batch()), TapRequest(layers=(2,)))
    assert torch.equal(found.target.hidden[0], expected.target.hidden[0])


def test_of_ranks_that_load_by_themselves_the_first_writes_block_files_and_the_others_wait(
    tiny_t5_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As they do behind a tap cache, each at the first row that it lacks."""
    recipe = BackboneRecipe.model_validate(
        {"checkpoint": str(tiny_t5_dir), "precision": "fp32", "placement": DISK | {"folder": str(tmp_path)}}
    )
    written, entered, go_on = [], threading.Event(), threading.Event()
    write_blocks = streamed.write_blocks

    def slowly(folder: Path, *how: Any) -> None:
        written.append(folder)
        entered.set()
        assert go_on.wait(60)
        write_blocks(folder, *how)

    monkeypatch.setattr(streamed, "write_blocks", slowly)
    found: list[torch.Tensor] = []

    def load_and_run(local_rank: int) -> None:
        alone = World(rank=0, size=1, local_rank=local_rank, device=torch.device("cpu"))
        found.append(load_alone(recipe, alone)(inputs_of(*batch()), TapRequest(layers=(2,))).target.hidden[0])

    ranks_alone = [threading.Thread(target=load_and_run, args=[local_rank]) for local_rank in (1, 2, 0)]
    for rank in ranks_alone:
        rank.start()
        assert entered.wait(60)
    go_on.set()
    for rank in ranks_alone:
        rank.join(60)
    assert len(written) == 1 and len(found) == 3 and all(torch.equal(taps, found[0]) for taps in found)


# Failures: every rank ends, within a minute, and says why


def start_ranks(recipe_of_rank: Callable[[int], Path], count: int, **environment: Callable[[int], str]) -> list[Rank]:
    """Start ranks by hand, as Slurm does: no launcher that would end the others."""
    return ranks.start(
        programs.train, lambda rank: ["--recipe", recipe_of_rank(rank), "--overwrite"], processes=count, environment_of=environment
    )


def finish(started: list[Rank]) -> list[tuple[int, list[str]]]:
    """Return each rank's exit status and its error lines."""
    found = []
    for rank in started:
        status, text = rank.wait(), rank.stderr
        assert "Traceback" not in text and status != -signal.SIGABRT, f"{status}: {text[-3000:]}"
        found.append((status, [line for line in text.splitlines() if line.startswith("error:")]))
    return found


@pytest.mark.parametrize("placement", ["tensor_parallel", "zero3", "streamed"])
def test_a_killed_rank_ends_the_others(placement: str, tmp_path: Path, tiny_t5_dir: Path) -> None:
    recipe = recipe_writer(tmp_path, tiny_t5_dir)("killed", backbone__placement=placement, training__epochs=5000)
    started = start_ranks(lambda _: recipe, 2)
    metrics = tmp_path / "runs" / "killed-kind-seed0" / "metrics.jsonl"
    with ranks.ended(started):
        ranks.wait_for(lambda: metrics.exists() and metrics.read_text().count("\n") > 4, started)
        started[1].kill()
        (status, lines), _ = finish(started)
    assert status == 1 and len(lines) == 1 and "rank 0 lost contact with another rank" in lines[0]


def test_an_interpreter_that_ends_after_another_rank_did_does_not_abort(tmp_path: Path, tiny_t5_dir: Path) -> None:
    """Forked ranks are not torn down at their end; these are."""
    recipe = recipe_writer(tmp_path, tiny_t5_dir)("ended", backbone__placement="zero3", training__epochs=5000)
    shared = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    command = [sys.executable, "-m", "lst_scale.train", "--recipe", str(recipe)]
    each = [fresh() | shared | {"RANK": rank, "LOCAL_RANK": rank} for rank in ("0", "1")]
    first, second = (subprocess.Popen(command, cwd=ROOT, env=one, stderr=subprocess.PIPE, text=True) for one in each)
    metrics = tmp_path / "runs" / "ended-kind-seed0" / "metrics.jsonl"
    ranks.wait_for(lambda: metrics.exists() or first.poll() is not None)
    second.kill()
    _, said = first.communicate(timeout=ranks.PATIENCE)
    second.communicate()
    assert first.returncode == 1 and "rank 0 lost contact with another rank" in said and "Traceback" not in said


def _without_a_shard(folder: Path) -> str:
    (folder / "model.safetensors").rename(folder / "model-00001-of-00002.safetensors")
    names = dict.fromkeys(load_file(folder / "model-00001-of-00002.safetensors"), "model-00001-of-00002.safetensors")
    names["decoder.final_layer_norm.weight"] = "model-00002-of-00002.safetensors"
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": names}))
    return "lacks model-00002-of-00002.safetensors"


def _with_a_wrong_shape(folder: Path) -> str:
    weights = load_file(folder / "model.safetensors")
    weights["encoder.block.1.layer.1.DenseReluDense.wo.weight"] = torch.zeros(32, 48)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return "has shape (32, 48) where config.json asks for (32, 64)"


def _with_another_weight(folder: Path) -> str:
    weights = load_file(folder / "model.safetensors")
    weights["encoder.block.1.layer.1.DenseReluDense.wo.weight"][0, 0] += 1
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return "on rank 1 differs from rank 0's"


@pytest.mark.parametrize("placement", ["tensor_parallel", "zero3"])
@pytest.mark.parametrize("damage", [_without_a_shard, _with_a_wrong_shape, _with_another_weight])
def test_a_rank_with_another_checkpoint_ends_all_with_one_line(placement: str, damage: Any, tmp_path: Path, tiny_t5_dir: Path) -> None:
    broken = tmp_path / "broken"
    shutil.copytree(tiny_t5_dir, broken)
    message = damage(broken)
    (tmp_path / "other").mkdir()
    recipes = [
        recipe_writer(tmp_path, tiny_t5_dir)("run", backbone__placement=placement),
        recipe_writer(tmp_path / "other", broken)("run", backbone__placement=placement, output_dir=str(tmp_path / "runs")),
    ]
    found = finish(start_ranks(lambda rank: recipes[rank], 2))
    assert [status for status, _ in found] == [1, 1]
    (line,) = [line for _, lines in found for line in lines]
    assert message in line and "rank 1" in line


@pytest.mark.parametrize(
    ("placement", "count", "message"),
    [
        (
            "tensor_parallel",
            3,
            "4 heads and 64 feed-forward channels can't be divided over 3 ranks: backbone.placement.size can be 1, 2, 4",
        ),
        ({"name": "tensor_parallel", "size": 2}, 3, "backbone.placement.size 2 must divide the number of ranks, 3"),
        ({"name": "tensor_parallel", "size": 2}, 2, "ranks 0 to 1 would share one backbone but run on different machines"),
    ],
)
def test_groups_that_can_not_be_made_are_refused_in_one_line(
    placement: Any, count: int, message: str, tmp_path: Path, tiny_t5_dir: Path
) -> None:
    recipe = recipe_writer(tmp_path, tiny_t5_dir)("run", backbone__placement=placement)
    found = finish(start_ranks(lambda _: recipe, count, SLURM_NODEID=lambda rank: str(rank % 2 if "machines" in message else 0)))
    assert [status for status, _ in found] == [1] * count
    (line,) = [line for _, lines in found for line in lines]
    assert message in line


def test_a_group_may_span_machines_when_told_so(tmp_path: Path, tiny_t5_dir: Path) -> None:
    recipe = recipe_writer(tmp_path, tiny_t5_dir)("run", backbone__placement=PAIR | {"across_nodes": True}, training__max_steps=1)
    assert [status for status, _ in finish(start_ranks(lambda _: recipe, 2, SLURM_NODEID=str))] == [0, 0]
