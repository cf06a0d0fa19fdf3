"""A LadderModel in transformers' own Seq2SeqTrainer, with generation, checkpoints and resume."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import GenerationConfig, Seq2SeqTrainer, Seq2SeqTrainingArguments

from helpers.tiny import batch, tiny_ladder, tiny_t5
from lst_scale import LadderConfig, LadderModel
from lst_scale.errors import LadderError

CONFIG = LadderConfig(reduction_factor=2, side_layers=(0, 2))


def rows() -> list[dict[str, Any]]:
    whole = batch(num_rows=8)
    whole["labels"][whole["labels"] == -100] = 3
    return [{name: tensor[row] for name, tensor in whole.items()} for row in range(8)]


def trainer_of(folder: Path, model: LadderModel, **changes: Any) -> Seq2SeqTrainer:
    options: dict[str, Any] = {
        "output_dir": str(folder),
        "use_cpu": True,
        "per_device_train_batch_size": 4,
        "per_device_eval_batch_size": 3,
        "max_steps": 4,
        "save_steps": 2,
        "eval_steps": 2,
        "eval_strategy": "steps",
        "learning_rate": 1e-2,
        "predict_with_generate": True,
        "generation_num_beams": 2,
        "generation_max_length": 6,
        "load_best_model_at_end": True,
        "report_to": [],
        "disable_tqdm": True,
    } | changes
    arguments = Seq2SeqTrainingArguments(**options)
    return Seq2SeqTrainer(model=model, args=arguments, train_dataset=rows(), eval_dataset=rows(), compute_metrics=lambda _: {"ours": 1.0})


@pytest.fixture
def t5() -> Any:
    return tiny_t5()


def test_seq2seq_trainer_trains_evaluates_predicts_and_resumes_and_its_checkpoints_open(t5: Any, tmp_path: Path) -> None:
    model = LadderModel(t5, CONFIG)
    trainer = trainer_of(tmp_path, model)
    trainer.train()
    assert trainer.evaluate()["eval_loss"] > 0
    found = trainer.predict(rows())
    expected = model.generate(batch(num_rows=8)["input_ids"], batch(num_rows=8)["attention_mask"], num_beams=2, max_length=6)
    assert torch.equal(torch.tensor(found.predictions)[:, : expected.shape[1]], expected)

    trainer.save_model(str(tmp_path / "last"))
    for folder in (trainer.state.best_model_checkpoint, tmp_path / "last"):
        again = LadderModel.from_pretrained(str(folder), t5)
        assert torch.equal(again(**batch()).logits, model.eval()(**batch()).logits)

    resumed = LadderModel(t5, CONFIG)
    second = trainer_of(tmp_path, resumed, load_best_model_at_end=False)
    second.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    last = LadderModel.from_pretrained(tmp_path / "checkpoint-4", t5)
    assert second.state.global_step == 4
    for name, weight in last.side.state_dict().items():
        assert torch.equal(resumed.side.state_dict()[name], weight), name


def test_generation_takes_the_trainers_arguments(t5: Any) -> None:
    model, ids, mask = tiny_ladder(t5), batch()["input_ids"], batch()["attention_mask"]
    expected = model.generate(ids, mask, max_new_tokens=4)
    assert torch.equal(model.generate(inputs=ids, attention_mask=mask, max_new_tokens=4, synced_gpus=False), expected)
    config = GenerationConfig(max_new_tokens=4, decoder_start_token_id=0, pad_token_id=0, eos_token_id=1)
    assert torch.equal(model.generate(input_ids=ids, attention_mask=mask, labels=batch()["labels"], generation_config=config), expected)
    with pytest.raises(LadderError, match=r"^generate needs input_ids"):
        model.generate(attention_mask=mask)
    with pytest.raises(LadderError, match=r"^generate takes input_ids or inputs, which are two names of one thing: write one of them"):
        model.generate(ids, inputs=ids)


def test_a_state_dict_of_another_design_or_backbone_is_refused_where_shapes_are_the_same(t5: Any) -> None:
    state = LadderModel(t5, CONFIG).state_dict()
    other = LadderModel(t5, LadderConfig(reduction_factor=2, side_layers=(0, 2), normalize_taps=True))
    with pytest.raises(LadderError, match=r"^these weights were trained with normalize_taps False instead of True: build the model so"):
        other.load_state_dict(state)
    with pytest.raises(LadderError, match=r"^these weights were trained with another backbone"):
        LadderModel(tiny_t5(seed=5), CONFIG).load_state_dict(state)
    del state["ladder_config"]
    other.load_state_dict(state)
