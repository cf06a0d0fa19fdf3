"""What trains is counted in closed form, before torch is imported, and equals the network that is built."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import T5Config, T5ForConditionalGeneration

from helpers.tiny import tiny_t5
from lst_scale.backbone.families import family_of
from lst_scale.backbone.weights.checkpoint import spec_of
from lst_scale.errors import BackboneError, LadderError
from lst_scale.methods.lst import ladder_config
from lst_scale.recipe.method import AdaptersRecipe, BitfitRecipe, FullRecipe, LoraRecipe, LstRecipe, PromptRecipe
from lst_scale.side.config import LadderConfig
from lst_scale.side.count import SHAPES, Shape, backbone_parameters, shape_of, trainable_parameters
from lst_scale.side.network import SideNetwork

ENTRIES: dict[str, dict[str, Any]] = json.loads(SHAPES.read_text())
TABLE = sorted(name for name, entry in ENTRIES.items() if entry["model_type"] in ("t5", "mt5"))
LAYERS: list[dict[str, Any]] = [
    {},
    {"side_layers": (1, 3)},
    {"side_layers": (3,), "merge_last": True},
    {"design": "cross_attention", "side_layers": (1, 3)},
    {"design": "adapter", "initialization": "random", "side_layers": (1, 3), "merge_last": True},
    {"side_layers": (1, 3), "gate": "per_channel", "merge_last": True, "start_as_backbone": True},
    {"design": "adapter", "initialization": "random", "side_layers": (1, 3), "gate": "per_channel"},
    {"side_layers": (1, 3), "gate": "fixed", "side_heads": 2, "downsample_rank": 3},
]


def shape(checkpoint: str) -> Shape:
    found = shape_of(checkpoint)
    assert found is not None
    return found


def narrower(shape: Shape) -> Shape:
    """With the paper's vocabulary."""
    return replace(shape, spec=replace(shape.spec, vocab_size=32_100))


def config_of(shape: Shape) -> T5Config:
    names = ("vocab_size", "d_model", "d_ff", "d_kv", "num_heads", "num_layers", "num_decoder_layers")
    return T5Config(
        **{name: getattr(shape.spec, name) for name in names},
        feed_forward_proj="gated-gelu" if shape.spec.gated else "relu",
        decoder_start_token_id=0,
    )


@pytest.mark.parametrize(
    ("checkpoint", "layers", "count"),
    [
        # The paper's figures less the release's gates of dropped layers: 6, 24, 46.
        ("google-t5/t5-base", (1, 2, 3, 5, 6, 7, 9, 10, 11), 3_878_712 - 6),
        ("google-t5/t5-base", "all", 5_097_240),
        ("google-t5/t5-large", tuple(range(1, 24, 2)), 9_057_328 - 24),
        ("google-t5/t5-3b", (23,), 2_494_896 - 46),
    ],
)
def test_counts_are_the_paper_s_less_its_unused_gates(checkpoint: str, layers: Any, count: int) -> None:
    assert trainable_parameters(shape(checkpoint), LstRecipe(name="lst", side_layers=layers)) == count


@pytest.mark.parametrize(
    ("options", "count", "share"),
    [
        ({"design": "cross_attention"}, 5_984_280 - 24, 2.685),  # the release makes gates that nothing uses
        ({"design": "adapter", "reduction_factor": 16, "initialization": "random"}, 4_622_232, 2.074),
        ({}, 5_097_240, 2.287),
    ],
)
def test_the_other_designs_have_the_paper_s_counts_and_shares_on_t5_base(options: dict[str, Any], count: int, share: float) -> None:
    method = LstRecipe.model_validate({"name": "lst"} | options)
    smaller = narrower(shape("google-t5/t5-base"))
    assert trainable_parameters(smaller, method) == count
    assert round(100 * trainable_parameters(smaller, method) / backbone_parameters(smaller), 3) == share


@pytest.mark.parametrize(
    ("method", "count", "share"),
    [
        (AdaptersRecipe(name="adapters"), 3_625_728, 1.627),
        (LoraRecipe(name="lora", bitfit=True), 3_821_412, 1.715),
        (LoraRecipe(name="lora"), 3_538_944, 1.588),
        (BitfitRecipe(name="bitfit"), 282_468, 0.127),
        (PromptRecipe(name="prompt"), 76_800, 0.034),
        (FullRecipe(name="full"), 222_882_048, 100.0),
    ],
    ids=lambda value: getattr(value, "name", None),
)
def test_the_rivals_have_the_paper_s_counts_and_shares_on_t5_base(method: Any, count: int, share: float) -> None:
    smaller = narrower(shape("google-t5/t5-base"))
    assert trainable_parameters(smaller, method) == count
    assert round(100 * count / backbone_parameters(smaller), 3) == share


@pytest.mark.parametrize(("checkpoint", "share"), [("google-t5/t5-base", 1.740), ("google-t5/t5-large", 1.228), ("google-t5/t5-3b", 0.087)])
def test_shares_are_the_paper_s_over_its_vocabulary_of_32100(checkpoint: str, share: float) -> None:
    layers = {"google-t5/t5-base": (1, 2, 3, 5, 6, 7, 9, 10, 11), "google-t5/t5-large": tuple(range(1, 24, 2)), "google-t5/t5-3b": (23,)}
    whole = shape(checkpoint)
    smaller = narrower(whole)
    trainable = trainable_parameters(smaller, LstRecipe(name="lst", side_layers=layers[checkpoint]))
    assert round(100 * trainable / backbone_parameters(smaller), 3) == share


@pytest.mark.parametrize("options", LAYERS)
@pytest.mark.parametrize("checkpoint", TABLE)
def test_the_formula_equals_the_built_network(checkpoint: str, options: dict[str, Any]) -> None:
    known = shape(checkpoint)
    method = LstRecipe(name="lst", **options)
    spec = spec_of(config_of(known))
    with torch.device("meta"):
        side = SideNetwork(spec, ladder_config(method, spec))
    assert trainable_parameters(known, method) == sum(parameter.numel() for parameter in side.parameters())


@pytest.mark.parametrize("checkpoint", [name for name in TABLE if any(size in name for size in ("small", "3b", "byt5-base", "flan-ul2"))])
def test_the_backbone_formula_equals_the_built_backbone(checkpoint: str) -> None:
    known = shape(checkpoint)
    with torch.device("meta"):
        model = T5ForConditionalGeneration(config_of(known))
    tied = sum(parameter.numel() for parameter in model.parameters())
    assert backbone_parameters(known) == tied + (known.spec.vocab_size * known.spec.d_model if known.own_head else 0)


@pytest.mark.parametrize("checkpoint", sorted(ENTRIES.keys() - set(TABLE)))
def test_the_formulas_equal_other_kinds_of_models_as_they_are_built(checkpoint: str) -> None:
    known = shape(checkpoint)
    family = family_of(known.spec.model_type, checkpoint)
    with torch.device("meta"):
        model = family.unfilled(known.spec, shards=1)
        method = LstRecipe(name="lst", initialization="random", merge_last=True, start_as_backbone=True, normalize_taps=True)
        side = SideNetwork(known.spec, ladder_config(method, known.spec))
    family.tie(model, own_head=known.own_head)
    assert backbone_parameters(known) == sum(parameter.numel() for parameter in model.parameters())
    assert trainable_parameters(known, method) == sum(parameter.numel() for parameter in side.parameters())


def test_published_sizes_agree() -> None:
    sizes = {
        "Qwen/Qwen3-8B": 8.19e9,
        "Qwen/Qwen3-32B": 32.76e9,
        "meta-llama/Llama-3.1-8B-Instruct": 8.03e9,
        "meta-llama/Llama-3.3-70B-Instruct": 70.55e9,
        "google/gemma-3-12b-it": 11.77e9,  # without what reads images
        "google-t5/t5-small": 60.5e6,
        "google-t5/t5-11b": 11.3e9,
        "google/byt5-xxl": 12.9e9,
        "google/flan-ul2": 19.5e9,
        "google/mt5-xl": 3.7e9,
    }
    for checkpoint, size in sizes.items():
        assert backbone_parameters(shape(checkpoint)) == pytest.approx(size, rel=0.02), checkpoint


@pytest.mark.parametrize("options", [{}, {"gated": True}, {"multilingual": True}], ids=["tied", "gated", "multilingual"])
def test_a_folder_is_counted_from_its_configuration_and_file_headers(tmp_path: Path, options: dict[str, bool]) -> None:
    model = tiny_t5(**options)
    model.save_pretrained(tmp_path)
    found = shape(str(tmp_path))
    assert backbone_parameters(found) == sum(parameter.numel() for parameter in model.parameters())
    with torch.device("meta"):
        side = SideNetwork(spec_of(model.config), LadderConfig(reduction_factor=4, side_layers=(0, 1, 2)))
    assert trainable_parameters(found, LstRecipe(name="lst", reduction_factor=4)) == sum(p.numel() for p in side.parameters())


def test_what_nobody_knows_is_none_and_another_model_is_refused(tmp_path: Path) -> None:
    assert shape_of("somebody/something") is None
    (tmp_path / "config.json").write_text('{"model_type": "bert"}')
    with pytest.raises(BackboneError, match="is a 'bert' model: choose a checkpoint of type t5, mt5, llama, "):
        shape_of(str(tmp_path))
    (tmp_path / "config.json").write_text('{"model_type": "t5"}')
    with pytest.raises(BackboneError, match="can't be read as a model configuration: 'vocab_size' is missing"):
        shape_of(str(tmp_path))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"reduction_factor": 5}, "reduction_factor 5 must divide d_model 768, d_ff 3072 and d_kv 64: write one of 1, 2, 4"),
        ({"side_layers": (12,)}, "side_layers names block 12, but this backbone has blocks 0 to 11"),
    ],
    ids=["factor", "layer"],
)
def test_what_does_not_fit_is_refused_before_anything_is_loaded(options: dict[str, Any], message: str) -> None:
    with pytest.raises(LadderError, match=message):
        trainable_parameters(shape("google-t5/t5-base"), LstRecipe(name="lst", **options))


def test_counting_imports_no_torch() -> None:
    code = "import sys, lst_scale.side.count as c; c.shape_of('google-t5/t5-3b'); sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
