"""A GGUF file becomes a checkpoint that says what transformers reads in it, and what is no such file is refused in one line."""

from __future__ import annotations

from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
from typer.testing import CliRunner

from helpers.llama_runs import ENDS, make_tokenizer
from helpers.llamas import make_llama
from lst_scale.backbone import load_backbone
from lst_scale.backbone.model_config import find_config
from lst_scale.backbone.taps import TapRequest
from lst_scale.backbone.weights.gguf import convert, find
from lst_scale.cli.main import app
from lst_scale.data.tokenizer import load_tokenizer
from lst_scale.errors import BackboneError
from lst_scale.inputs.batch import Inputs

NAMES = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
}


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama of four blocks with a tokenizer, in the format's own names."""
    import json

    folder = tmp_path_factory.mktemp("gguf")
    tokenizer = make_tokenizer(**ENDS)
    model = make_llama("llama", attention_bias=False, tie_word_embeddings=True, vocab_size=len(tokenizer), bos_token_id=0, eos_token_id=1)
    config, path = model.config, folder / "model.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)
    backend = json.loads(tokenizer.backend_tokenizer.to_str())["model"]
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(sorted(backend["vocab"], key=backend["vocab"].get))
    writer.add_token_types([3 if number < 2 else 1 for number in range(len(backend["vocab"]))])
    writer.add_token_merges([" ".join(pair) for pair in backend["merges"]])
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(1)
    for name, tensor in model.state_dict().items():
        if name == "lm_head.weight":
            continue
        inner = name.removeprefix("model.").removesuffix(".weight")
        if inner.startswith("layers."):
            _, number, part = inner.split(".", 2)
            inner = f"blk.{number}.{NAMES[part]}"
        known = {"embed_tokens": "token_embd", "norm": "output_norm"}
        writer.add_tensor(f"{known.get(inner, inner)}.weight", tensor.numpy().astype(np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def test_the_checkpoint_computes_what_transformers_reads_in_the_file(file: Path, tmp_path: Path) -> None:
    assert convert(str(file), tmp_path / "checkpoint") > 0
    expected = AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name, dtype=torch.float32)
    backbone = load_backbone(str(tmp_path / "checkpoint"), revision=None, precision="fp32")
    ids = torch.arange(12)[None] + 5
    request = TapRequest(layers=(3,), target_final=True)
    taps = backbone(Inputs(source_BS=ids[:, :6], source_mask_BS=torch.ones(1, 6, dtype=torch.long), target_BT=ids[:, 6:]), request)
    assert taps.final_BTD is not None
    with torch.no_grad():
        torch.testing.assert_close(backbone.head(taps.final_BTD), expected(ids).logits[:, 6:], rtol=1e-4, atol=1e-4)
    text = "a big red dog is"
    assert load_tokenizer(str(tmp_path / "checkpoint"))(text, add_special_tokens=False).input_ids == (
        AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)(text, add_special_tokens=False).input_ids
    )
    with pytest.raises(BackboneError, match="is there already: write another name"):
        convert(str(file), tmp_path / "checkpoint")


def test_what_is_no_gguf_file_is_refused_and_leaves_nothing(file: Path, tmp_path: Path) -> None:
    damaged = tmp_path / "damaged.gguf"
    damaged.write_bytes(file.read_bytes()[:2000])
    for source, message in (
        (str(damaged), "can't be read as a GGUF model"),
        ("no-such-package", "neither a .gguf file nor an installed package"),
        ("typer", "brings 0 .gguf files"),
    ):
        with pytest.raises(BackboneError, match=message):
            convert(source, tmp_path / "out")
        done = CliRunner().invoke(app, ["from-gguf", source, str(tmp_path / "out")])
        assert done.exit_code != 0
    assert [path.name for path in tmp_path.iterdir()] == ["damaged.gguf"]
    assert find(str(file)) == file


def test_a_gguf_file_as_a_checkpoint_is_told_how_it_becomes_one(file: Path) -> None:
    for name in (file, file.parent):
        with pytest.raises(BackboneError, match=r"model.gguf is a GGUF file: write lst-scale from-gguf .*model.gguf FOLDER first"):
            find_config(str(name))
