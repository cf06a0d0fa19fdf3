"""Loading, precision, and the check of quantized weights."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForSeq2SeqLM

from helpers.inputs import inputs_of
from lst_scale.backbone.check import check_quantization
from lst_scale.backbone.placement.replicated import LocalBackbone
from lst_scale.backbone.taps import TapRequest
from lst_scale.backbone.weights import remembered
from lst_scale.backbone.weights.checkpoint import Checkpoint, open_checkpoint
from lst_scale.backbone.weights.precision import QuantizedLinear
from lst_scale.errors import BackboneError
from lst_scale.side.count import shape_of

REQUEST = TapRequest(layers=(0, 1, 2), target_final=True)


def batch() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    ids = torch.randint(3, 4000, (3, 10), generator=torch.Generator().manual_seed(0))
    mask = (torch.arange(10)[None, :] < torch.tensor([10, 4, 7])[:, None]).long()
    return ids * mask, mask, torch.tensor([[0, 5, 9], [0, 77, 8], [0, 300, 4]])


@pytest.mark.parametrize("fixture", ["tiny_t5_dir", "tiny_gated_t5_dir", "tiny_mt5_dir"])
def test_loaded_weights_give_transformers_logits(fixture: str, request: pytest.FixtureRequest) -> None:
    folder = request.getfixturevalue(fixture)
    ids, mask, decoder_ids = batch()
    backbone = LocalBackbone.load(str(folder), precision="fp32")
    taps = backbone(inputs_of(ids, mask, decoder_ids), REQUEST)
    assert taps.final_BTD is not None
    live = AutoModelForSeq2SeqLM.from_pretrained(folder, attn_implementation="eager").eval()
    stored = load_file(folder / "model.safetensors")
    if "lm_head.weight" in stored:  # transformers 5 may tie what the checkpoint does not
        live.lm_head.weight = torch.nn.Parameter(stored["lm_head.weight"])
    with torch.no_grad():
        expected = live(input_ids=ids, attention_mask=mask, decoder_input_ids=decoder_ids).logits
    # SDPA against eager attention: float32 sums in another order.
    torch.testing.assert_close(backbone.head(taps.final_BTD), expected, rtol=1e-4, atol=1e-4 * float(expected.abs().max()))


def test_padding_never_changes_a_tap_of_a_real_token(tiny_t5_dir: Path) -> None:
    ids, mask, decoder_ids = batch()
    backbone = LocalBackbone.load(str(tiny_t5_dir), precision="fp32")
    other = torch.where(mask.bool(), ids, torch.full_like(ids, 123))
    first, second = backbone(inputs_of(ids, mask, decoder_ids), REQUEST), backbone(inputs_of(other, mask, decoder_ids), REQUEST)
    for a, b in zip(first.source.hidden, second.source.hidden, strict=True):
        torch.testing.assert_close(a[mask.bool()], b[mask.bool()], rtol=1e-6, atol=1e-6)
    for a, b in zip(first.target.hidden, second.target.hidden, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


def test_decoder_blocks_past_the_last_tap_are_not_run(tiny_t5_dir: Path) -> None:
    backbone = LocalBackbone.load(str(tiny_t5_dir), precision="fp32")
    ran: list[int] = []
    for index, block in enumerate(backbone.blocks[1]):
        block.register_forward_hook(lambda *_args, i=index: ran.append(i))
    ids, mask, decoder_ids = batch()
    backbone(inputs_of(ids, mask, decoder_ids), TapRequest(layers=(0, 1)))
    assert ran == [0, 1]
    assert len(backbone.blocks[1]) == 3


@pytest.mark.parametrize("precision", ["int8", "nf4"])
@pytest.mark.parametrize("fixture", ["tiny_t5_dir", "tiny_gated_t5_dir"])
def test_quantization_covers_wo_and_stays_within_its_threshold(precision: str, fixture: str, request: pytest.FixtureRequest) -> None:
    backbone = LocalBackbone.load(str(request.getfixturevalue(fixture)), precision=precision)
    linears = [m for blocks in backbone.blocks for m in blocks.modules() if isinstance(m, torch.nn.Linear)]
    quantized = [n for blocks in backbone.blocks for n, m in blocks.named_modules() if isinstance(m, QuantizedLinear)]
    assert not linears and sum(name.endswith("wo") for name in quantized) == 6
    report = check_quantization(backbone, inputs_of(*batch()))
    assert len(report.errors) == 6 and 0 < report.worst[1] < report.threshold


@pytest.mark.parametrize(("precision", "share"), [("bf16", 0.5), ("int8", 0.27), ("nf4", 0.16)])
def test_quantized_blocks_hold_the_bytes_of_their_precision(precision: str, share: float, tmp_path: Path) -> None:
    from helpers.models import make_t5

    folder = str(make_t5(tmp_path / "wide", d_model=128, d_ff=512, d_kv=32, vocab_size=256))
    whole, small = (LocalBackbone.load(folder, precision=p) for p in ("fp32", precision))
    embeddings = 256 * 128
    assert (small.weight_bytes() - 2 * embeddings) / (whole.weight_bytes() - 4 * embeddings) < share * 1.03


def test_a_threshold_that_is_passed_refuses_and_names_the_block(tiny_t5_dir: Path) -> None:
    backbone = LocalBackbone.load(str(tiny_t5_dir), precision="nf4")
    with pytest.raises(BackboneError, match=r"encoder block \d differs by .* \(allowed 0.001\): write backbone.precision=bf16"):
        check_quantization(backbone, inputs_of(*batch()), 0.001)


def test_garbage_in_one_matrix_is_found_by_the_check(tiny_t5_dir: Path) -> None:
    backbone = LocalBackbone.load(str(tiny_t5_dir), precision="int8")
    wo = backbone.blocks[0][1].layer[-1].DenseReluDense.wo
    wo.packed = wo.packed.flip(0)
    with pytest.raises(BackboneError, match="encoder block 1 differs"):
        check_quantization(backbone, inputs_of(*batch()))


def test_the_fingerprint_changes_with_any_weight(tiny_t5_dir: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(tiny_t5_dir, copy)
    assert open_checkpoint(str(copy)).fingerprint() == open_checkpoint(str(tiny_t5_dir)).fingerprint()
    weights = load_file(copy / "model.safetensors")
    weights["decoder.block.2.layer.2.DenseReluDense.wo.weight"][3, 3] += 1e-3
    save_file(weights, copy / "model.safetensors", metadata={"format": "pt"})
    assert open_checkpoint(str(copy)).fingerprint() != open_checkpoint(str(tiny_t5_dir)).fingerprint()


def test_weights_of_more_blocks_than_the_configuration_has_are_refused(tiny_t5_dir: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(tiny_t5_dir, copy)
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps(config | {"num_layers": 2, "num_decoder_layers": 3}))
    with pytest.raises(BackboneError, match=r"holds encoder\.block\.2\..*, but config\.json has 2 blocks in encoder\.block"):
        LocalBackbone.load(str(copy), precision="fp32")


def test_a_fingerprint_stays_what_saved_side_networks_have_on_record() -> None:
    recorded = "7871d70150dbcff9987c92e358ae7a267e480f99f122d7377e1a817fbc0f7a17"
    assert open_checkpoint("embedded:tiny-t5").fingerprint() == recorded


def test_a_fingerprint_is_remembered_until_a_file_changes_in_any_way(
    tiny_t5_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(remembered, "LEAST_BYTES", 0)
    copy, made = tmp_path / "copy", []
    shutil.copytree(tiny_t5_dir, copy)
    read = Checkpoint.tensor
    monkeypatch.setattr(Checkpoint, "tensor", lambda self, name: made.append(name) or read(self, name))

    def hashed() -> tuple[str, bool]:
        made.clear()
        return open_checkpoint(str(copy)).fingerprint(), bool(made)

    first, _ = hashed()
    assert hashed() == (first, True)  # written a moment ago: another write could look the same
    monkeypatch.setattr(remembered, "SETTLED", -10.0)
    assert hashed() == (first, True) and hashed() == (first, False)
    weights = copy / "model.safetensors"
    content, before = bytearray(weights.read_bytes()), weights.stat()
    content[-1] ^= 1
    weights.write_bytes(content)
    os.utime(weights, ns=(before.st_atime_ns, before.st_mtime_ns))  # same size, same time of writing
    second, anew = hashed()
    assert anew and second != first
    for broken in (tmp_path / "cache").rglob("*"):
        if broken.is_file():
            broken.write_text("damaged")
    assert hashed() == (second, True)
    shutil.rmtree(tmp_path / "cache")
    (tmp_path / "cache").write_text("no folder")
    assert hashed() == (second, True)


@pytest.mark.parametrize("fixture", ["tiny_t5_dir", "tiny_gated_t5_dir", "tiny_mt5_dir"])
def test_config_json_and_transformers_give_the_same_numbers(fixture: str, request: pytest.FixtureRequest) -> None:
    folder = str(request.getfixturevalue(fixture))
    shape = shape_of(folder)
    assert shape is not None and shape.spec == open_checkpoint(folder).spec


def _drop(name: str) -> Any:
    def change(folder: Path) -> None:
        weights = load_file(folder / "model.safetensors")
        del weights[name]
        save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})

    return change


def _config(**values: Any) -> Any:
    def change(folder: Path) -> None:
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(config | values))

    return change


def _only_a_pickle(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")


def _truncated(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:2000])


def _missing_shard(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"shared.weight": "model-00001-of-00002.safetensors"}}))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (_drop("encoder.block.1.layer.0.layer_norm.weight"), "has no tensor encoder.block.1.layer.0.layer_norm.weight"),
        (_config(d_ff=128), "has shape (64, 32) where config.json asks for (128, 32)"),
        (_config(model_type="bert"), "is a 'bert' model: choose a checkpoint of type t5, mt5, llama, "),
        (_only_a_pickle, "is a pickle, which can run code and is never loaded"),
        (_truncated, "is not a whole safetensors file"),
        (_missing_shard, "lacks model-00001-of-00002.safetensors"),
        (lambda folder: (folder / "config.json").write_text("{"), "can't be read as a model configuration"),
    ],
)
def test_a_broken_checkpoint_is_refused_in_one_line(damage: Any, message: str, tiny_t5_dir: Path, tmp_path: Path) -> None:
    shutil.copytree(tiny_t5_dir, tmp_path / "broken")
    damage(tmp_path / "broken")
    with pytest.raises(BackboneError) as caught:
        LocalBackbone.load(str(tmp_path / "broken"), precision="fp32")
    assert message in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("name", "precision", "message"),
    [
        ("google-t5/t5-nowhere", "fp32", "download it first where there is a network"),
        ("./nowhere", "fp32", "is no folder"),
        ("embedded:tiny-t6", "fp32", "Did you mean 'embedded:tiny-t5'?"),
        ("embedded:tiny-t5", "fp16", "T5 overflows in it"),
        ("embedded:tiny-t5", "int9", "Did you mean 'int8'?"),
    ],
)
def test_a_backbone_that_can_not_be_had_says_what_to_write(name: str, precision: str, message: str) -> None:
    from lst_scale.errors import LstScaleError

    with pytest.raises(LstScaleError) as caught:
        LocalBackbone.load(name, precision=precision)
    assert message in str(caught.value)
