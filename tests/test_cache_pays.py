"""What a tap cache costs beside the backbone, said before the first step; and caches of many blocks that serve runs on fewer."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import T5ForConditionalGeneration

from helpers import cached
from helpers.models import make_t5
from helpers.recipes import recipe_writer
from helpers.training import train
from lst_scale.backbone.cache import pay
from lst_scale.backbone.cache.backbone import CachingBackbone
from lst_scale.backbone.cache.key import CacheKey
from lst_scale.backbone.cache.load import load_caching
from lst_scale.backbone.families import family_of
from lst_scale.backbone.taps import TapRequest, Taps
from lst_scale.recipe.backbone import BackboneRecipe
from lst_scale.recipe.schema import CacheRecipe
from lst_scale.system import distributed

WIDE, NARROW = TapRequest(layers=(0, 2, 3), target_final=True), TapRequest(layers=(0, 3), target_final=True)


@pytest.fixture
def t5(tmp_path: Path) -> Path:
    return make_t5(tmp_path / "t5", num_layers=4, num_decoder_layers=4)


def opened(t5: Path, request: TapRequest) -> CachingBackbone:
    cache = CacheRecipe.model_validate({"enabled": True, "dtype": "fp32", "folder": str(t5.parent / "taps")})
    recipe = BackboneRecipe(checkpoint=str(t5), precision="fp32")
    return load_caching(recipe, cache, distributed.connect(), lambda spec: request, lambda live: None)


def same(one: Taps, other: Taps) -> bool:
    """Whether the states of all tokens are; what stands at padding is nobody's."""
    mask = one.source_mask_BS.bool()
    source = (torch.equal(mine[mask], theirs[mask]) for mine, theirs in zip(one.source.tensors, other.source.tensors, strict=True))
    first = (torch.equal(mine[:, :2], theirs[:, :2]) for mine, theirs in zip(one.target.tensors, other.target.tensors, strict=True))
    assert one.final_BTD is not None and other.final_BTD is not None
    return all(source) and all(first) and torch.equal(one.final_BTD[:, :2], other.final_BTD[:, :2])


def test_a_cache_of_more_blocks_serves_a_run_that_reads_fewer(t5: Path) -> None:
    wide, (batch,) = opened(t5, WIDE), cached.batches(1)
    expected = wide(batch, NARROW)
    wide.close()
    narrow = opened(t5, NARROW)
    found = narrow(batch, NARROW)
    assert (narrow.rows_read, narrow.rows_run, narrow.is_loaded) == (3, 0, False)
    assert same(found, expected) and not list(narrow.cache.folder.glob("*.taps"))


TARGETS = TapRequest(layers=(0, 3), source=False)


def test_a_cache_of_sources_and_final_states_serves_a_run_that_reads_targets_alone_and_not_the_other_way_round(t5: Path) -> None:
    (batch,) = cached.batches(1)
    expected = opened(t5, WIDE)(batch, NARROW)
    few = opened(t5, TARGETS)
    found = few(batch, TARGETS)
    assert (few.rows_read, few.rows_run, few.is_loaded) == (3, 0, False)
    assert found.source.hidden == () and found.source.embedding.shape[1] == 0 and found.final_BTD is None
    for mine, theirs in zip(found.target.tensors, expected.target.tensors, strict=True):
        assert torch.equal(mine[:, :2], theirs[:, :2])
    (several,) = few.each_target([batch], TARGETS)
    assert torch.equal(several.target.tensors[0][:, :2], found.target.tensors[0][:, :2])


def test_a_cache_of_targets_alone_keeps_nothing_of_sources(t5: Path) -> None:
    (batch,) = cached.batches(1)
    few = opened(t5, TARGETS)
    live = few(batch, TARGETS)
    (data,) = few.cache.folder.glob("*.taps")
    assert data.stat().st_size == 4 * few.spec.d_model * (4 + 2 + 3) * 2 == few.cache.key.bytes_of(19, 9)
    again, more = opened(t5, TARGETS), opened(t5, NARROW)
    assert torch.equal(again(batch, TARGETS).target.tensors[1][:, :2], live.target.tensors[1][:, :2]) and again.rows_run == 0
    more(batch, NARROW)
    assert more.rows_run == 3, "it lacks what a ladder along sources reads"


def test_rows_that_it_lacks_are_run_and_kept_with_the_fewer_blocks(t5: Path) -> None:
    first, second = cached.batches(2)
    opened(t5, WIDE)(first, WIDE)
    narrow = opened(t5, NARROW)
    live = narrow(second, NARROW)
    again = opened(t5, NARROW)
    assert same(again(second, NARROW), live) and narrow.rows_run == 3 and again.rows_run == 0
    (data,) = narrow.cache.folder.glob("*.taps")
    d = narrow.spec.d_model
    assert data.stat().st_size == 4 * d * ((6 + 4 + 9) * 2 + (4 + 2 + 3) * 3)


def test_a_payload_damaged_there_is_named_run_again_and_kept_here(t5: Path) -> None:
    wide, (batch,) = opened(t5, WIDE), cached.batches(1)
    expected = wide(batch, NARROW)
    (data,) = wide.cache.folder.glob("*.taps")
    raw = bytearray(data.read_bytes())
    raw[100] ^= 1
    data.write_bytes(raw)
    narrow = opened(t5, NARROW)
    assert same(narrow(batch, NARROW), expected)
    assert narrow.rows_run == 3 and narrow.facts()["cache"]["damaged"] == [f"{data} at byte 0"]


def test_a_cache_of_other_blocks_another_form_or_without_the_last_state_does_not(t5: Path) -> None:
    (batch,) = cached.batches(1)
    for request in (TapRequest(layers=(0, 1), target_final=True), TapRequest(layers=(0, 2, 3))):
        opened(t5, request)(batch, request)
    narrow = opened(t5, NARROW)
    narrow(batch, NARROW)
    assert narrow.rows_run == 3


def test_what_computing_takes_is_counted_by_hand(t5: Path) -> None:
    model = T5ForConditionalGeneration.from_pretrained(t5)
    spec = family_of("t5", "here").spec(model.config)
    weights = [
        sum(parameter.numel() for block in stack.block for parameter in block.parameters() if parameter.dim() == 2)
        - stack.block[0].layer[0].SelfAttention.relative_attention_bias.weight.numel()
        for stack in (model.encoder, model.decoder)
    ]
    counted = pay.operations(spec, pay.Tokens(source=7, target=3))
    bias = 2 * (7 + 3) * model.encoder.block[0].layer[0].SelfAttention.relative_attention_bias.weight.numel()
    assert counted - bias == 2 * (7 * weights[0] + 3 * weights[1])


@pytest.mark.parametrize(
    ("dtype", "read", "says"), [("bf16", 1e9, ": it pays, "), ("bf16", 1e5, "cache.dtype=int8, "), ("int8", 1e5, "write fewer")]
)
def test_it_says_whether_reading_is_the_shorter(t5: Path, dtype: str, read: float, says: str) -> None:
    spec = family_of("t5", "here").spec(T5ForConditionalGeneration.from_pretrained(t5).config)
    key = CacheKey(fingerprint="f", precision="fp32", layers=(0, 3), decoder_final=False, d_model=spec.d_model, dtype=dtype)
    tokens = pay.Tokens(source=100, target=10)
    line = pay.sentence(key, spec, pay.Tokens(source=1e6, target=1e5), tokens, pay.Rates(read=read, compute=1e9))
    assert says in line and f"takes {key.bytes_of(10**6, 10**5) / 1e9:.2f} GB" in line
    assert f"reads {key.bytes_of(100, 10) / 1e6:.1f} MB in {key.bytes_of(100, 10) / read:.3f} s" in line


def test_measuring_leaves_nothing_behind(tmp_path: Path) -> None:
    found = pay.rates(tmp_path, 64, "fp32", torch.device("cpu"))
    assert found.read > 0 and found.compute > 0 and not list(tmp_path.iterdir())


def test_a_run_says_it_before_its_first_step(t5: Path, tmp_path: Path) -> None:
    write = recipe_writer(tmp_path, t5)
    text = train(write("said", cache__enabled=True, cache__folder=str(tmp_path / "taps")))
    assert text.index("the tap cache takes ") < text.index("step 1:")
