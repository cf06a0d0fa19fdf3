"""A linear probe in the same harness: what it reads, how it is fitted, chosen, saved, and asked again."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, T5ForConditionalGeneration

from helpers import llama_runs, programs, ranks
from helpers.llama_runs import trained
from helpers.models import make_t5
from helpers.paths import EMBEDDED
from helpers.recipes import recipe_writer
from helpers.runs import metrics, result
from helpers.training import train
from lst_scale.backbone.placement.replicated import LocalBackbone
from lst_scale.backbone.taps import TapRequest
from lst_scale.data.batches import Batch
from lst_scale.errors import BackboneError, LadderError, MembersFailed, NotReady, RecipeError
from lst_scale.inference.predict import predict_file
from lst_scale.inference.published import WANTED, fill
from lst_scale.inference.scored_run import read_scored_run
from lst_scale.methods import check_method
from lst_scale.methods.linear import fits
from lst_scale.methods.lst import taps_of
from lst_scale.methods.probe import Probe, states_of
from lst_scale.recipe.method import ProbeRecipe
from lst_scale.recipe.schema import Recipe, load_recipe
from lst_scale.runs.folder import holds_training
from lst_scale.runs.overwrite import remove_run
from lst_scale.training.preflight import check_before_start
from lst_scale.training.run import run

tokenizer, checkpoint, write_llama = llama_runs.tokenizer, llama_runs.checkpoint, llama_runs.write

PROBE: dict[str, Any] = {"method": {"name": "probe", "layers": [1, 3]}, "optimizer": {}, "training": {}}
PROBE |= {"evaluation__method": "likelihood"}


@pytest.fixture
def write(write_llama: Callable[..., Path]) -> Callable[..., Path]:
    return lambda name, model_type="llama", **changes: write_llama(name, model_type, **(PROBE | changes))


def blobs(rows: int = 60, channels: int = 5) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(rows) % 3
    centres = torch.randn(3, channels, generator=generator)
    return centres[labels] + torch.randn(rows, channels, generator=generator), labels


def test_a_fit_is_where_the_penalised_loss_is_least() -> None:
    states, labels = blobs()
    scaled = (states - states.mean(0)) / states.std(0, unbiased=False) / 5**0.5
    norms: list[float] = []
    for decay, fitted in fits(states, labels, 3, [1e-3, 1e-1]):
        weight = (fitted.weight_LF * states.std(0, unbiased=False) * 5**0.5).requires_grad_()
        bias = (fitted.bias_L + fitted.weight_LF @ states.mean(0)).requires_grad_()
        loss = torch.nn.functional.cross_entropy(scaled @ weight.T + bias, labels) + decay / 2 * weight.square().sum()
        loss.backward()
        assert weight.grad is not None and bias.grad is not None
        assert weight.grad.abs().max() < 1e-4 and bias.grad.abs().max() < 1e-4
        norms.append(float(weight.detach().norm()))
    assert norms[0] < 0.5 * norms[1], "the larger decay comes first and keeps weights small"


def test_more_channels_than_rows_are_fitted_in_as_many_coordinates_as_rows_and_to_the_same_map() -> None:
    states, labels = blobs(rows=30, channels=4)
    wide = torch.cat([states] * 20, 1)  # the same again: a map of the whole is that of one, spread over all
    for (_, narrow), (_, other) in zip(fits(states, labels, 3, [1e-2, 1e-3]), fits(wide, labels, 3, [1e-2, 1e-3]), strict=True):
        torch.testing.assert_close(other(wide), narrow(states), rtol=1e-3, atol=1e-3)
        torch.testing.assert_close(other.weight_LF[:, :4], other.weight_LF[:, -4:])


def test_what_scale_and_zero_a_channel_has_is_no_matter_and_one_that_never_changes_is_not_read() -> None:
    states, labels = blobs()
    states = torch.cat([states, torch.full((len(states), 1), 7.0)], 1)
    moved = states * torch.tensor([1e3, 1, 1e-3, 1, 50, 1]) + torch.tensor([0.0, 20, 0, -3, 0, 0])
    for (_, plain), (_, other) in zip(fits(states, labels, 3, [1e-2]), fits(moved, labels, 3, [1e-2]), strict=True):
        torch.testing.assert_close(plain(states), other(moved), rtol=1e-3, atol=1e-3)
        assert not plain.weight_LF[:, 5].any()


def one_batch(vocabulary: int) -> Batch:
    ids = torch.randint(3, vocabulary, (2, 7), generator=torch.Generator().manual_seed(0))
    mask = torch.tensor([[1] * 7, [1] * 4 + [0] * 3])
    return Batch(input_ids_BS=ids, attention_mask_BS=mask, labels_BT=torch.tensor([[5, 6, 1], [7, 1, -100]]), indices=(0, 1))


def test_beside_a_language_model_it_reads_the_prompt_s_last_token(checkpoint: Callable[[str], Path]) -> None:
    folder = checkpoint("llama")
    batch = one_batch(90)
    taps = taps_of(LocalBackbone.load(str(folder), precision="fp32"), batch, TapRequest(layers=(0, 2)))
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    for row, length in enumerate((7, 4)):
        with torch.no_grad():
            hidden = model(batch.input_ids_BS[row : row + 1, :length], output_hidden_states=True).hidden_states
        expected = torch.cat([hidden[1][0, -1], hidden[3][0, -1]])  # hidden[0] is the embedding
        torch.testing.assert_close(states_of(taps, TapRequest(layers=(0, 2)), "answer")[row], expected, rtol=1e-4, atol=1e-4)


def test_beside_an_encoder_decoder_it_reads_the_first_position_of_the_target_or_the_mean_of_the_source(tiny_t5_dir: Path) -> None:
    batch, request = one_batch(4000), TapRequest(layers=(0, 1))
    taps = taps_of(LocalBackbone.load(str(tiny_t5_dir), precision="fp32"), batch, request)
    model: Any = T5ForConditionalGeneration.from_pretrained(tiny_t5_dir).eval()
    for row, length in enumerate((7, 4)):
        with torch.no_grad():
            start = torch.tensor([[model.config.decoder_start_token_id]])
            found = model(batch.input_ids_BS[row : row + 1, :length], decoder_input_ids=start, output_hidden_states=True)
        first = torch.cat([found.decoder_hidden_states[1][0, 0], found.decoder_hidden_states[2][0, 0]])
        mean = torch.cat([found.encoder_hidden_states[1][0].mean(0), found.encoder_hidden_states[2][0].mean(0)])
        if model.config.num_layers > 2:  # transformers' last states are after the final norm
            torch.testing.assert_close(states_of(taps, request, "answer")[row], first, rtol=1e-4, atol=1e-4)
            torch.testing.assert_close(states_of(taps, request, "source")[row], mean, rtol=1e-4, atol=1e-4)
        else:
            raise AssertionError("the tiny T5 should have three blocks or more")


@pytest.mark.parametrize("model_type", ["llama", "t5gemma2"])
def test_a_probe_is_fitted_scored_saved_and_answers_as_it_was_scored(model_type: str, write: Callable[..., Path], tmp_path: Path) -> None:
    folder = trained(write("probe", model_type))
    found, saved = result(folder), load_file(folder / "probe" / "probe.safetensors")
    assert found["method"] == "probe" and found["steps"] == 1 and found["validation_score"] == found["scores"]["score"]
    assert found["trainable_parameters"] == sum(tensor.numel() for tensor in saved.values())
    record = json.loads((folder / "probe" / "probe.json").read_text())
    assert saved["weight"].shape == (8, 64 * len(record["layers"])) and len(record["labels"]) == 8
    rows = [json.loads(line) for line in (EMBEDDED / "wordnet/validation.jsonl").read_text().splitlines()[:7]]
    (tmp_path / "in.jsonl").write_text("".join(json.dumps({k: row[k] for k in ("word", "definition")}) + "\n" for row in rows))
    assert predict_file([folder], tmp_path / "in.jsonl", tmp_path / "out.jsonl", probabilities=True) == 7
    said = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    right = 100 * sum(answer["prediction"] == row["kind"] for answer, row in zip(said, rows, strict=True)) / 7
    assert right == pytest.approx(found["scores"]["accuracy"], abs=0.01)
    for answer in said:
        shares = answer["probabilities"]
        assert sum(shares.values()) == pytest.approx(1) and max(shares, key=shares.get) == answer["prediction"]
    log = (folder / "log.txt").read_text()
    assert all(f"{what}: validation score" in log for what in ("block 1", "block 3", "2 blocks together"))


def test_a_probe_is_published_whole_and_a_start_over_loses_it_only_when_asked_to(write: Callable[..., Path], tmp_path: Path) -> None:
    folder, published, answers = trained(write("whole")), tmp_path / "published", []
    fill(folder, "me/probe", read_scored_run(folder), published)
    for place in (folder, published):
        predict_file([place], EMBEDDED / "wordnet/test.jsonl", tmp_path / "out.jsonl")
        answers.append((tmp_path / "out.jsonl").read_text())
    assert answers[0] == answers[1]
    names = [path.relative_to(published).as_posix() for path in published.rglob("*") if path.is_file()]
    assert all(any(fnmatch(name, wanted) for wanted in (*WANTED, "README.md")) for name in names)
    (folder / "result.json").unlink()
    assert holds_training(folder) and remove_run(folder).left == ()


def test_the_best_of_what_was_tried_on_validation_is_taken(write: Callable[..., Path]) -> None:
    folder = trained(write("tried", data__max_train_rows=60, data__max_eval_rows=40))
    log = (folder / "log.txt").read_text()
    told = re.findall(r" (\S+ \S+(?: together)?): validation score ([\d.]+), loss ([\d.]+)", log)
    tried = {what: (float(score), float(loss)) for what, score, loss in told}
    assert len(tried) == 3
    best = max(tried, key=lambda what: (tried[what][0], -tried[what][1]))
    assert f"chosen by validation: {best}," in log
    assert result(folder)["validation_score"] == pytest.approx(tried[best][0], abs=0.01)


def test_taps_that_a_ladder_left_in_the_cache_serve_a_probe_of_fewer_blocks(write_llama: Callable[..., Path], tmp_path: Path) -> None:
    cache = {"cache": {"enabled": True, "dtype": "fp32", "folder": str(tmp_path / "taps")}}
    trained(write_llama("ladder", training__epochs=1, **cache))
    live = trained(write_llama("live", **(PROBE | {"method": {"name": "probe", "layers": [3]}})))
    cached = trained(write_llama("cached", **(PROBE | {"method": {"name": "probe", "layers": [3]}}), **cache))
    assert result(cached)["cache"] == {"rows_read": 22 + 7 + 7, "rows_run": 0, "backbone_loaded": False, "damaged": []}
    ours, theirs = (load_file(folder / "probe" / "probe.safetensors") for folder in (cached, live))
    torch.testing.assert_close(ours, theirs, rtol=1e-2, atol=1e-2)
    assert result(cached)["scores"] == result(live)["scores"]


def test_two_processes_fit_what_one_does(write: Callable[..., Path], tmp_path: Path) -> None:
    one = trained(write("one"))
    train(write("two"), processes=2)
    two = tmp_path / "runs" / "two-kind-seed0"
    ours, theirs = (load_file(folder / "probe" / "probe.safetensors") for folder in (one, two))
    torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-4)  # rows are padded otherwise
    assert result(one)["scores"] == result(two)["scores"]


@pytest.mark.parametrize("kind", ["t5", "llama"])
@pytest.mark.parametrize("placement", ["tensor_parallel", "zero3", "streamed"])
@pytest.mark.slow
def test_every_placement_fits_what_the_replicated_backbone_does(
    placement: str, kind: str, write_llama: Callable[..., Path], tmp_path: Path
) -> None:
    make = write_llama if kind == "llama" else recipe_writer(tmp_path, make_t5(tmp_path / "t5", dropout_rate=0.0))
    changes = PROBE | {"method": {"name": "probe", "layers": [0, 2]}}
    train(make("whole", **changes), make("placed", backbone__placement=placement, **changes), processes=2)
    ours, theirs = (load_file(tmp_path / "runs" / f"{name}-kind-seed0" / "probe" / "probe.safetensors") for name in ("whole", "placed"))
    torch.testing.assert_close(ours, theirs, rtol=1e-2, atol=1e-2)  # sums over ranks are in another order, and the fit follows them


def test_a_context_is_run_once_and_comes_back_with_the_probe(write: Callable[..., Path], tmp_path: Path) -> None:
    folder = trained(write("context", backbone__context={"examples": 3}))
    assert "context of" in (folder / "log.txt").read_text() and "run once, before all rows" in (folder / "log.txt").read_text()
    identity = json.loads((folder / "probe" / "probe.json").read_text())["backbone"]
    assert len(identity["context"]) > 10
    source = str(EMBEDDED / "wordnet/validation.jsonl")
    predict_file([folder], Path(source), tmp_path / "out.jsonl")
    said = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()[:7]]
    right = 100 * sum(row["prediction"] == row["kind"] for row in said) / 7
    assert right == pytest.approx(result(folder)["scores"]["accuracy"], abs=0.01)


@pytest.mark.parametrize("precision", ["bf16", "int8", "nf4"])
def test_a_packed_backbone_has_a_probe(precision: str, write: Callable[..., Path]) -> None:
    assert 0 <= result(trained(write("packed", backbone__precision=precision)))["scores"]["score"] <= 100


def test_probes_share_a_pass_with_probes_and_not_with_what_trains_in_steps(write: Callable[..., Path], tmp_path: Path) -> None:
    train(write("both", members=["method.layers=[1]", "method.layers=[1,3]"]))
    together = sorted((tmp_path / "runs").glob("both*"))
    assert len(together) == 2
    alone = trained(write("alone", method={"name": "probe", "layers": [1]}))
    (same,) = (folder for folder in together if folder.name == "both-layers-_1-kind-seed0")
    torch.testing.assert_close(load_file(same / "probe" / "probe.safetensors"), load_file(alone / "probe" / "probe.safetensors"))
    with pytest.raises(RecipeError, match="method probe goes through the rows once and others in steps: run it by itself"):
        mixed = "{name: lst, initialization: random}"
        from lst_scale.recipe.members import check_shareable, expand_members

        check_shareable(expand_members(load_recipe(str(write("mixed", members=["seed=0", f"'method={mixed}'"])))))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"optimizer": {"learning_rate": 1e-2}}, "optimizer has no effect on method probe, which goes through the rows once: remove it"),
        ({"training": {"epochs": 2}}, "training has no effect on method probe"),
        ({"evaluation": {"method": "likelihood", "score_start": True}}, "evaluation.score_start has no effect on method probe"),
        ({"evaluation__method": "generation"}, "evaluation.method: a probe chooses the likeliest label: write likelihood"),
        ({"task__kind": "text", "task__labels": None}, "task: a probe chooses among labels: write a classification"),
        ({"method": {"name": "probe", "layers": [3, 1]}}, r"\[3, 1\] must be ascending, each block once, at least one; or write all"),
        ({"method": {"name": "probe", "weight_decay": [0.0]}}, "weight_decay"),
    ],
    ids=lambda value: str(value)[:30],
)
def test_what_a_probe_has_no_use_for_is_refused(changes: dict[str, Any], message: str, write: Callable[..., Path]) -> None:
    with pytest.raises(RecipeError, match=message):
        load_recipe(str(write("no", **changes)))


def test_a_block_that_is_not_there_is_refused_before_anything_starts(write: Callable[..., Path]) -> None:
    recipe = load_recipe(str(write("no", method={"name": "probe", "layers": [9]})))
    with pytest.raises(BackboneError, match=r"method\.layers names block 9, but this backbone has blocks 0 to 3"):
        check_method(recipe)
    with pytest.raises(NotReady, match=r"method\.layers names block 9"):
        check_before_start([recipe], resume=False)


def test_a_shipped_recipe_takes_the_method_and_forgets_what_only_steps_need() -> None:
    recipe = load_recipe("smollm2-135m", ["method.name=probe"])
    assert recipe.method == ProbeRecipe(name="probe")
    assert recipe.backbone.context is not None and not recipe.evaluation.score_start
    with pytest.raises(RecipeError, match="training has no effect on method probe"):
        load_recipe("smollm2-135m", ["method.name=probe", "training.epochs=3"])


def test_a_saved_probe_fits_its_own_backbone_labels_and_files_alone(checkpoint: Callable[[str], Path], tmp_path: Path) -> None:
    backbone, recipe = LocalBackbone.load(str(checkpoint("llama")), precision="fp32"), ProbeRecipe(name="probe")
    probe = Probe(recipe, backbone, ["no", "yes"])
    states, labels = torch.randn(20, probe.width, generator=torch.Generator().manual_seed(0)), torch.arange(20) % 2
    columns = probe.columns((2,))
    ((_, fitted),) = fits(states[:, columns], labels, 2, [1e-2])
    weights = probe.widened(fitted, (2,))
    probe.save(tmp_path / "probe", weights)
    again = Probe(recipe, backbone, ["no", "yes"])
    assert all(torch.equal(tensor, weights[name]) for name, tensor in again.load(tmp_path / "probe").items())
    assert again.request == TapRequest(layers=(2,), source=False), "what answers read, and no more"
    with pytest.raises(LadderError, match="was fitted with other labels: take the run's own files"):
        Probe(recipe, backbone, ["yes", "no"]).load(tmp_path / "probe")
    other = LocalBackbone.load(str(checkpoint("qwen3")), precision="fp32")
    with pytest.raises(LadderError, match="was fitted with another backbone"):
        Probe(recipe, other, ["no", "yes"]).load(tmp_path / "probe")
    with pytest.raises(LadderError, match="holds no saved probe"):
        again.load(tmp_path)
    (tmp_path / "probe" / "probe.json").write_text("{")
    with pytest.raises(LadderError, match=r"probe.json is damaged"):
        again.load(tmp_path / "probe")


def test_the_count_and_the_comparison_know_a_probe(write: Callable[..., Path]) -> None:
    folder = trained(write("counted"))
    done = ranks.run(programs.command, "compare", folder.parent)
    assert "probe" in done.stdout, done.stderr


def test_a_plan_has_a_line_for_the_pass(write: Callable[..., Path]) -> None:
    done = ranks.run(programs.command, "plan", "--cpu", "--recipe", write("planned"))
    assert done.returncode == 0, done.stderr
    line = next(line for line in done.stdout.splitlines() if line.startswith("│ probe"))
    assert f"{8 * (2 * 64 + 1):,}" in line and "backbone forward" in line
    assert "a probe takes no step" in done.stdout and "│ LoRA" in done.stdout


def test_callbacks_are_told_what_was_chosen_and_how_each_member_ended(
    write: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(states_NF: torch.Tensor, recipe: Recipe) -> None:
        if recipe.name.endswith("3"):
            raise BackboneError("no states")

    monkeypatch.setattr("lst_scale.training.fitted._refuse_not_finite", refuse)
    members = ["method.layers=[1] name=of-1", "method.layers=[3] name=of-3"]
    with pytest.raises(MembersFailed, match="no states"):
        run(load_recipe(str(write("told", members=members, logging__callbacks=["helpers.own_callbacks:Writes"]))))
    good, bad = (tmp_path / "runs" / f"of-{block}-kind-seed0" for block in (1, 3))
    told = {folder: [json.loads(line) for line in (folder / "told.jsonl").read_text().splitlines()][1:] for folder in (good, bad)}
    (validation,) = (line for line in metrics(good) if line["kind"] == "validation")
    assert told[good] == [
        {"what": "evaluate", "step": 1, "score": validation["score"], "loss": validation["loss"]},
        {"what": "end", "score": result(good)["scores"]["score"], "error": "NoneType"},
    ]
    assert told[bad] == [{"what": "end", "score": None, "error": "BackboneError"}]


def test_states_that_are_not_finite_are_named(checkpoint: Callable[[str], Path], write: Callable[..., Path], tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(checkpoint("llama"))
    with torch.no_grad():
        model.model.layers[2].mlp.down_proj.weight[0, 0] = float("nan")
    shutil.copytree(checkpoint("llama"), tmp_path / "broken")
    model.save_pretrained(tmp_path / "broken")
    with pytest.raises(BackboneError, match="the backbone's states are not finite in row 1: look at the weights of"):
        run(load_recipe(str(write("nan", backbone__checkpoint=str(tmp_path / "broken")))))
