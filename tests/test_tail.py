"""The design of the backbone's last blocks, run again with low-rank updates: what it computes, reads, keeps, trains."""

from __future__ import annotations

import copy
import gc
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from torch import Tensor

from helpers import llama_runs, programs, ranks
from helpers.llama_runs import METHOD, trained
from helpers.llamas import FAMILIES, make_llama
from helpers.runs import assert_same_weights, final_weights, result
from helpers.targets import scored_together_and_apart
from helpers.tiny import tiny_t5
from helpers.training import train
from lst_scale import LadderConfig, LadderModel
from lst_scale.backbone import as_backbone, load_backbone
from lst_scale.backbone.families import family_of, numbers_of
from lst_scale.errors import LadderError, NotReady, RecipeError
from lst_scale.inference.predict import predict_file
from lst_scale.peft import adapter_from_side_network
from lst_scale.peft.config import LadderPeftConfig
from lst_scale.plan.footprint import WEIGHTS, Setting, footprint
from lst_scale.recipe.method import LstRecipe, TailRecipe
from lst_scale.recipe.schema import load_recipe
from lst_scale.side.count import shape_of
from lst_scale.side.designs import tail
from lst_scale.side.ensemble import LadderEnsemble
from lst_scale.side.tail_config import TailConfig
from lst_scale.training.preflight import check_before_start

tokenizer, checkpoint, write = llama_runs.tokenizer, llama_runs.checkpoint, llama_runs.write
CONFIG: dict[str, Any] = {"design": "tail", "side_layers": [1], "tail": {"rank": 2, "alpha": 4, "targets": ["q", "v", "down_proj"]}}
TAIL = {"method": {"name": "lst", "initialization": "random"} | CONFIG}


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


def test_first_predictions_are_the_model_s_own_bit_for_bit_and_a_step_moves_the_updates_alone(model: Any) -> None:
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
    assert not model.training and all(parameter.grad is None for parameter in model.parameters())


def test_it_is_lora_in_the_last_blocks(model: Any) -> None:
    """The same updates added to the matrices themselves."""
    ids, made, merged = texts(), ladder(model, trained=True), copy.deepcopy(model)
    for number, updates in made.side.stack.blocks.items():
        block = merged.model.layers[int(number)]
        for path, linear in block.named_modules():
            if (matrix := path.rpartition(".")[2]) in updates:
                linear.weight.data += updates[matrix].up @ updates[matrix].down * 2
    with torch.no_grad():
        found, expected = made(input_ids=ids).logits, merged(ids).logits
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(expected, model(ids).logits, atol=1e-2)


@pytest.mark.parametrize("options", [{"do_sample": False}, {"num_beams": 3}], ids=["greedy", "beams"])
def test_a_cache_changes_no_answer(model: Any, options: dict[str, Any]) -> None:
    """Past the window of blocks that see a few tokens alone."""
    made, ids = ladder(model, trained=True), texts()
    cached = made.generate(ids, max_new_tokens=10, **options)
    assert cached.shape[1] > ids.shape[1] + 3
    assert torch.equal(made.generate(ids, max_new_tokens=10, use_cache=False, **options), cached)


def test_left_padding_changes_nothing(model: Any) -> None:
    ids, made = texts(), ladder(model, trained=True)
    padding = torch.zeros(2, 3, dtype=torch.long)
    padded, mask = torch.cat([padding, ids], 1), torch.cat([padding, torch.ones_like(ids)], 1)
    expected = made.generate(ids, max_new_tokens=8, do_sample=False)
    assert torch.equal(made.generate(padded, attention_mask=mask, max_new_tokens=8, do_sample=False)[:, 3:], expected)


def test_what_is_saved_are_the_updates_and_their_count_is_known(model: Any, tmp_path: Path) -> None:
    made, ids = ladder(model, trained=True), texts()
    made.save_pretrained(tmp_path / "side")
    with torch.no_grad():
        assert torch.equal(LadderModel.from_pretrained(tmp_path / "side", model)(input_ids=ids).logits, made(input_ids=ids).logits)
    spec = family_of(model.config.model_type, "it").spec(model.config)
    tail_recipe = TailRecipe(**(CONFIG["tail"] | {"targets": tuple(CONFIG["tail"]["targets"])}))
    method = LstRecipe(name="lst", design="tail", side_layers=(1,), initialization="random", tail=tail_recipe)
    count = numbers_of(model.config.model_type, "it").trainable_parameters(spec, False, method)
    assert count == sum(parameter.numel() for parameter in made.parameters())
    assert all(name.startswith(("stack.blocks.2.", "stack.blocks.3.")) for name in made.side.state_dict())
    assert "updates of rank 2 and alpha 4 on q, v, down_proj in the blocks after 1." in (tmp_path / "side/README.md").read_text()


def test_the_backbone_runs_no_further_than_the_block_that_is_read_and_shares_its_weights() -> None:
    model = make_llama("llama")
    made, ran = ladder(model), list[int]()
    handles = [block.register_forward_hook(lambda *_, number=number: ran.append(number)) for number, block in enumerate(model.model.layers)]
    made(input_ids=texts())
    assert ran == [0, 1]
    for handle in handles:
        handle.remove()
    mine = {tensor.data_ptr() for tensor in made.side.held()}
    assert mine < {parameter.data_ptr() for parameter in model.parameters()} and len(mine) == 2 * 13 + 1
    other = LadderModel(made.backbone, LadderConfig(**CONFIG))
    assert {tensor.data_ptr() for tensor in other.side.held()} == mine
    before = len(tail._HELD)
    del made, other
    gc.collect()
    assert len(tail._HELD) < before, "they go with the backbone"


def test_it_answers_together_with_a_ladder() -> None:
    model, ids = make_llama("llama"), texts()
    narrow = LadderModel(model, LadderConfig(reduction_factor=8, side_layers=[1, 3], start_as_backbone=True)).side
    each = [ladder(model, trained=True).side, narrow]
    together = LadderEnsemble(model, each)
    cached = together.generate(ids, max_new_tokens=6, do_sample=False)
    assert torch.equal(together.generate(ids, max_new_tokens=6, do_sample=False, use_cache=False), cached)
    mask = torch.ones(2, 6, dtype=torch.long)
    (logits,) = LadderEnsemble(model, each[:1] * 2).logits_for_targets(ids[:, :6], mask, [ids[:, 6:]])
    (alone,) = ladder(model, trained=True).logits_for_targets(ids[:, :6], mask, [ids[:, 6:]])
    torch.testing.assert_close(logits, alone.log_softmax(-1), rtol=1e-4, atol=1e-4)


def test_it_reads_a_source_once_for_several_targets(model: Any) -> None:
    made = ladder(model, trained=True)
    lengths, together, apart = scored_together_and_apart(made, made.side.stack)
    assert lengths == [6 + 3, 5, 1]
    torch.testing.assert_close(together, apart, rtol=1e-4, atol=1e-4)


def test_recomputed_blocks_leave_the_gradient_right(model: Any) -> None:
    ids, found = texts(), []
    for recompute in (False, True):
        made = ladder(model, trained=True, recompute=recompute, dropout=0.1).train()
        torch.manual_seed(3)
        made(input_ids=ids, labels=ids).loss.backward()
        found.append({name: p.grad for name, p in made.named_parameters()})
    for name, gradient in found[0].items():
        torch.testing.assert_close(found[1][name], gradient, msg=name)


def test_half_precision_keeps_float32_updates(tmp_path: Path) -> None:
    make_llama("llama").save_pretrained(tmp_path)
    backbone = load_backbone(str(tmp_path), revision=None, precision="bf16")
    made, added = ladder(backbone).train(), LadderConfig(reduction_factor=8, side_layers=[1, 3], start_as_backbone=True)
    assert {parameter.dtype for parameter in made.parameters()} == {torch.float32}
    assert {tensor.dtype for tensor in made.side.held()} == {torch.bfloat16}
    ids = texts()
    with torch.no_grad():
        assert torch.equal(made(input_ids=ids).logits, LadderModel(backbone, added)(input_ids=ids).logits)
    made(input_ids=ids, labels=ids).loss.backward()
    assert all(bool(parameter.grad.isfinite().all()) for parameter in made.parameters() if parameter.grad is not None)


@pytest.mark.parametrize("answers", ["generation", "likelihood"])
def test_a_cache_of_one_block_trains_to_the_live_weights(answers: str, write: Callable[..., Path], tmp_path: Path) -> None:
    common = TAIL | {"data__shuffle_seed": 0, "training__epochs": 1, "evaluation__method": answers}
    live = trained(write("live", **common))
    cached: dict[str, Any] = {"cache": {"enabled": True, "dtype": "fp32", "folder": str(tmp_path / "taps")}}
    first, second = (trained(write(name, **common, **cached)) for name in ("first", "second"))
    for folder in (first, second):
        assert_same_weights(folder, final_weights(live))
        assert result(folder)["scores"] == result(live)["scores"]
    assert result(second)["cache"]["rows_run"] < result(first)["cache"]["rows_run"]
    (key,) = (tmp_path / "taps").glob("*/key.json")
    assert json.loads(key.read_text())["layers"] == [1]
    rows = tmp_path / "rows.jsonl"
    rows.write_text(json.dumps({"word": "whippet", "definition": "a small dog that runs"}) + "\n")
    predict_file([live], rows, tmp_path / "answers.jsonl")
    assert len((tmp_path / "answers.jsonl").read_text().splitlines()) == 1


def test_a_ladder_and_a_tail_train_on_one_pass_as_each_would_alone(write: Callable[..., Path], tmp_path: Path) -> None:
    """As members that have names of their own, which their folders keep."""
    common: dict[str, Any] = {"data__shuffle_seed": 0, "training__epochs": 1}
    common |= {"cache": {"enabled": True, "dtype": "fp32", "folder": str(tmp_path / "taps")}}
    ladder = trained(write("ladder-alone", **common))
    tail = trained(write("tail-alone", optimizer__learning_rate=1e-2, **TAIL, **common))
    members = ["name=ladder", f"name=tail 'method={json.dumps(TAIL['method'])}' optimizer.learning_rate=1e-2"]
    train(write("both", members=members, **common | {"cache__folder": str(tmp_path / "others")}))
    for name, alone in {"ladder": ladder, "tail": tail}.items():
        assert_same_weights(tmp_path / "runs" / f"{name}-kind-seed0", final_weights(alone))
    assert result(tmp_path / "runs/tail-kind-seed0")["cache"]["rows_run"] == result(ladder)["cache"]["rows_run"]


@pytest.mark.parametrize(
    "changes",
    [
        *({"training__deepspeed": zero} for zero in ("zero2", "zero3")),
        *({"backbone__placement": {"name": placement}} for placement in ("tensor_parallel", "zero3", "streamed")),
    ],
    ids=str,
)
def test_two_ranks_end_as_one_process_under_zero_and_beside_any_placement(changes: dict[str, Any], write: Callable[..., Path]) -> None:
    path = write("two", **TAIL, training__epochs=1, **changes)
    one = trained(write("one", **TAIL, training__epochs=1))
    done = ranks.run(programs.train, path)
    assert done.returncode == 0, done.stderr[-2000:]
    recipe = load_recipe(str(path))
    two = Path(recipe.output_dir) / recipe.run_name
    for name, tensor in final_weights(one).items():
        torch.testing.assert_close(final_weights(two)[name], tensor, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("precision", ["int8", "nf4"])
def test_beside_a_quantized_backbone_its_blocks_are_in_full_precision(precision: str, write: Callable[..., Path]) -> None:
    folder = trained(write(precision, **TAIL, training__epochs=1, backbone__precision=precision))
    assert result(folder)["scores"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"side_layers": [1, 2]}, "write side_layers as one block, such as"),
        ({"side_layers": "all"}, "write side_layers as one block, such as"),
        ({"side_layers": [3]}, "side_layers names block 3, after which there is nothing to run again"),
        ({"reduction_factor": 4}, "^reduction_factor 4 has no effect on design tail"),
        ({"start_as_backbone": True}, "^start_as_backbone True has no effect on design tail"),
        ({"tail": {"rank": 0}}, r"^tail\.rank 0 must be a whole number of at least 1"),
        ({"tail": {"targets": "q"}}, r"^tail\.targets 'q' must be a list of matrices"),
        ({"tail": {"targets": ["gate"]}}, r"^tail\.targets: blocks of this backbone have no matrix 'gate'. Did you mean 'gate_proj'"),
        ({"design": "pointwise"}, "^tail has no effect on design pointwise"),
        ({"vision": {"feature_dim": 4}}, "reads no images"),
    ],
    ids=str,
)
def test_what_does_not_fit_is_one_line(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(LadderError, match=message):
        ladder(make_llama("llama"), **changes)


def test_a_context_is_refused(write: Callable[..., Path]) -> None:
    model = make_llama("llama")
    with pytest.raises(LadderError, match=r"^design tail has no place for a context before every row"):
        LadderModel(as_backbone(model).after([5, 9]), ladder(model).side)
    with pytest.raises(RecipeError, match=r"backbone\.context is run once, and method\.design=tail"):
        load_recipe(str(write("context", **TAIL, backbone__context={"text": "Answer."})))


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("method.initialization=pruning", "design tail has no blocks to carve"),
        ("method.initialization=probe", "initialization probe has no place in design tail"),
        ("method.side_layers=[0,1]", "write side_layers as one block"),
        ("method.merge_last=true", "merge_last has no effect on design tail"),
        ("method.design=pointwise", "tail has no effect on design pointwise"),
    ],
)
def test_a_recipe_says_what_has_no_effect(override: str, message: str, write: Callable[..., Path]) -> None:
    with pytest.raises(RecipeError, match=message):
        load_recipe(str(write("wrong", **TAIL)), [override])


def test_matrices_that_are_not_there_are_named_before_anything_is_loaded(write: Callable[..., Path]) -> None:
    path = write("unknown", **{"method": TAIL["method"] | {"tail": {"targets": ["gate"]}}})
    with pytest.raises(NotReady, match=r"method\.tail\.targets: blocks of this backbone have no matrix 'gate'"):
        check_before_start([load_recipe(str(path))], resume=False)


def test_beside_an_encoder_decoder_it_is_refused() -> None:
    with pytest.raises(LadderError, match=r"^design tail stands beside a decoder-only model: beside a t5 write design transformer"):
        LadderModel(tiny_t5(), LadderConfig(**CONFIG))
    with pytest.raises(NotReady, match=r"design tail stands beside a decoder-only model: beside a t5 write method\.design=transformer"):
        method = ["method.design=tail", "method.initialization=random", "method.side_layers=[1]", "method.reduction_factor=8"]
        method += ["method.normalize_taps=false", "method.merge_last=false", "method.start_as_backbone=false"]
        check_before_start([load_recipe("quickstart", [*method, "output_dir=/tmp/nowhere"])], resume=False)


def test_peft_reads_it_as_lora(model: Any, tmp_path: Path) -> None:
    ids, made = texts(), ladder(model, trained=True)
    made.save_pretrained(tmp_path / "side")
    adapter_from_side_network(tmp_path / "side", tmp_path / "adapter")
    with torch.no_grad():
        expected = made(input_ids=ids).logits
        found = PeftModel.from_pretrained(copy.deepcopy(model), tmp_path / "adapter")
        torch.testing.assert_close(found(ids).logits, expected, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(found.merge_and_unload()(ids).logits, expected, rtol=1e-4, atol=1e-4)


def test_it_is_no_ladder_among_peft_s_adapters() -> None:
    with pytest.raises(LadderError, match=r"^a side network of design tail is no ladder among adapters, but LoRA"):
        LadderPeftConfig.of(LadderConfig(**CONFIG))
    with pytest.raises(LadderError, match=r"^design tail is LoRA among adapters: write peft's LoraConfig with layers_to_transform"):
        LadderPeftConfig(design="tail", side_layers=[1])
    assert TailConfig(targets=["q"]).targets == ("q",)


@pytest.mark.parametrize(
    ("precision", "on_gpu", "bytes_each"), [("fp32", False, 0), ("fp32", True, 4), ("bf16", False, 2), ("nf4", False, 2)]
)
def test_the_plan_counts_what_is_run_again(precision: str, on_gpu: bool, bytes_each: int, write: Callable[..., Path]) -> None:
    """Two of four blocks: shared in float32 on a CPU, and held in full elsewhere, or beside fewer bits; a ladder holds nothing."""
    weights = {}
    for name, method in (("tail", TAIL["method"]), ("ladder", METHOD)):
        recipe = load_recipe(str(write(name, method=method, backbone__precision=precision)))
        shape = shape_of(recipe.backbone.checkpoint)
        assert shape is not None
        weights[name] = footprint(recipe, shape, Setting(rows=2, source=16, target=4, on_gpu=on_gpu)).parts[WEIGHTS]
    block = 2 * 64 * (64 + 32) + 3 * 64 * 96 + 2 * 64 + 2 * 64 + 2 * 32  # with attention's biases
    assert weights["tail"] - weights["ladder"] == bytes_each * (2 * block + 64)


@pytest.mark.slow
def test_a_real_step_needs_what_was_planned(write: Callable[..., Path]) -> None:
    path = write("planned", **TAIL)
    for rows in ("2", "16"):
        done = ranks.run(programs.script, "benchmarks/planned.py", "--one", path, rows)
        assert done.returncode == 0, done.stderr[-2000:]
        found = json.loads(next(line for line in done.stdout.splitlines() if line.startswith("{")))
        assert found["planned"] == pytest.approx(found["measured"], rel=0.05), found
