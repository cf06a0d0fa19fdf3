"""Adapters, BitFit and prompt tuning inside language models of one stack of every kind, and inside a T5Gemma 2."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from helpers import llama_runs, programs, ranks
from helpers.llama_runs import trained
from helpers.llamas import FAMILIES, make_llama
from helpers.paths import EMBEDDED
from helpers.runs import final_weights, losses, result
from helpers.t5gemmas import make_t5gemma
from helpers.training import train
from lst_scale.backbone.placement.replicated import LocalBackbone
from lst_scale.data.batches import Batch
from lst_scale.errors import NotReady
from lst_scale.inference.predict import predict_file
from lst_scale.methods import build_trainee
from lst_scale.methods.base import Trainee, divided, trained_parameters
from lst_scale.recipe.schema import Recipe, load_recipe
from lst_scale.side.count import shape_of, trainable_parameters
from lst_scale.training.preflight import check_before_start

tokenizer, checkpoint, write = llama_runs.tokenizer, llama_runs.checkpoint, llama_runs.write
KINDS = [*FAMILIES, "t5gemma2"]
COUNT = 5  # trained vectors
METHODS: dict[str, dict[str, Any]] = {
    "adapters": {"name": "adapters", "bottleneck": 8},
    "bitfit": {"name": "bitfit"},
    "lora-bitfit": {"name": "lora", "rank": 2, "dropout": 0.0, "bitfit": True},
    "prompt": {"name": "prompt", "num_vectors": COUNT},
}
LABELS = torch.tensor([[5, 6, 1], [7, 1, -100], [8, 9, 1]])
LENGTHS = (7, 4, 2)


@pytest.fixture(scope="module", params=KINDS)
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return saved(request.param, tmp_path_factory.mktemp("inside"))


def saved(kind: str, where: Path) -> Path:
    (make_t5gemma() if kind == "t5gemma2" else make_llama(kind)).save_pretrained(where / kind)
    return where / kind


def recipe_of(name: str, folder: Path, precision: str = "fp32") -> Recipe:
    task = {"kind": "text", "train": "x", "validation": "x", "source": ("a",), "target": "b"}
    backbone = {"checkpoint": str(folder), "precision": precision}
    return Recipe.model_validate({"name": "m", "task": task, "backbone": backbone, "method": METHODS[name]})


def trainee_of(name: str, folder: Path, precision: str = "fp32", *, moved: bool = False) -> Trainee:
    """Return a method in eval mode; `moved` from where it starts."""
    made = build_trainee(recipe_of(name, folder, precision), LocalBackbone.load(str(folder), precision=precision), zero_stage=0)
    made.module.eval()
    if moved:
        torch.manual_seed(1)
        for parameter in trained_parameters(made.module).values():
            parameter.data.add_(0.2 * torch.randn_like(parameter))
    return made


def batch(*rows: int) -> Batch:
    """Return some of three rows, padded after their last token; none: all."""
    chosen = list(rows or range(3))
    longest = max(LENGTHS[row] for row in chosen)
    ids = torch.randint(3, 90, (3, 7), generator=torch.Generator().manual_seed(0))
    mask = (torch.arange(7)[None] < torch.tensor(LENGTHS)[:, None]).long()
    return Batch(
        input_ids_BS=(ids * mask)[chosen, :longest],
        attention_mask_BS=mask[chosen, :longest],
        labels_BT=LABELS[chosen],
        indices=tuple(chosen),
    )


@pytest.mark.parametrize("name", METHODS)
def test_what_is_added_trains_and_is_counted_and_biases_change_nothing_at_first(name: str, folder: Path) -> None:
    made, shape = trainee_of(name, folder), shape_of(str(folder))
    nll = made.nll(made.module, batch(), None)
    if "bitfit" in name:
        plain = LocalBackbone.load(str(folder), precision="fp32")
        logits = plain.family.whole_logits(plain.give_model(), *divided(batch(), LABELS, plain.spec))[0]
        expected = torch.nn.functional.cross_entropy(logits.flatten(0, 1), LABELS.flatten(), ignore_index=-100, reduction="sum")
        torch.testing.assert_close(nll, expected, rtol=1e-5, atol=1e-4)
    nll.backward()
    parameters = trained_parameters(made.module)
    silent = [n for n, p in parameters.items() if (p.grad is None or not p.grad.abs().sum()) and "lora_A" not in n]  # B is zero at first
    assert not silent, silent
    assert shape is not None
    assert trainable_parameters(shape, recipe_of(name, folder).method) == sum(p.numel() for p in parameters.values())


@pytest.mark.parametrize("kind", ["llama", "gemma2", "t5gemma2"])
@pytest.mark.parametrize("name", METHODS)
def test_beside_weights_in_bf16_what_trains_stays_float32_and_says_nearly_the_same(name: str, kind: str, tmp_path: Path) -> None:
    path, found = saved(kind, tmp_path), []
    for precision in ("fp32", "bf16"):
        made = trainee_of(name, path, precision)
        found.append(made.nll(made.module, batch(), None))
        found[-1].backward()
    torch.testing.assert_close(found[1], found[0], rtol=0.01, atol=0)  # three digits of bf16


def test_vectors_stand_before_the_text_as_in_plain_peft_and_padding_changes_nothing(folder: Path) -> None:
    """In windows that see a few tokens alone padding counts, as in transformers; but what stands on the left does not."""
    made = trainee_of("prompt", folder, moved=True)
    spec = made.backbone.spec  # type: ignore[attr-defined]
    (vectors,) = trained_parameters(made.module).values()
    with torch.no_grad():
        alone = [made.nll(made.module, batch(row), None) for row in range(3)]
        if not spec.one_stack:
            torch.testing.assert_close(made.nll(made.module, batch(), None), sum(alone), rtol=1e-5, atol=1e-4)
            return
        plain = AutoModelForCausalLM.from_pretrained(folder).eval()
        text = torch.cat([batch(0).input_ids_BS, LABELS[:1]], 1)
        embedded = torch.cat([vectors[None], plain.get_input_embeddings()(text)], 1)
        ignored = torch.full((1, COUNT + LENGTHS[0]), -100)
        expected = plain(inputs_embeds=embedded, labels=torch.cat([ignored, LABELS[:1]], 1)).loss * 3
        torch.testing.assert_close(alone[0], expected, rtol=1e-5, atol=1e-4)
        if not getattr(plain.config, "sliding_window", None):
            torch.testing.assert_close(made.nll(made.module, batch(), None), sum(alone), rtol=1e-5, atol=1e-4)


def test_answers_are_the_likeliest_next_tokens_whatever_stands_beside_a_row(folder: Path) -> None:
    made, options = trainee_of("prompt", folder, moved=True), {"max_new_tokens": 6, "do_sample": False}
    family, spec = made.backbone.family, made.backbone.spec  # type: ignore[attr-defined]
    with made.evaluating(trained_parameters(made.module)) as model:
        together = family.answers(model.generate, *given(batch()), **options)
        for row in range(3):
            alone = family.answers(model.generate, *given(batch(row)), **options)
            assert torch.equal(alone[0], together[row, : alone.shape[1]])
            said = alone if spec.one_stack else alone[:, 1:]  # after the token that begins an answer
            source, mask, target = divided(batch(row), said, spec)
            assert torch.equal(model.scoring(source, mask).logits(target).argmax(-1), said)
        beams = family.answers(model.generate, *given(batch(0)), **options, num_beams=3, num_return_sequences=2)
        assert len(beams) == 2 and not torch.equal(beams[0], beams[1])


@pytest.mark.parametrize("name", ["lora-bitfit", "prompt"])
def test_what_all_rows_begin_with_is_run_once_and_changes_nothing(name: str, folder: Path) -> None:
    made = trainee_of(name, folder, moved=True)
    family, spec = made.backbone.family, made.backbone.spec  # type: ignore[attr-defined]
    rows = batch()
    before_BC = torch.randint(3, 90, (1, 9), generator=torch.Generator().manual_seed(1)).expand(3, -1)
    ids_BS = torch.cat([before_BC, rows.input_ids_BS], 1)
    mask_BS = torch.cat([torch.ones_like(before_BC), rows.attention_mask_BS], 1)
    source_BS, source_mask_BS, target_BT = family.divide(spec, ids_BS, mask_BS, LABELS)
    tokens = list[int]()
    embedding = made.module.get_input_embeddings()  # type: ignore[operator]
    with made.evaluating(trained_parameters(made.module)) as model:
        whole = family.whole_logits(model.run, source_BS, source_mask_BS, target_BT)[0]
        counting = embedding.register_forward_pre_hook(lambda _, given: tokens.append(given[0].numel()))
        scoring = model.scoring(source_BS, source_mask_BS)
        for last in (False, True):
            torch.testing.assert_close(scoring.logits(target_BT, last=last), whole, rtol=1e-4, atol=1e-4)  # of logits up to tens
        counting.remove()
    if spec.one_stack:
        answers = target_BT.numel()
        assert tokens == [9, source_BS.numel() - 3 * 9 + answers, answers]


def given(rows: Batch) -> tuple[Tensor, Tensor]:
    return rows.input_ids_BS, rows.attention_mask_BS


@pytest.mark.filterwarnings("ignore:Position ids are not supported")  # of peft, which counts them anew
@pytest.mark.parametrize("kind", ["llama", "t5gemma2"])
def test_trained_vectors_load_in_plain_peft_and_come_back(kind: str, tmp_path: Path) -> None:
    from peft import PeftModel

    path = saved(kind, tmp_path)
    made = trainee_of("prompt", path, moved=True)
    weights = {name: p.detach().clone() for name, p in trained_parameters(made.module).items()}
    made.save(tmp_path / "saved", weights)
    whole = make_t5gemma() if kind == "t5gemma2" else make_llama(kind)
    theirs = PeftModel.from_pretrained(whole, tmp_path / "saved").eval()
    ids, mask = given(batch(0))
    with made.evaluating(weights) as model:
        mine = model.generate(ids, mask, max_new_tokens=6)
    if kind == "llama":  # peft's own generation answers otherwise with transformers 5.24: one pass over the answer
        logits_1TV = theirs(input_ids=mine[:, :-1], attention_mask=torch.ones_like(mine[:, :-1])).logits
        assert torch.equal(logits_1TV.argmax(-1)[:, -6:], mine[:, -6:])
    else:
        assert torch.equal(theirs.generate(input_ids=ids, attention_mask=mask, max_new_tokens=6), mine)
    theirs.save_pretrained(tmp_path / "again")
    found = trainee_of("prompt", path).load(tmp_path / "again")
    assert all(torch.equal(found[name], tensor) for name, tensor in weights.items())


# Recipes


@pytest.mark.parametrize("kind", ["llama", "t5gemma2"])
@pytest.mark.parametrize(("name", "answers"), [("adapters", "likelihood"), ("bitfit", "likelihood"), ("prompt", "generation")])
def test_a_finished_run_answers_a_file_as_it_was_scored(
    name: str, answers: str, kind: str, write: Callable[..., Path], tmp_path: Path
) -> None:
    path = write("scored", kind, method=METHODS[name], evaluation__method=answers, optimizer__learning_rate=1e-2)
    folder = trained(path)
    found, weights, shape = result(folder), final_weights(folder), shape_of(load_recipe(str(path)).backbone.checkpoint)
    assert shape is not None
    count = trainable_parameters(shape, load_recipe(str(path)).method)
    assert found["trainable_parameters"] == sum(w.numel() for w in weights.values()) == count
    assert found["saved_bytes"] < 4 * found["trainable_parameters"] + 60_000
    rows = [json.loads(line) for line in (EMBEDDED / "wordnet/validation.jsonl").read_text().splitlines()[:7]]
    (tmp_path / "in.jsonl").write_text("".join(json.dumps({k: row[k] for k in ("word", "definition")}) + "\n" for row in rows))
    assert predict_file([folder], tmp_path / "in.jsonl", tmp_path / "out.jsonl") == 7
    said = [json.loads(line)["prediction"] for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    right = 100 * sum(answer == row["kind"] for answer, row in zip(said, rows, strict=True)) / 7
    assert right == pytest.approx(found["scores"]["accuracy"], abs=0.01)


@pytest.mark.slow
@pytest.mark.parametrize("stage", ["zero2", "zero3"])
def test_trained_vectors_on_two_processes_under_zero_end_as_on_one(stage: str, write: Callable[..., Path], tmp_path: Path) -> None:
    common: dict[str, Any] = {"method": METHODS["prompt"], "training__max_steps": 4, "training__micro_batch_size": 1}
    one = trained(write("one", **common))
    train(write("two", training__deepspeed=stage, **common), processes=2)
    two = next((tmp_path / "runs").glob("two*"))
    torch.testing.assert_close(torch.tensor(losses(two)), torch.tensor(losses(one)), rtol=1e-4, atol=1e-5)
    for name, weight in final_weights(two).items():
        torch.testing.assert_close(weight, final_weights(one)[name], rtol=1e-3, atol=2e-4)  # as in test_training.py


@pytest.mark.parametrize("kind", ["llama", "t5gemma2"])
def test_a_plan_counts_them(kind: str, write: Callable[..., Path]) -> None:
    done = ranks.run(programs.command, "plan", "--cpu", "--recipe", write("planned", kind, method=METHODS["prompt"]))
    assert done.returncode == 0, done.stderr
    (line,) = [line for line in done.stdout.splitlines() if "prompt " in line]
    assert f" {COUNT * 64} " in line and "LoRA" in done.stdout


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("llama", "blocks of a decoder-only model have one attention: remove method.cross_attention"),
        ("t5gemma2", "a T5Gemma 2 attends to the source in its decoder's one attention: remove method.cross_attention"),
    ],
)
def test_an_adapter_after_an_attention_that_is_not_there_is_refused(kind: str, message: str, write: Callable[..., Path]) -> None:
    path = write("no", kind, method=METHODS["adapters"] | {"cross_attention": True})
    with pytest.raises(NotReady, match=f"^{message}$"):
        check_before_start([load_recipe(str(path))], resume=False)
