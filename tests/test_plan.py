"""The planner says what a step will need, from shapes alone: compared with torch's own account of real steps."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from functools import cache
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from helpers import programs, ranks
from helpers.llamas import FAMILIES, make_llama
from helpers.paths import ROOT
from helpers.ranks import Finished
from helpers.t5gemmas import make_t5gemma
from lst_scale.backbone import load_backbone
from lst_scale.backbone.placement.load import load_placed
from lst_scale.backbone.weights.precision import quantized_linear, sized_quantized_linear
from lst_scale.errors import ArgumentError
from lst_scale.methods import build_trainee
from lst_scale.plan import depth, fake, memo, picture, report
from lst_scale.plan.footprint import OPTIMIZER, TAPS, TRAINED, WEIGHTS, Footprint, Setting, footprint, packed_otherwise
from lst_scale.plan.live import LiveBytes
from lst_scale.recipe.method import LoraRecipe
from lst_scale.recipe.schema import Recipe, load_recipe
from lst_scale.side.count import shape_of, trainable_parameters
from lst_scale.system import distributed

SMALL = Setting(rows=4, source=32, target=8, on_gpu=False)


@cache
def planned(recipe: Recipe, setting: Setting = SMALL) -> Footprint:
    """Return a step's footprint, run once for all tests."""
    return stepped(recipe, setting)


def stepped(recipe: Recipe, setting: Setting) -> Footprint:
    shape = shape_of(recipe.backbone.checkpoint)
    assert shape is not None
    return footprint(recipe, shape, setting)


def plan(*arguments: str) -> Finished:
    return ranks.run(programs.command, "plan", *arguments)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("overrides", "batches"),
    [
        (["training.deepspeed=zero0"], (2, 32)),
        (["training.deepspeed=zero2", "backbone.precision=int8"], (2, 32)),
        (["training.deepspeed=zero3", "backbone.precision=nf4", "method.tap_storage=int8"], (2, 32)),
        (["method={name: lora, rank: 4, gradient_checkpointing: true}"], (2, 32)),
        (["method={name: full}"], (2, 32)),
    ],
    ids=str,
)
def test_a_real_step_needs_what_was_planned(overrides: list[str], batches: tuple[int, int]) -> None:
    for rows in batches:
        own = ["--set", "backbone.precision=fp32", *overrides]
        done = ranks.run(programs.script, "benchmarks/planned.py", "--one", "quickstart", str(rows), *own)
        assert done.returncode == 0, done.stderr[-2000:]
        found = json.loads(next(line for line in done.stdout.splitlines() if line.startswith("{")))
        assert found["planned"] == pytest.approx(found["measured"], rel=0.05), found


def test_a_storage_counts_once_and_until_its_end() -> None:
    weight = torch.ones(100)
    with LiveBytes() as live:
        live.see(weight)
        live.forget()
        live.enter_phase("first")
        doubled = weight * 2
        view = doubled[:10]
        assert live.now == 400
        live.enter_phase("second", survivors="kept")
        del doubled
        tripled = weight.reshape(10, 10) * 3
        assert live.now == 800 and live.alive("kept") == 400
        del view
        assert live.now == 400
        del tripled
    assert live.now == 0 and live.at_peak("second") == {"kept": 400, "second": 400}


@pytest.mark.parametrize("precision", ["int8", "nf4"])
def test_layers_without_contents_have_the_sizes_of_real_ones(precision: str) -> None:
    real = quantized_linear(torch.randn(96, 160, dtype=torch.bfloat16), precision)
    sized = sized_quantized_linear(nn.Linear(160, 96, bias=False), precision)
    assert {n: (t.numel(), t.dtype) for n, t in sized.named_buffers()} == {n: (t.numel(), t.dtype) for n, t in real.named_buffers()}


@pytest.mark.parametrize("placement", [{"name": "replicated"}, {"name": "streamed"}])
@pytest.mark.parametrize("precision", ["fp32", "int8"])
def test_planned_backbone_weights_are_those_that_loading_reports(placement: dict[str, Any], precision: str) -> None:
    text = json.dumps(placement)
    recipe = load_recipe("quickstart", [f"backbone.placement={text}", f"backbone.precision={precision}"])
    loaded = load_placed(recipe.backbone, distributed.connect()).weight_bytes()
    assert planned(recipe).parts[WEIGHTS] == pytest.approx(loaded, rel=1e-3)  # streamed tensors start at rounded addresses


def test_each_rank_of_a_group_holds_its_share() -> None:
    whole = planned(load_recipe("t5-base"))
    halved = planned(load_recipe("t5-base", ["backbone.placement=tensor_parallel"]), replace(SMALL, world_size=2))
    third = planned(load_recipe("t5-base", ["backbone.placement=zero3"]), replace(SMALL, world_size=3))
    ends = 32128 * 768 * 4
    assert halved.parts[WEIGHTS] - ends == pytest.approx((whole.parts[WEIGHTS] - ends) / 2, rel=0.01)
    assert third.parts[WEIGHTS] < 0.6 * whole.parts[WEIGHTS]
    assert halved.trainable == third.trainable == whole.trainable, "the side network is the same beside every placement"


def test_taps_from_disk_need_no_backbone() -> None:
    recipe = load_recipe("t5-base", ["cache.enabled=true"])
    shape = shape_of(recipe.backbone.checkpoint)
    assert shape is not None
    live, cached = islice(report.lines(recipe, shape, SMALL), 2)
    assert cached.found.parts[WEIGHTS] == (32128 + 2) * 768 * 4 < 0.2 * live.found.parts[WEIGHTS]
    assert cached.found.parts[TAPS] == live.found.parts[TAPS]


def test_a_cache_holds_what_any_member_reads() -> None:
    alone, whole = (load_recipe("t5-base", [f"method.side_layers={layers}"]) for layers in ("[11]", "all"))
    both = load_recipe("t5-base", ["method.side_layers=[11]", "members={method.side_layers: [[11], all]}"])
    shape = shape_of(whole.backbone.checkpoint)
    assert shape is not None
    sizes = [report.cache_bytes(recipe, shape, SMALL)[1] for recipe in (alone, whole, both)]
    assert sizes[0] < sizes[1] == sizes[2]


def test_members_keep_their_own_weights_and_share_the_taps() -> None:
    one = load_recipe("quickstart")
    four = load_recipe("quickstart", ["data.shuffle_seed=0", 'members=["seed=0", "seed=1", "seed=2", "seed=3"]'])
    shape = shape_of(one.backbone.checkpoint)
    assert shape is not None
    alone, together = (next(iter(report.lines(recipe, shape, SMALL))).found for recipe in (one, four))
    assert together.parts[TRAINED] == 4 * alone.parts[TRAINED] and together.trainable == 4 * alone.trainable
    assert together.parts[TAPS] == alone.parts[TAPS]


def first_line(recipe: Recipe) -> Footprint:
    shape = shape_of(recipe.backbone.checkpoint)
    assert shape is not None
    return next(iter(report.lines(recipe, shape, SMALL))).found


@pytest.mark.parametrize("storage", ["exact", "int8"])
def test_members_that_read_other_layers_hold_the_taps_of_both(storage: str) -> None:
    own = ["data.shuffle_seed=0", f"method.tap_storage={storage}"]
    read = [f"method.side_layers={layers}" for layers in ("[3]", "[11]", "[3, 11]")]
    low, high, whole = (first_line(load_recipe("t5-base", [*own, layers])) for layers in read)
    both = first_line(load_recipe("t5-base", [*own, "members={method.side_layers: [[3], [11]]}"]))
    assert low.parts[TAPS] < both.parts[TAPS] == whole.parts[TAPS]
    assert both.trainable == low.trainable + high.trainable
    assert both.parts[TRAINED] == low.parts[TRAINED] + high.parts[TRAINED]


def test_members_of_other_sizes_keep_each_its_own() -> None:
    small, large = (first_line(load_recipe("t5-base", [f"method.reduction_factor={factor}"])) for factor in (16, 4))
    lines = ["method.reduction_factor=16", "method.reduction_factor=4", "method.reduction_factor=16 optimizer.learning_rate=1e-5"]
    three = first_line(load_recipe("t5-base", [f"members={json.dumps(lines)}"]))
    assert three.trainable == 2 * small.trainable + large.trainable
    assert three.peak == large.peak + 2 * sum(small.parts[part] for part in (TRAINED, OPTIMIZER))


def test_probes_that_share_a_pass_are_planned(tmp_path: Path) -> None:
    (tmp_path / "probes.yaml").write_text("""
        name: probes
        backbone: {checkpoint: google-t5/t5-base}
        task: {kind: classification, train: t.jsonl, validation: v.jsonl, source: [text], target: label, labels: [bad, good]}
        method: {name: probe}
        evaluation: {method: likelihood}
        members: [method.position=answer, method.position=source]
    """)
    found = first_line(load_recipe(str(tmp_path / "probes.yaml")))
    assert found.trainable == 2 * 2 * (12 * 768 + 1)
    assert found.parts[TAPS] > 0


def test_the_largest_micro_batch_fits_and_one_row_more_does_not() -> None:
    recipe = load_recipe("quickstart")

    def peak(setting: Setting) -> Footprint:
        return planned(recipe, setting)

    memory = 2 * peak(SMALL).peak
    rows = report.largest_rows(peak, SMALL, memory, None)
    assert peak(replace(SMALL, rows=rows)).peak <= memory < peak(replace(SMALL, rows=rows + 1)).peak
    assert report.largest_rows(peak, SMALL, 1000, None) == 0


def test_planning_leaves_torch_as_it_was() -> None:
    before = nn.functional.scaled_dot_product_attention, nn.Module.to, torch.get_default_dtype()
    stepped(load_recipe("quickstart", ["method={name: lora}"]), replace(SMALL, on_gpu=True))
    assert (nn.functional.scaled_dot_product_attention, nn.Module.to, torch.get_default_dtype()) == before
    assert nn.Linear(2, 2).to(torch.bfloat16).weight.dtype == torch.bfloat16


@pytest.mark.parametrize(
    "overrides",
    [
        ["method.recompute=true", "method.tap_storage=int8"],
        ["method={name: lora, precision: bf16, gradient_checkpointing: true}", "backbone.precision=bf16"],
        ["method={name: full}"],
    ],
    ids=str,
)
def test_operations_that_are_remembered_give_what_torch_gives(overrides: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    recipe, setting = load_recipe("quickstart", overrides), replace(SMALL, on_gpu=True)
    stepped(recipe, setting)
    remembered = stepped(recipe, setting)
    monkeypatch.setattr(memo, "run", lambda func, args, kwargs: func(*args, **kwargs))
    assert stepped(recipe, setting) == remembered


@pytest.mark.slow
def test_the_command_answers_with_a_table_a_picture_and_the_cache(tmp_path: Path) -> None:
    done = plan("--recipe", "quickstart", "--gpu-memory", "16GB", "--plot", str(tmp_path / "plan.png"))
    assert done.returncode == 0, done.stderr
    for name in ("lst", "LoRA, fp32", "LoRA, fp32, checkpointed", "LoRA, int8", "QLoRA, nf4, checkpointed", "full"):
        assert re.search(rf"│ {name} +│ [\d,]+ .*│ yes +│ \d+ +│", done.stdout), (name, done.stdout)
    assert "4,800 training rows" in done.stdout and (tmp_path / "plan.png").read_bytes()[1:4] == b"PNG"


@pytest.mark.slow
@pytest.mark.parametrize(
    "name", ["qwen3-8b", "qwen3-8b-nf4", "llama-3.1-8b", "gemma-3-12b", "qwen3-32b-streamed", "llama-3.3-70b-nf4", "t5gemma-2-1b"]
)
def test_recipes_of_language_models_say_what_was_planned(name: str) -> None:
    quantized_linear(torch.ones(64, 64), "nf4")  # here, not in the step: what it warns of at first keeps frames
    header = re.sub(r"\s*\n# ", " ", (ROOT / "recipes" / f"{name}.yaml").read_text())
    said = re.search(r"([\d.]+) GB of tensors at the peak(?: on each)?, ([\d.]+) of them", header)
    recipe = load_recipe(name)
    ranks_of_it = 2 if "70b" in name else 1
    found = stepped(recipe, report.setting_of(recipe, world_size=ranks_of_it, on_gpu=True, target=None))
    assert said is not None
    assert (found.peak / 1e9, found.parts[WEIGHTS] / 1e9) == pytest.approx((float(said[1]), float(said[2])), abs=0.06)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--recipe", "quickstart", "--gpu-memory", "much"], "error: 'much' is no size of memory: write for example 16GB or 80GiB"),
        (["--recipe", "quickstart", "--plot", "plan.doc"], "error: --plot plan.doc: write a file that ends in .png or .svg"),
        (["--recipe", "t5-base", "backbone.checkpoint=owner/unknown"], "error: the shape of owner/unknown is unknown here"),
        (["--recipe", "t5-base", "method.reduction_factor=5"], "error: reduction_factor 5 must divide d_model 768"),
    ],
)
def test_mistakes_are_told_in_one_line(arguments: list[str], message: str) -> None:
    done = plan(*arguments)
    assert done.returncode == 1 and done.stderr.strip().splitlines()[-1].startswith(message), done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("overrides", "packed"),
    [
        (["method={name: lst, reduction_factor: 8, side_layers: [4]}"], None),
        (["method={name: lora, gradient_checkpointing: true}"], "nf4"),
        (["method={name: full}"], None),
    ],
    ids=str,
)
def test_shallow_steps_give_a_deep_one_exactly(overrides: list[str], packed: str | None) -> None:
    recipe = load_recipe("t5-base", overrides)
    shape = shape_of(recipe.backbone.checkpoint)
    assert shape is not None
    numbers: Any = {"num_layers": 5, "num_decoder_layers": 5}
    shape = replace(shape, spec=replace(shape.spec, **numbers))
    setting = replace(SMALL, on_gpu=True, packed=packed)
    assert depth.planned(recipe, shape, setting) == footprint(recipe, shape, setting)


@pytest.mark.parametrize("backbone", ["fp32", "bf16"])
@pytest.mark.parametrize(
    "method",
    [
        "{name: lora}",
        "{name: lora, bitfit: true, targets: [q, wo]}",
        "{name: lora, rank: 4, dropout: 0.0, precision: bf16, gradient_checkpointing: true}",
    ],
)
def test_lora_is_planned_as_peft_runs_it(method: str, backbone: str, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = load_recipe("quickstart", [f"method={method}", f"backbone.precision={backbone}"])
    ours = planned(recipe, replace(SMALL, on_gpu=True))

    def theirs(method: LoraRecipe, on: Any) -> Any:
        with fake.unmoved():
            return build_trainee(recipe, on, zero_stage=0)

    monkeypatch.setattr(fake, "sized_lora", theirs)
    assert stepped(recipe, replace(SMALL, on_gpu=True)) == ours


@pytest.mark.parametrize("again", ["true", "false"])
def test_a_step_on_one_packing_tells_that_on_another_exactly(again: str) -> None:
    recipe = load_recipe("quickstart", [f"method={{name: lora, gradient_checkpointing: {again}}}", "backbone.precision=bf16"])
    shape = shape_of(recipe.backbone.checkpoint)
    assert shape is not None
    setting = replace(SMALL, packed="nf4")
    found = packed_otherwise(planned(recipe, replace(SMALL, packed="int8")), recipe, shape, before="int8", after="nf4")
    assert found == planned(recipe, setting)


def test_a_packed_backbone_takes_its_bits_and_keeps_nothing_more_for_the_backward_pass() -> None:
    recipe = load_recipe("quickstart", ["method={name: lora, precision: bf16}", "backbone.precision=bf16"])
    whole, int8, nf4 = (planned(recipe, replace(SMALL, packed=packed)) for packed in (None, "int8", "nf4"))
    assert whole.kept == int8.kept == nf4.kept and whole.trainable == int8.trainable == nf4.trainable
    assert nf4.parts[WEIGHTS] < int8.parts[WEIGHTS] < whole.parts[WEIGHTS]


@pytest.mark.parametrize(
    "changes",
    [
        {"data": {"max_source_length": 10**12}},
        {"data": {"max_target_length": 10**18}},
        {"training": {"global_batch_size": 10**30, "micro_batch_size": None}},
    ],
    ids=str,
)
def test_a_step_that_fits_nowhere_is_refused_before_it_is_planned(changes: dict[str, dict[str, Any]]) -> None:
    recipe = load_recipe("quickstart")
    for section, values in changes.items():
        recipe = recipe.model_copy(update={section: getattr(recipe, section).model_copy(update=values)})
    with pytest.raises(ArgumentError, match=r"can't be planned: write a smaller"):
        report.setting_of(recipe, world_size=1, on_gpu=True, target=None)
    with pytest.raises(ArgumentError, match=r"can't be planned: write a smaller --target"):
        report.setting_of(load_recipe("quickstart"), world_size=1, on_gpu=True, target=10**6)


def test_the_picture_names_the_memory_by_its_option_and_shows_only_what_is_there(tmp_path: Path) -> None:
    moments = {"backward": {WEIGHTS: 10**9, TAPS: 5 * 10**8}}
    found = Footprint(parts=moments["backward"], where="backward", kept=0, trainable=1, moments=moments)
    line = report.Line(name="lst", found=found)
    picture.draw([line], tmp_path / "plan.svg", title="t5 on t5, 4 rows", memory=2 * 10**9, option="2 GB")
    shapes = (tmp_path / "plan.svg").read_text()
    assert all(f"<!-- {text} -->" in shapes for text in ("- -gpu-memory 2 GB", WEIGHTS, TAPS, "t5 on t5, 4 rows"))
    assert "<!-- gradients -->" not in shapes


def test_sizes_of_memory_are_read_with_their_units() -> None:
    assert [report.parse_memory(text) for text in ("16GB", "1.5GiB", "500mb")] == [16 * 10**9, 3 * 2**29, 500 * 10**6]
    for wrong in ("16", "GB", "-1GB", "0GB", "infGB", "nanGB", "1e400GB", "1e300GB", "0.0000000001MB"):
        with pytest.raises(ArgumentError):
            report.parse_memory(wrong)


@pytest.mark.parametrize("precision", ["fp32", "int8"])
@pytest.mark.parametrize("model_type", [*FAMILIES, "t5gemma2"])
def test_a_plan_of_every_family_knows_its_weights_and_what_trains(model_type: str, precision: str, tmp_path: Path) -> None:
    (make_t5gemma() if model_type == "t5gemma2" else make_llama(model_type)).save_pretrained(tmp_path)
    method = ["method.side_layers=[1,3]", "method.initialization=random", "method.start_as_backbone=true", "method.merge_last=true"]
    recipe = load_recipe("quickstart", [f"backbone.checkpoint={tmp_path}", f"backbone.precision={precision}", *method])
    shape, backbone = shape_of(str(tmp_path)), load_backbone(str(tmp_path), revision=None, precision=precision)
    assert shape is not None
    few, many = (footprint(recipe, shape, Setting(rows=rows, source=12, target=4, on_gpu=False)) for rows in (2, 8))
    assert few.parts[WEIGHTS] == many.parts[WEIGHTS]
    assert few.parts[WEIGHTS] == pytest.approx(backbone.weight_bytes(), abs=2)  # a Gemma's one scale of its embedding may be in 16 bits
    assert few.trainable == trainable_parameters(shape, recipe.method) and few.peak < many.peak
