"""A ladder as a PEFT adapter: on T5, Llama and Gemma shapes, and in the files of both sides."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import (
    AutoPeftModelForCausalLM,
    AutoPeftModelForSeq2SeqLM,
    PeftModel,
    TaskType,
    get_layer_status,
    get_model_status,
    get_peft_model,
)
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM, Trainer, TrainingArguments

from helpers.llamas import make_llama
from helpers.models import make_t5
from lst_scale.errors import LadderError
from lst_scale.peft import LadderPeftConfig, adapter_from_side_network, side_network_from_adapter
from lst_scale.side import files
from lst_scale.side.config import LadderConfig
from lst_scale.side.model import LadderModel

KINDS = ("t5", "llama", "gemma")


def folder_of(kind: str, folder: Path) -> Path:
    if kind == "t5":
        return make_t5(folder, dropout_rate=0.1)
    make_llama(kind).save_pretrained(folder)
    return folder


def plain(kind: str, folder: Path, dtype: torch.dtype = torch.float32) -> Any:
    auto = AutoModelForSeq2SeqLM if kind == "t5" else AutoModelForCausalLM
    return auto.from_pretrained(folder, dtype=dtype)


def config(kind: str, **changes: Any) -> LadderPeftConfig:
    task = TaskType.SEQ_2_SEQ_LM if kind == "t5" else TaskType.CAUSAL_LM
    return LadderPeftConfig(**({"task_type": task, "reduction_factor": 4, "side_layers": [0, 2], "dropout": 0.1} | changes))


def batch(rows: int = 2) -> dict[str, Tensor]:
    ids = torch.randint(3, 90, (rows, 7), generator=torch.Generator().manual_seed(1))
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids.clone()}


def train_a_little(model: Any) -> None:
    """Move the weights, so that adapters differ from fresh ones."""
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    model.train()
    for _ in range(3):
        model(**batch()).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.eval()


@torch.no_grad()
def logits(model: Any) -> Tensor:
    found: Tensor = model(**batch()).logits
    return found


@pytest.fixture(params=KINDS)
def kind(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def base(kind: str, tmp_path: Path) -> Path:
    return folder_of(kind, tmp_path / "base")


def test_saved_and_read_back(kind: str, base: Path, tmp_path: Path) -> None:
    model = get_peft_model(plain(kind, base), config(kind))
    train_a_little(model)
    model.save_pretrained(tmp_path / "adapter")
    assert {"adapter_config.json", "adapter_model.safetensors"} <= {path.name for path in (tmp_path / "adapter").iterdir()}
    again = PeftModel.from_pretrained(plain(kind, base), tmp_path / "adapter")
    assert torch.equal(logits(again), logits(model))
    auto = AutoPeftModelForSeq2SeqLM if kind == "t5" else AutoPeftModelForCausalLM
    assert torch.equal(logits(auto.from_pretrained(tmp_path / "adapter")), logits(model))
    assert torch.equal(
        again.generate(**{k: v for k, v in batch().items() if k != "labels"}, max_new_tokens=4),
        model.generate(**{k: v for k, v in batch().items() if k != "labels"}, max_new_tokens=4),
    )


def test_only_the_side_network_trains(kind: str, base: Path) -> None:
    source = plain(kind, base)
    before = {name: tensor.clone() for name, tensor in source.state_dict().items()}
    model = get_peft_model(source, config(kind))
    trainable, total = model.get_nb_trainable_parameters()
    assert 0 < trainable < total
    train_a_little(model)
    assert all(torch.equal(tensor, source.state_dict()[name]) for name, tensor in before.items())
    assert all("ladder_side" in name for name, p in model.named_parameters() if p.requires_grad)


def test_several_adapters_take_turns(kind: str, base: Path) -> None:
    model = get_peft_model(plain(kind, base), config(kind))
    train_a_little(model)
    first = logits(model)
    model.add_adapter("other", config(kind, side_layers=[1]))
    assert torch.equal(logits(model), first)
    model.set_adapter("other")
    assert not torch.equal(logits(model), first)
    status = get_model_status(model)
    assert status.available_adapters == ["default", "other"] and status.active_adapters == ["other"]
    assert status.requires_grad == {"default": False, "other": True}
    assert [layer.name for layer in get_layer_status(model)] == ["model.ladder"]
    model.set_adapter("default")
    assert torch.equal(logits(model), first)
    model.delete_adapter("other")
    assert torch.equal(logits(model), first) and list(model.peft_config) == ["default"]


def test_an_adapter_is_read_under_another_name(kind: str, base: Path, tmp_path: Path) -> None:
    model = get_peft_model(plain(kind, base), config(kind), adapter_name="first")
    train_a_little(model)
    model.add_adapter("second", config(kind, side_layers=[1]))
    model.save_pretrained(tmp_path, selected_adapters=["first", "second"])
    again = PeftModel.from_pretrained(plain(kind, base), tmp_path / "second", adapter_name="a")
    again.load_adapter(tmp_path / "first", adapter_name="b")
    again.set_adapter("b")
    assert torch.equal(logits(again), logits(model))
    model.set_adapter("second")
    again.set_adapter("a")
    assert torch.equal(logits(again.eval()), logits(model.eval()))


def test_disabled_is_the_plain_model(kind: str, base: Path) -> None:
    expected = logits(plain(kind, base).eval())
    model = get_peft_model(plain(kind, base), config(kind)).eval()
    mine = logits(model)
    with model.disable_adapter():
        assert torch.equal(logits(model), expected)
    assert torch.equal(logits(model), mine) and not torch.equal(mine, expected)
    unloaded = model.unload().eval()
    assert torch.equal(logits(unloaded), expected) and "peft_config" not in vars(unloaded)


def test_embeddings_in_place_of_ids_are_refused(kind: str, base: Path) -> None:
    model = get_peft_model(plain(kind, base), config(kind))
    with pytest.raises(LadderError, match=r"^a ladder reads input_ids, .*: give those in place of inputs_embeds$"):
        model(inputs_embeds=model.get_input_embeddings()(batch()["input_ids"]))


def test_merging_is_refused(kind: str, base: Path) -> None:
    model = get_peft_model(plain(kind, base), config(kind))
    for merge in (model.merge_adapter, model.merge_and_unload):
        with pytest.raises(LadderError, match=r"^a ladder can't be merged: it is a network beside the backbone"):
            merge()


def test_bf16_backbone(kind: str, base: Path) -> None:
    model = get_peft_model(plain(kind, base, torch.bfloat16), config(kind))
    train_a_little(model)
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}
    assert torch.isfinite(logits(model)).all()


def test_gradient_checkpointing_leaves_the_backbone_without_grad(kind: str, base: Path) -> None:
    source = plain(kind, base)
    source.gradient_checkpointing_enable()
    model = get_peft_model(source, config(kind, dropout=0.0))
    model.gradient_checkpointing_enable()
    model.enable_input_require_grads()
    seen: list[bool] = []
    stack = source.encoder.block if kind == "t5" else source.model.layers
    for block in stack:
        block.register_forward_hook(lambda _m, _i, out: seen.append((out[0] if isinstance(out, tuple) else out).requires_grad))
    model.train()
    model(**batch()).loss.backward()
    assert seen and not any(seen)
    without = get_peft_model(plain(kind, base), config(kind, dropout=0.0)).train()
    without(**batch()).loss.backward()
    pairs = zip(model.named_parameters(), without.named_parameters(), strict=True)
    assert all(torch.equal(a.grad, b.grad) for (_, a), (_, b) in pairs if a.grad is not None)


def test_an_adapter_of_another_model_is_refused(kind: str, base: Path, tmp_path: Path) -> None:
    get_peft_model(plain(kind, base), config(kind)).save_pretrained(tmp_path / "adapter")
    other = plain(kind, base)
    with torch.no_grad():
        other.get_input_embeddings().weight.add_(1)
    with pytest.raises(LadderError, match=r"another backbone") as refusal:
        PeftModel.from_pretrained(other, tmp_path / "adapter")
    assert "\n" not in str(refusal.value)


def test_files_go_both_ways(kind: str, base: Path, tmp_path: Path) -> None:
    ladder = LadderModel(str(base), config(kind).ladder)
    with torch.no_grad():
        for parameter in ladder.parameters():
            parameter.add_(0.01 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(2)))
    ladder.eval().save_pretrained(tmp_path / "ours")
    adapter_from_side_network(tmp_path / "ours", tmp_path / "adapter")
    model = PeftModel.from_pretrained(plain(kind, base), tmp_path / "adapter")
    assert torch.equal(logits(model), logits(ladder))
    side_network_from_adapter(tmp_path / "adapter", tmp_path / "back")
    back, ours = (files.read(tmp_path / name) for name in ("back", "ours"))
    assert (back.config, back.identity, back.spec, back.design) == (ours.config, ours.identity, ours.spec, ours.design)
    assert back.weights.keys() == ours.weights.keys() and all(torch.equal(back.weights[name], ours.weights[name]) for name in ours.weights)
    trained = get_peft_model(plain(kind, base), config(kind))
    train_a_little(trained)
    trained.save_pretrained(tmp_path / "theirs")
    side_network_from_adapter(tmp_path / "theirs", tmp_path / "as_ours")
    assert torch.equal(logits(LadderModel.from_pretrained(tmp_path / "as_ours", backbone=str(base))), logits(trained))
    assert json.loads((tmp_path / "theirs" / "adapter_config.json").read_text())["peft_type"] == "LADDER"


def trainer(model: Any, folder: Path, steps: int) -> Trainer:
    rows = [{name: tensor[0] for name, tensor in batch(1).items()} for _ in range(16)]
    arguments = TrainingArguments(
        output_dir=str(folder), max_steps=steps, save_steps=2, per_device_train_batch_size=2, report_to=[], use_cpu=True,
        seed=3, learning_rate=1e-2, lr_scheduler_type="constant", logging_steps=1, disable_tqdm=True, dataloader_pin_memory=False,
    )  # fmt: skip
    return Trainer(model=model, args=arguments, train_dataset=rows)


def test_trainer_resumes_bit_identical(kind: str, base: Path, tmp_path: Path) -> None:
    whole = get_peft_model(plain(kind, base), config(kind))
    trainer(whole, tmp_path / "whole", 4).train()
    resumed = get_peft_model(plain(kind, base), config(kind))
    trainer(resumed, tmp_path / "resumed", 4).train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-2"))
    pairs = list(zip(whole.named_parameters(), resumed.named_parameters(), strict=True))
    assert all(torch.equal(a, b) for (_, a), (_, b) in pairs)
    fresh = dict(get_peft_model(plain(kind, base), config(kind)).named_parameters())
    assert any(not torch.equal(p, fresh[name]) for name, p in whole.named_parameters())


def test_all_layers_by_name() -> None:
    assert LadderPeftConfig(side_layers="all").ladder == LadderConfig(side_layers="all")
