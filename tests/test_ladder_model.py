"""The public model: what trains, what is frozen, what is stored."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import T5ForConditionalGeneration

from helpers.inputs import inputs_of
from lst_scale import LadderConfig, LadderModel
from lst_scale.backbone.placement.replicated import LocalBackbone
from lst_scale.errors import LadderError, LstScaleError
from lst_scale.recipe.method import LstRecipe
from lst_scale.recipe.schema import load_recipe
from lst_scale.side.count import backbone_parameters, shape_of, trainable_parameters
from lst_scale.side.initialize import initialize_by_pruning
from lst_scale.side.network import SideNetwork


@pytest.fixture
def model(tiny_t5_dir: Path) -> LadderModel:
    return LadderModel(LocalBackbone.load(str(tiny_t5_dir), precision="fp32"), LadderConfig(reduction_factor=4, side_layers=[0, 2]))


def batch() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {
        "input_ids": torch.randint(3, 4000, (3, 8), generator=generator),
        "attention_mask": torch.ones(3, 8, dtype=torch.long),
        "labels": torch.randint(3, 4000, (3, 4), generator=generator),
    }


def test_only_the_side_network_is_a_parameter_and_taps_never_require_grad(model: LadderModel) -> None:
    assert all(name.startswith("side.") for name, _ in model.named_parameters())
    model.train()
    taps = model.backbone(inputs_of(batch()["input_ids"], batch()["attention_mask"], batch()["labels"]), model.side.request)
    assert not any(tap.requires_grad for tap in (taps.source.embedding, *taps.source.hidden, *taps.target.hidden))


def test_train_mode_never_reaches_the_backbone(tiny_t5_dir: Path) -> None:
    live = T5ForConditionalGeneration.from_pretrained(tiny_t5_dir)
    model = LadderModel(live, LadderConfig(reduction_factor=4, side_layers=[1]))
    model.train()
    assert not live.training and model.side.training
    assert not any(parameter.requires_grad for parameter in live.parameters())


def test_only_the_kept_taps_are_returned(model: LadderModel) -> None:
    taps = model.backbone(inputs_of(batch()["input_ids"], batch()["attention_mask"], batch()["labels"]), model.side.request)
    assert taps.source.layers == (0, 2) and len(taps.source.hidden) == len(taps.target.hidden) == 2
    assert taps.final_BTD is None


def test_the_last_tap_is_the_block_before_the_final_norm(tiny_t5_dir: Path) -> None:
    live = T5ForConditionalGeneration.from_pretrained(tiny_t5_dir).eval()
    backbone = LocalBackbone.load(str(tiny_t5_dir), precision="fp32")
    from lst_scale.backbone.taps import TapRequest

    source = backbone.read(batch()["input_ids"], batch()["attention_mask"], TapRequest(layers=(0, 1, 2)))
    with torch.no_grad():
        reference = live.encoder(input_ids=batch()["input_ids"], attention_mask=batch()["attention_mask"], output_hidden_states=True)
    torch.testing.assert_close(source.taps.hidden[0], reference.hidden_states[1], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(source.final, reference.last_hidden_state, rtol=1e-5, atol=1e-5)
    assert not torch.allclose(source.taps.hidden[2], reference.hidden_states[3], atol=1e-2)  # transformers' last entry is post-norm
    torch.testing.assert_close(live.encoder.final_layer_norm(source.taps.hidden[2]), source.final, rtol=1e-5, atol=1e-5)


def test_a_saved_side_network_reads_back_equal_and_finds_its_backbone(model: LadderModel, tmp_path: Path) -> None:
    model.save_pretrained(tmp_path / "side")
    again = LadderModel.from_pretrained(tmp_path / "side")
    assert torch.equal(again(**batch()).logits, model.eval()(**batch()).logits)
    assert {path.name for path in (tmp_path / "side").iterdir()} == {
        "side_network.safetensors",
        "ladder_config.json",
        "config.json",
        "README.md",
    }
    size = (tmp_path / "side" / "side_network.safetensors").stat().st_size
    assert size < 4 * sum(p.numel() for p in model.parameters()) + 20_000  # the backbone is not in it


def _truncate(folder: Path) -> None:
    path = folder / "side_network.safetensors"
    path.write_bytes(path.read_bytes()[:-100])


def _edit(key: str, value: Any) -> Any:
    def change(folder: Path) -> None:
        record = json.loads((folder / "ladder_config.json").read_text())
        record[key] = value(record[key]) if callable(value) else value
        (folder / "ladder_config.json").write_text(json.dumps(record))

    return change


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda f: (f / "side_network.safetensors").unlink(), "holds no saved side network"),
        (_truncate, "side_network.safetensors is damaged"),
        (lambda f: (f / "ladder_config.json").write_text("{"), "ladder_config.json is damaged"),
        (_edit("format", 99), "has format 99"),
        (_edit("config", lambda c: c | {"reduction_factor": 8}), "does not fit its ladder_config.json"),
        (_edit("config", lambda c: c | {"side_layers": [0, 7]}), "this backbone has blocks 0 to 2"),
        (_edit("backbone", lambda b: b | {"fingerprint": "0" * 64}), "was trained on"),
        (_edit("backbone", lambda b: b | {"checkpoint": "/nowhere"}), "is no folder"),
    ],
)
def test_a_damaged_side_network_is_refused_in_one_line(damage: Any, message: str, model: LadderModel, tmp_path: Path) -> None:
    model.save_pretrained(tmp_path / "side")
    damage(tmp_path / "side")
    with pytest.raises(LstScaleError) as caught:
        LadderModel.from_pretrained(tmp_path / "side")
    assert message in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda d: d.pop("side_final_upsample.bias"), "missing: side_final_upsample.bias"),
        (lambda d: d.update(extra=torch.zeros(1)), "unknown: extra"),
        (lambda d: d.update({"side_final_upsample.bias": torch.zeros(5)}), "mis-shaped: side_final_upsample.bias is (5,), not (32,)"),
    ],
)
def test_release_weights_that_do_not_fit_are_refused(change: Any, message: str, model: LadderModel) -> None:
    weights = {name: tensor.clone() for name, tensor in model.release_state_dict().items()}
    change(weights)
    with pytest.raises(LadderError, match="these weights are not of this side network") as caught:
        model.load_release_state_dict(weights)
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"reduction_factor": 3, "side_layers": [0]}, "write one of 1, 2, 4, 8"),
        ({"side_layers": [3]}, "this backbone has blocks 0 to 2"),
        ({"side_layers": [0], "side_heads": 7}, "side_heads 7 is more than the 4 heads of this backbone: write 4 or fewer"),
        ({"side_layers": [2, 0]}, "ascending"),
        ({"side_layers": []}, "at least one"),
        ({"side_layers": [0], "design": "transfromer"}, "Did you mean 'transformer'?"),
        ({"side_layers": [0], "dropout": 1.0}, "below 1"),
    ],
)
def test_a_ladder_that_does_not_fit_names_what_would(config: dict[str, Any], message: str, tiny_t5_dir: Path) -> None:
    with pytest.raises(LadderError) as caught:
        LadderModel(LocalBackbone.load(str(tiny_t5_dir), precision="fp32"), LadderConfig(**config))
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("recipe", "count", "unused_gates", "share"),
    [("t5-base", 3_878_712, 6, 1.740), ("t5-large", 9_057_328, 24, 1.228), ("t5-3b", 2_494_896, 46, 0.087)],
)
def test_recipes_train_the_papers_counts_less_its_unused_gates(recipe: str, count: int, unused_gates: int, share: float) -> None:
    loaded = load_recipe(recipe)
    shape = shape_of(loaded.backbone.checkpoint)
    assert shape is not None
    trainable = trainable_parameters(shape, loaded.method)
    assert trainable == count - unused_gates
    assert round(100 * trainable / backbone_parameters(shape), 3) == share


@pytest.mark.parametrize("recipe", ["t5-base", "t5-large", "t5-3b", "t5-3b-8bit", "flan-t5-xl", "quickstart"])
def test_every_recipe_builds_on_the_meta_device_with_the_counted_parameters(recipe: str) -> None:
    from transformers import T5Config

    from lst_scale.backbone.weights.checkpoint import spec_of
    from lst_scale.methods.lst import ladder_config

    loaded = load_recipe(recipe)
    shape = shape_of(loaded.backbone.checkpoint)
    assert shape is not None
    names = ("vocab_size", "d_model", "d_ff", "d_kv", "num_heads", "num_layers")
    config = T5Config(
        **{name: getattr(shape.spec, name) for name in names},
        feed_forward_proj="gated-gelu" if shape.spec.gated else "relu",
        tie_word_embeddings=not shape.own_head,
        decoder_start_token_id=0,
    )
    with torch.device("meta"):
        side = SideNetwork(spec_of(config), ladder_config(loaded.method, spec_of(config)))
        backbone = T5ForConditionalGeneration(config)
    assert sum(p.numel() for p in side.parameters()) == trainable_parameters(shape, loaded.method)
    own_head = backbone.lm_head.weight.numel() if shape.own_head else 0
    assert sum(p.numel() for p in backbone.parameters()) + own_head == backbone_parameters(shape)


def test_pruning_reads_each_weight_of_a_gated_backbone_once_and_never_two_blocks_at_a_time(tiny_gated_t5_dir: Path) -> None:
    backbone = LocalBackbone.load(str(tiny_gated_t5_dir), precision="int8")
    side = SideNetwork(backbone.spec, LadderConfig(reduction_factor=4, side_layers=[1]))
    order: list[str] = []

    def counted(name: str) -> torch.Tensor:
        order.append(name)
        return backbone.weight_source(name)

    initialize_by_pruning(side, counted)
    names = [name for name in order if "relative_attention_bias" not in name]
    assert len(names) == len(set(names))
    blocks = [name.split(".layer.")[0] for name in names if ".block." in name]
    assert blocks == sorted(blocks, key=lambda block: (block.startswith("decoder"), int(block.rsplit(".", 1)[1])))


def test_the_formula_refuses_what_the_module_would(tiny_t5_dir: Path) -> None:
    shape = shape_of("google-t5/t5-base")
    assert shape is not None
    with pytest.raises(LadderError, match="reduction_factor 5 must divide"):
        trainable_parameters(shape, LstRecipe(name="lst", reduction_factor=5))


def test_a_backbone_may_be_named(tiny_t5_dir: Path) -> None:
    model = LadderModel(str(tiny_t5_dir), LadderConfig(reduction_factor=4, side_layers=[0]))
    assert model.backbone.identity.precision == "fp32" and model(**batch()).loss > 0
    with pytest.raises(LstScaleError, match="nowhere") as caught:
        LadderModel("/nowhere/t5-small", LadderConfig(reduction_factor=4, side_layers=[0]))
    assert "\n" not in str(caught.value)


def test_several_gpus_without_a_launcher_are_refused_in_one_line(model: LadderModel) -> None:
    with pytest.raises(LadderError, match="one process a GPU"):
        model._replicate_for_data_parallel()  # what torch.nn.DataParallel calls


def test_attentions_are_refused_in_one_line(model: LadderModel) -> None:
    assert model(**batch(), output_attentions=False).loss > 0
    with pytest.raises(LadderError, match=r"^a ladder returns no attentions: leave output_attentions out$"):
        model(**batch(), output_attentions=True)
