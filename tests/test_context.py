"""A context before every row: run once beside a decoder-only model, a beginning of each row elsewhere; drawn, remembered, scored after."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from helpers import llama_runs
from helpers.llama_runs import trained
from helpers.llamas import FAMILIES, make_llama
from helpers.models import make_t5
from helpers.paths import EMBEDDED
from helpers.recipes import recipe_writer
from helpers.runs import assert_same_weights, final_weights, result
from helpers.training import train
from lst_scale import LadderConfig, LadderEnsemble, LadderModel
from lst_scale.backbone import as_backbone
from lst_scale.backbone.cache.backbone import CachingBackbone
from lst_scale.backbone.families.llama.family import FAMILY
from lst_scale.backbone.taps import TapRequest
from lst_scale.data.batches import evaluation_batches
from lst_scale.data.context import drawn, reading_after
from lst_scale.data.encode import encode_sources
from lst_scale.data.rows import Row
from lst_scale.data.tokenizer import load_tokenizer
from lst_scale.errors import ArgumentError, BackboneError, LadderError, LstScaleError, RecipeError
from lst_scale.inference.predict import predict_file
from lst_scale.inputs.batch import Inputs
from lst_scale.recipe.schema import load_recipe
from lst_scale.runs.logs import Logger
from lst_scale.system import distributed
from lst_scale.training.shared import load_data, load_shared

tokenizer, checkpoint, write = llama_runs.tokenizer, llama_runs.checkpoint, llama_runs.write
CONTEXT = (5, 17, 40, 8, 61, 33, 90, 12)  # longer than the windows of blocks that see a few tokens alone
LADDER = {"reduction_factor": 8, "side_layers": [1, 3], "start_as_backbone": True}
EXAMPLES = {"examples": 4, "draw": 1}


@pytest.fixture(params=FAMILIES, scope="module")
def model(request: pytest.FixtureRequest) -> Any:
    return make_llama(request.param)


def after(ids: Tensor) -> Tensor:
    return torch.cat([torch.tensor(CONTEXT).expand(len(ids), -1), ids], 1)


def texts(rows: int = 2, length: int = 9) -> Tensor:
    return torch.randint(3, 97, (rows, length), generator=torch.Generator().manual_seed(0))


def has_windows(model: Any) -> bool:
    kinds = getattr(model.config, "layer_types", None) or ()
    return model.config.model_type == "mistral" or any(kind.startswith("sliding") for kind in kinds)


def ladder(backbone: Any) -> LadderModel:
    made = LadderModel(backbone, LadderConfig(**LADDER)).eval()
    torch.manual_seed(1)
    for parameter in made.parameters():
        parameter.data.add_(torch.randn_like(parameter) * 0.1)
    return made


def test_taps_after_a_context_are_those_of_the_whole_text(model: Any) -> None:
    """The second row is three tokens shorter, and padded; not where blocks have windows, in which padding counts."""
    ids, request = texts(), TapRequest(layers=(0, 2, 3), target_final=True)
    shorter = 6 if has_windows(model) else 3
    mask = torch.ones(2, 6, dtype=torch.long)
    mask[1, shorter:] = 0
    plain, length = as_backbone(model), len(CONTEXT)
    backbone = plain.after(CONTEXT)
    taps = backbone(Inputs(source_BS=ids[:, :6], source_mask_BS=mask, target_BT=ids[:, 6:]), request)
    for row, kept in enumerate((6, shorter)):
        whole = after(torch.cat([ids[row : row + 1, :kept], ids[row : row + 1, 6:]], 1))
        split = length + kept
        expected = plain(
            Inputs(source_BS=whole[:, :split], source_mask_BS=torch.ones(1, split, dtype=torch.long), target_BT=whole[:, split:]), request
        )
        for found, one in zip(taps.source.tensors, expected.source.tensors, strict=True):
            torch.testing.assert_close(found[row, :kept], one[0, length:], rtol=1e-4, atol=1e-4)
        for found, one in zip((*taps.target.tensors, taps.final_BTD), (*expected.target.tensors, expected.final_BTD), strict=True):
            torch.testing.assert_close(found[row], one[0], rtol=1e-4, atol=1e-4)
    assert plain.identity.context == () and backbone.identity.context == CONTEXT


def test_a_ladder_that_starts_as_its_backbone_goes_on_from_the_context(model: Any) -> None:
    ids = texts()
    made = LadderModel(as_backbone(model).after(CONTEXT), LadderConfig(**LADDER)).eval()
    with torch.no_grad():
        expected = model(after(ids)).logits[:, len(CONTEXT) :]
        torch.testing.assert_close(made(input_ids=ids).logits, expected, rtol=1e-4, atol=1e-4)
    padded = torch.cat([torch.zeros(2, 3, dtype=torch.long), ids], 1)
    mask = (torch.arange(12) >= 3).long().expand(2, -1)
    for options in ({"do_sample": False}, {"num_beams": 3}):
        whole = model.generate(after(ids), max_new_tokens=6, **options)[:, len(CONTEXT) :]
        assert torch.equal(made.generate(ids, max_new_tokens=6, **options), whole)
        if not has_windows(model):
            assert torch.equal(made.generate(padded, attention_mask=mask, max_new_tokens=6, **options)[:, 3:], whole)
        assert torch.equal(made.generate(ids, max_new_tokens=6, use_cache=False, **options), whole)


@pytest.mark.parametrize("order", [("plain", "after"), ("after", "plain")])
def test_side_networks_after_different_contexts_do_not_answer_together(order: tuple[str, str], tmp_path: Path) -> None:
    backbone = as_backbone(make_llama("llama"))
    ladder(backbone).save_pretrained(tmp_path / "plain")
    ladder(backbone.after(CONTEXT)).save_pretrained(tmp_path / "after")
    with pytest.raises(LadderError, match="context"):
        LadderEnsemble.from_pretrained([tmp_path / name for name in order], backbone)


def test_a_saved_side_network_brings_its_context_and_refuses_another(tmp_path: Path) -> None:
    model, ids = make_llama("llama"), texts()
    made = ladder(as_backbone(model).after(CONTEXT))
    made.save_pretrained(tmp_path / "side")
    with torch.no_grad():
        expected = made(input_ids=ids).logits
        assert torch.equal(LadderModel.from_pretrained(tmp_path / "side", model)(input_ids=ids).logits, expected)
        other = as_backbone(model).after(CONTEXT[:3])
        changed = LadderModel.from_pretrained(tmp_path / "side", other, allow_other_backbone=True)(input_ids=ids).logits
    assert not torch.allclose(changed, expected, atol=1e-3)
    with pytest.raises(LadderError, match="after another context than the 3 tokens"):
        LadderModel.from_pretrained(tmp_path / "side", other)
    both = LadderEnsemble.from_pretrained([tmp_path / "side", tmp_path / "side"], model)
    with torch.no_grad():
        torch.testing.assert_close(both(input_ids=ids).logits, expected.log_softmax(-1), rtol=1e-4, atol=1e-4)
    with pytest.raises(LadderError, match="another context before every row"):
        ladder(model).load_state_dict(made.state_dict())
    with pytest.raises(BackboneError, match="from a context already"):
        other.after(CONTEXT)


def test_examples_are_drawn_evenly_from_the_labels_and_each_draw_is_another() -> None:
    rows = [Row(f"text {number}", "ab"[number % 10 == 0]) for number in range(200)]
    draws = [drawn(rows, 8, draw, by_label=True) for draw in range(5)]
    assert drawn(rows, 8, 3, by_label=True) == draws[3] and len(set(map(tuple, draws))) == 5
    assert all(Counter(rows[number].target for number in chosen) == {"a": 4, "b": 4} for chosen in draws)
    assert all(len(set(drawn(rows, 8, draw, by_label=False))) == 8 for draw in range(5))


def test_examples_leave_the_training_rows_and_stand_before_the_others(write: Callable[..., Path]) -> None:
    plain, data = (load_data(load_recipe(str(write(name, backbone__context=context)))) for name, context in (("a", None), ("b", EXAMPLES)))
    assert data.context is not None and len(data.tasks[0].task.train) == len(plain.tasks[0].task.train) - 4
    examples = [plain.tasks[0].task.train[number - 1] for number in data.context.rows]
    assert data.context.text == "".join(f"{row.source} {row.target}\n\n" for row in examples)
    assert not {row.source for row in examples} & {row.source for row in data.tasks[0].task.train}
    assert data.tokenizer.decode(data.reading.run_once) == data.context.text
    first, bare = (each.tasks[0].splits["validation"].input_ids[0].tolist() for each in (data, plain))
    assert first == bare, "run once, in no row"
    assert any(sentence.startswith("context of ") and "left out of training" in sentence for sentence in data.sentences)


@pytest.mark.parametrize("model_type", ["llama", "gemma3_text"])
def test_a_run_from_the_tap_cache_ends_as_the_live_one(model_type: str, write: Callable[..., Path], tmp_path: Path) -> None:
    common = {"data__shuffle_seed": 0, "training__epochs": 2, "backbone__context": EXAMPLES}
    cached = common | {"cache": {"enabled": True, "dtype": "fp32", "folder": str(tmp_path / "taps")}}
    live = trained(write("live", model_type, **common))
    first, second = trained(write("first", model_type, **cached)), trained(write("second", model_type, **cached))
    for folder in (first, second):
        assert_same_weights(folder, final_weights(live))
        assert result(folder)["scores"] == result(live)["scores"]
    assert result(second)["cache"]["rows_run"] < result(first)["cache"]["rows_run"]
    other = trained(write("other", model_type, **cached | {"backbone__context": {"examples": 4, "draw": 2}}))
    assert result(other)["cache"]["rows_run"] == result(first)["cache"]["rows_run"], "another context has other taps"
    assert result(live)["context"] == result(second)["context"] != result(other)["context"]


@pytest.mark.parametrize("cached", [False, True])
def test_the_tokens_of_a_context_are_run_once(
    cached: bool, write: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """For two epochs, three labels a row, and generation: counted by the tokens that each pass of the first block has."""
    changes = {"backbone__context": EXAMPLES, "cache": {"enabled": cached, "folder": str(tmp_path / "taps")}, "data__max_source_length": 8}
    recipe = load_recipe(str(write("counted", **changes)))
    lengths: list[int] = []
    run_of = type(FAMILY).context
    monkeypatch.setattr(type(FAMILY), "context", lambda self, model, given: lengths.append(given.shape[1]) or run_of(self, model, given))
    with Logger(None) as logger:
        shared = load_shared([recipe], distributed.connect(), logger)
    length = shared.reading.length
    assert length > 40
    watched = shared.backbone.live if isinstance(shared.backbone, CachingBackbone) else shared.backbone
    passes: list[int] = []
    watched.blocks[0][0].register_forward_hook(lambda _block, given, _output: passes.append(given[0].shape[1]))
    split = shared.tasks[0].train
    for _ in range(2):
        for batch in evaluation_batches(split, batch_size=4, rank=0, world_size=1):
            shared.passes.all_of(batch)
            list(shared.passes.each_target(batch, [[5, 1], [6, 7, 1], [8, 1]]))
    made = LadderModel(shared.backbone, LadderConfig(**LADDER)).eval()
    made.generate(torch.from_numpy(split.input_ids[0])[None].long(), max_new_tokens=5)
    shared.close()
    assert lengths == [length] and passes and max(passes) <= 8


@pytest.mark.parametrize("answers", ["generation", "likelihood"])
@pytest.mark.parametrize("method", ["lst", "lora"])
def test_a_finished_run_answers_a_file_as_it_was_scored(answers: str, method: str, write: Callable[..., Path], tmp_path: Path) -> None:
    changes = {"backbone__context": EXAMPLES | {"text": "Say what kind of thing it is."}, "evaluation__method": answers}
    if method == "lora":
        changes["method"] = {"name": "lora", "rank": 2, "targets": ["q_proj"]}
    folder = trained(write("scored", training__epochs=4, **changes))
    rows = [json.loads(line) for line in (EMBEDDED / "wordnet/validation.jsonl").read_text().splitlines()[:7]]
    (tmp_path / "in.jsonl").write_text("".join(json.dumps({k: row[k] for k in ("word", "definition")}) + "\n" for row in rows))
    assert predict_file([folder], tmp_path / "in.jsonl", tmp_path / "out.jsonl") == 7
    said = [json.loads(line)["prediction"] for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    right = 100 * sum(answer == row["kind"] for answer, row in zip(said, rows, strict=True)) / 7
    assert right == pytest.approx(result(folder)["scores"]["accuracy"], abs=0.01)
    with pytest.raises(ArgumentError, match=r"backbone.context.draw has no effect on predictions"):
        predict_file([folder], tmp_path / "in.jsonl", tmp_path / "no.jsonl", ["backbone.context.draw=3"])
    record = json.loads((folder / "result.json").read_text()) | {"context": None}
    (folder / "result.json").write_text(json.dumps(record))
    with pytest.raises(ArgumentError, match="'context' is missing"):
        predict_file([folder], tmp_path / "in.jsonl", tmp_path / "no.jsonl")


def test_members_share_the_context(write: Callable[..., Path], tmp_path: Path) -> None:
    changes = {"data__shuffle_seed": 0, "backbone__context": EXAMPLES}
    train(write("both", members=["seed=0", "seed=1"], **changes))
    alone = trained(write("alone", seed=1, **changes))
    (together,) = (tmp_path / "runs").glob("both*seed1")
    assert_same_weights(together, final_weights(alone))


def test_beside_an_encoder_the_context_begins_each_source_and_does_not_count(tmp_path: Path) -> None:
    tokenizer = load_tokenizer("embedded:tiny-t5")
    reading = reading_after("a dog: animal", tokenizer, beside_backbone=True)
    context = tokenizer("a dog: animal", add_special_tokens=False).input_ids
    split = encode_sources(["a cat", "a very long row that is cut"], reading.tokenizer, 4, reading.before)
    for ids, text in zip(split.input_ids, ("a cat", "a very long row that is cut"), strict=True):
        assert ids.tolist() == context + tokenizer(text, truncation=True, max_length=4).input_ids
    assert split.cut_sources == 1 and not reading.run_once
    t5 = make_t5(tmp_path / "t5", dropout_rate=0.0)
    plain, with_text = (
        trained(recipe_writer(tmp_path, t5)(name, backbone__context=context)) for name, context in (("p", None), ("c", {"text": "Kinds:"}))
    )
    assert "context of" in (with_text / "log.txt").read_text()
    assert any(not torch.equal(tensor, final_weights(plain)[name]) for name, tensor in final_weights(with_text).items())
    rows = tmp_path / "in.jsonl"
    rows.write_text('{"word": "dog", "definition": "an animal"}\n')
    assert predict_file([with_text], rows, tmp_path / "out.jsonl") == 1


@pytest.mark.parametrize(
    ("context", "message"),
    [
        ({}, "write text: ... or examples: 8"),
        ({"text": "  "}, "text is empty"),
        ({"text": "a", "draw": 2}, "draw has no effect without examples"),
        ({"examples": 0}, "examples"),
        ({"examples": 900}, "leaves none of the 22 training rows"),
    ],
    ids=str,
)
def test_a_context_that_can_t_be_meant_is_refused(context: dict[str, Any], message: str, write: Callable[..., Path]) -> None:
    with pytest.raises(LstScaleError, match=message):
        load_data(load_recipe(str(write("no", backbone__context=context))))


def test_a_stream_draws_no_examples(write: Callable[..., Path]) -> None:
    changes: dict[str, Any] = {"task__streaming": True, "training": {"max_steps": 2, "global_batch_size": 2}, "backbone__context": EXAMPLES}
    with pytest.raises(RecipeError, match=r"write backbone.context.text: examples are drawn from a table"):
        load_recipe(str(write("stream", **changes)))
