"""Ladders in the trainers of transformers, TRL and accelerate, beside decoder-only models; `test_trainer.py` is of encoder-decoders."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from datasets import Dataset
from peft import AutoPeftModelForCausalLM, PeftModel
from torch import Tensor, nn
from transformers import (
    DataCollatorForLanguageModeling,
    DataCollatorForSeq2Seq,
    Seq2SeqTrainer,
    Seq2SeqTrainingArguments,
    Trainer,
    TrainingArguments,
)
from trl import SFTConfig, SFTTrainer

from helpers.llama_runs import ENDS, make_tokenizer
from helpers.llamas import FAMILIES, make_llama
from helpers.tiny import batch, tiny_t5
from lst_scale import LadderConfig, LadderModel
from lst_scale.errors import LadderError
from lst_scale.peft import LadderPeftConfig

TEXTS = [f"{word} film number {number}, seen twice" for number, word in enumerate(["a fine", "a dull", "one more long", "no"] * 4)]
DESIGN: dict[str, Any] = {"reduction_factor": 8, "side_layers": [1, 3], "start_as_backbone": True}
COMMON: dict[str, Any] = {"use_cpu": True, "report_to": [], "disable_tqdm": True, "learning_rate": 1e-2, "lr_scheduler_type": "constant"}
COMMON |= {"logging_steps": 1, "seed": 3, "dataloader_pin_memory": False}


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    found = make_tokenizer(**ENDS)
    found.pad_token = found.eos_token
    return found


@pytest.fixture
def plain(tokenizer: Any) -> Any:
    return make_llama("llama", vocab_size=len(tokenizer), bos_token_id=0, eos_token_id=1, pad_token_id=None)


def ladder(model: Any, **changes: Any) -> LadderModel:
    torch.manual_seed(7)
    made = LadderModel(model, LadderConfig(**(DESIGN | changes)))
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.05)
    return made


def weights(model: LadderModel) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in model.side.state_dict().items()}


def assert_same(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    assert not [name for name in expected if not torch.equal(found[name], expected[name])]


def watch_grad(model: Any) -> list[bool]:
    """Return a list that says of every output of a block of a plain model whether it requires a gradient."""
    seen: list[bool] = []
    for block in model.model.layers:
        block.register_forward_hook(lambda _m, _i, out: seen.append((out[0] if isinstance(out, tuple) else out).requires_grad))
    return seen


# TRL


def sft(folder: Path, model: Any, tokenizer: Any, *, peft_config: Any = None, rows: Any = None, **changes: Any) -> SFTTrainer:
    options = COMMON | {"max_steps": 4, "save_steps": 2, "per_device_train_batch_size": 2, "bf16": False, "max_length": 32} | changes
    arguments = SFTConfig(output_dir=str(folder), **options)
    rows = Dataset.from_dict({"text": TEXTS}) if rows is None else rows
    return SFTTrainer(model=model, args=arguments, train_dataset=rows, processing_class=tokenizer, peft_config=peft_config)


def test_sft_trainer_trains_and_resumes_a_ladder_bit_for_bit(plain: Any, tokenizer: Any, tmp_path: Path) -> None:
    model, seen = ladder(plain, dropout=0.1), watch_grad(plain)
    before = {name: tensor.clone() for name, tensor in plain.state_dict().items()}
    trainer = sft(tmp_path, model, tokenizer)
    assert trainer.args.activation_checkpointing, "TRL's default, which lets a gradient into the embeddings of other models"
    trainer.train()
    assert seen and not any(seen), "the frozen backbone stays under no_grad"
    assert not plain.training and all(torch.equal(tensor, plain.state_dict()[name]) for name, tensor in before.items())
    losses = [line["loss"] for line in trainer.state.log_history if "loss" in line]
    assert losses[-1] < losses[0]

    resumed = ladder(plain, dropout=0.1)
    sft(tmp_path, resumed, tokenizer).train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert_same(weights(resumed), weights(model))
    opened = LadderModel.from_pretrained(tmp_path / "checkpoint-4", plain)
    assert_same(weights(opened), weights(model))
    assert (tmp_path / "checkpoint-4" / "model.safetensors").stat().st_size < 5 * sum(p.numel() * 4 for p in model.parameters())


def test_trl_s_loss_without_logits_is_the_ladder_s_own(plain: Any, tokenizer: Any, tmp_path: Path) -> None:
    model = ladder(plain)
    trainer = sft(tmp_path, model, tokenizer)
    inputs = trainer.data_collator([trainer.train_dataset[row] for row in range(4)])
    expected = model(**inputs).loss
    found = trainer.compute_loss(model, dict(inputs))
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)  # sums of logits in float32, whole and in chunks
    gradients = [torch.autograd.grad(loss, list(model.parameters())) for loss in (expected, found)]
    for one, other in zip(*gradients, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("model_type", ["gemma2", "granite", "qwen3"])  # with a soft cap, a divisor, a tied head
def test_last_state_times_the_head_is_the_logits_of_every_kind_of_head(model_type: str, tmp_path: Path, tokenizer: Any) -> None:
    plain = make_llama(model_type, vocab_size=len(tokenizer), bos_token_id=0, eos_token_id=1, pad_token_id=None)
    model = ladder(plain)
    trainer = sft(tmp_path, model, tokenizer)
    inputs = trainer.data_collator([trainer.train_dataset[row] for row in range(4)])
    torch.testing.assert_close(trainer.compute_loss(model, dict(inputs)), model(**inputs).loss, rtol=1e-4, atol=1e-5)


def test_sft_trainer_makes_an_adapter_of_peft(plain: Any, tokenizer: Any, tmp_path: Path) -> None:
    base = tmp_path / "base"
    plain.save_pretrained(base)
    seen = watch_grad(plain)
    config = LadderPeftConfig(task_type="CAUSAL_LM", dropout=0.1, **DESIGN)
    trainer = sft(tmp_path / "run", plain, tokenizer, peft_config=config)
    trainer.train()
    model = trainer.model
    assert isinstance(model, PeftModel) and seen and not any(seen)
    losses = [line["loss"] for line in trainer.state.log_history if "loss" in line]
    assert losses[-1] < losses[0]

    again = make_llama("llama", vocab_size=len(tokenizer), bos_token_id=0, eos_token_id=1, pad_token_id=None)
    second = sft(tmp_path / "run", again, tokenizer, peft_config=config)
    second.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-2"))
    pairs = zip(model.named_parameters(), second.model.named_parameters(), strict=True)
    assert all(torch.equal(one, other) for (_, one), (_, other) in pairs)

    trainer.save_model(str(tmp_path / "adapter"))
    inputs = trainer.data_collator([trainer.train_dataset[row] for row in range(4)])
    with torch.no_grad():
        expected, plains = model.eval()(**inputs), again.eval().forward(**inputs)
        whole = trainer.compute_loss(model, dict(inputs))
    torch.testing.assert_close(whole, expected.loss, rtol=1e-5, atol=1e-6)
    assert not torch.allclose(expected.logits, plains.logits)
    # TRL left its own forward pass on the plain model, which another beside it has not
    fresh = make_llama("llama", vocab_size=len(tokenizer), bos_token_id=0, eos_token_id=1, pad_token_id=None)
    with torch.no_grad():
        assert torch.equal(PeftModel.from_pretrained(fresh, tmp_path / "adapter")(**inputs).logits, expected.logits)
    assert AutoPeftModelForCausalLM is not None


def test_packed_rows_are_refused_in_one_line(plain: Any, tokenizer: Any, tmp_path: Path) -> None:
    trainer = sft(tmp_path, ladder(plain), tokenizer, padding_free=True, max_length=None)
    with pytest.raises(LadderError, match=r"^a ladder reads one text a row, padded: leave padding_free out"):
        trainer.train()


def test_conversations_train_on_the_assistant_s_words_alone(plain: Any, tokenizer: Any, tmp_path: Path) -> None:
    tokenizer = make_tokenizer(**ENDS)
    tokenizer.pad_token = tokenizer.eos_token
    tokenizer.chat_template = (
        "{% for message in messages %}{% if message['role'] == 'assistant' %}"
        "{% generation %}{{ message['content'] }}</s>{% endgeneration %}{% else %}{{ message['content'] }}\n{% endif %}{% endfor %}"
    )
    talk = [[{"role": "user", "content": text}, {"role": "assistant", "content": "good"}] for text in TEXTS]
    trainer = sft(tmp_path, ladder(plain), tokenizer, rows=Dataset.from_dict({"messages": talk}), assistant_only_loss=True, max_steps=8)
    trainer.train()
    losses = [line["loss"] for line in trainer.state.log_history if "loss" in line]
    assert losses[-1] < losses[0] - 1


# transformers


def rows_of(tokenizer: Any) -> list[dict[str, Any]]:
    return [{"input_ids": tokenizer(text).input_ids} for text in TEXTS]


def trainer(folder: Path, model: LadderModel, tokenizer: Any, **changes: Any) -> Trainer:
    options = COMMON | {"max_steps": 4, "save_steps": 2, "per_device_train_batch_size": 4} | changes
    collator = DataCollatorForLanguageModeling(tokenizer, mlm=False)
    rows = rows_of(tokenizer)
    arguments = TrainingArguments(output_dir=str(folder), **options)
    return Trainer(model=model, args=arguments, data_collator=collator, train_dataset=rows, eval_dataset=rows, processing_class=tokenizer)


def test_trainer_trains_evaluates_and_resumes_bit_for_bit(plain: Any, tokenizer: Any, tmp_path: Path) -> None:
    model = ladder(plain, dropout=0.1)
    first = trainer(tmp_path, model, tokenizer, eval_strategy="steps", eval_steps=2, gradient_checkpointing=True)
    first.train()
    scores = [line["eval_loss"] for line in first.state.log_history if "eval_loss" in line]
    assert scores[1] < scores[0]
    resumed = ladder(plain, dropout=0.1)
    trainer(tmp_path, resumed, tokenizer).train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert_same(weights(resumed), weights(model))


def test_micro_batches_of_unlike_lengths_add_up_to_one_batch(plain: Any, tokenizer: Any, tmp_path: Path) -> None:
    """A mean of means would weigh the tokens of short rows more."""
    found = []
    for micro in (8, 2):
        model = ladder(plain)
        steps = {"max_steps": 1, "per_device_train_batch_size": micro, "gradient_accumulation_steps": 8 // micro, "save_strategy": "no"}
        trainer(tmp_path / str(micro), model, tokenizer, optim="sgd", max_grad_norm=0.0, **steps).train()
        found.append(weights(model))
    for name, weight in found[0].items():
        torch.testing.assert_close(found[1][name], weight, rtol=1e-4, atol=1e-6)  # float32 sums in another order


def test_labels_smoothed_by_the_trainer_are_the_next_tokens(plain: Any, tokenizer: Any, tmp_path: Path) -> None:
    model = ladder(plain)
    made = trainer(tmp_path, model, tokenizer, label_smoothing_factor=0.1)
    inputs = made.data_collator(rows_of(tokenizer)[:4])
    logits, labels = model(**inputs).logits[:, :-1].log_softmax(-1), inputs["labels"][:, 1:]
    kept = labels != -100
    nll = -logits.gather(-1, labels.clamp(min=0)[..., None])[..., 0][kept].mean()
    expected = 0.9 * nll + 0.1 * -logits.mean(-1)[kept].mean()
    torch.testing.assert_close(made.compute_loss(model, dict(inputs)), expected, rtol=1e-5, atol=1e-6)


def test_a_collator_that_makes_the_target_s_inputs_gives_the_same_loss(tmp_path: Path, tokenizer: Any) -> None:
    model = LadderModel(tiny_t5(), LadderConfig(reduction_factor=2, side_layers=(0, 2))).eval()
    whole = batch()
    lists = [
        {name: row[row != -100].tolist() for name, row in zip(whole, values, strict=True)} for values in zip(*whole.values(), strict=True)
    ]
    without, with_model = (DataCollatorForSeq2Seq(tokenizer, model=given)([dict(row) for row in lists]) for given in (None, model))
    assert "decoder_input_ids" in with_model and "decoder_input_ids" not in without
    assert torch.equal(model(**with_model).loss, model(**without).loss)
    causal = ladder(make_llama("llama"))
    assert "decoder_input_ids" not in DataCollatorForSeq2Seq(tokenizer, model=causal)([dict(row) for row in lists])


def test_seq2seq_trainer_smooths_labels(tmp_path: Path) -> None:
    model = LadderModel(tiny_t5(), LadderConfig(reduction_factor=2, side_layers=(0, 2))).eval()
    arguments = Seq2SeqTrainingArguments(output_dir=str(tmp_path), label_smoothing_factor=0.1, **COMMON)

    def collate(rows: list[Any]) -> dict[str, Tensor]:
        return rows[0] | {"decoder_input_ids": model.prepare_decoder_input_ids_from_labels(rows[0]["labels"])}

    made = Seq2SeqTrainer(model=model, args=arguments, data_collator=collate)
    inputs = collate([batch()])
    plain = made.compute_loss(model, dict(inputs))
    kept = inputs["labels"] != -100
    spread = -model(**inputs).logits.log_softmax(-1).mean(-1)[kept].mean()
    torch.testing.assert_close(plain, 0.9 * model(**inputs).loss + 0.1 * spread, rtol=1e-5, atol=1e-6)


# accelerate


def test_accelerate_saves_and_resumes_bit_for_bit(plain: Any, tokenizer: Any, tmp_path: Path) -> None:
    collate = DataCollatorForLanguageModeling(tokenizer, mlm=False)
    batches = [collate(rows_of(tokenizer)[first : first + 4]) for first in (0, 4, 8, 12)]

    def start() -> tuple[Accelerator, LadderModel, Any]:
        accelerator, model = Accelerator(cpu=True), ladder(plain, dropout=0.1)
        model, optimizer = accelerator.prepare(model, torch.optim.AdamW(model.parameters(), lr=1e-2))
        return accelerator, model.train(), optimizer

    def steps(accelerator: Accelerator, model: LadderModel, optimizer: Any, some: list[Any]) -> None:
        for one in some:
            accelerator.backward(model(**one).loss)
            optimizer.step()
            optimizer.zero_grad()

    accelerator, model, optimizer = start()
    steps(accelerator, model, optimizer, batches[:2])
    accelerator.save_state(str(tmp_path / "state"))
    steps(accelerator, model, optimizer, batches[2:])
    accelerator.save_model(accelerator.unwrap_model(model), str(tmp_path / "model"))

    other, resumed, its_optimizer = start()
    other.load_state(str(tmp_path / "state"))
    steps(other, resumed, its_optimizer, batches[2:])
    assert_same(weights(resumed), weights(model))
    assert_same(weights(LadderModel.from_pretrained(tmp_path / "model", plain)), weights(model))


# What tools ask


def test_parameters_are_counted_in_the_words_of_transformers_and_peft(plain: Any, capsys: pytest.CaptureFixture[str]) -> None:
    model = ladder(plain)
    side, whole = sum(p.numel() for p in model.parameters()), plain.num_parameters()
    assert model.num_parameters(only_trainable=True) == side and model.num_parameters() == side + whole
    assert model.num_parameters(exclude_embeddings=True) == side + plain.num_parameters(exclude_embeddings=True)
    assert model.get_nb_trainable_parameters() == (side, side + whole)
    model.print_trainable_parameters()
    share = 100 * side / (side + whole)
    assert capsys.readouterr().out == f"trainable params: {side:,d} || all params: {side + whole:,d} || trainable%: {share:.4f}\n"
    model.side.upsample.requires_grad_(False)
    assert model.num_parameters(only_trainable=True) < side and model.num_parameters() == side + whole


@pytest.mark.parametrize("model_type", list(FAMILIES))
def test_hidden_states_are_those_that_the_ladder_reads_and_the_one_that_the_head_is_given(model_type: str) -> None:
    plain = make_llama(model_type)
    model = ladder(plain).eval()
    ids = torch.randint(3, 90, (2, 7), generator=torch.Generator().manual_seed(0))
    told = model(input_ids=ids, labels=ids, output_hidden_states=True)
    usual = model(input_ids=ids, labels=ids)
    assert usual.hidden_states is None
    assert torch.equal(told.logits, usual.logits) and torch.equal(told.loss, usual.loss)
    theirs = plain(ids, output_hidden_states=True).hidden_states  # the embeddings, then after each block
    for found, expected in zip(told.hidden_states[1:-1], (theirs[2], plain_block(plain, ids, 3)), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    assert not any(state.requires_grad for state in told.hidden_states[:-1]) and told.hidden_states[-1].requires_grad
    assert torch.equal(model.backbone.head(told.hidden_states[-1]), told.logits)


def plain_block(plain: Any, ids: Tensor, number: int) -> Tensor:
    """Return what a block gives, before the final norm."""
    kept: list[Tensor] = []
    handle = plain.model.layers[number].register_forward_hook(lambda _m, _i, out: kept.append(out[0] if isinstance(out, tuple) else out))
    with torch.no_grad():
        plain(ids)
    handle.remove()
    return kept[0]


def test_hidden_states_beside_an_encoder_decoder() -> None:
    model = LadderModel(tiny_t5(), LadderConfig(reduction_factor=2, side_layers=(0, 2))).eval()
    told = model(**batch(), output_hidden_states=True)
    assert torch.equal(told.logits, model(**batch()).logits)
    assert [state.shape for state in told.encoder_hidden_states] == [(4, 9, 32)] * 3
    assert [state.shape for state in told.decoder_hidden_states] == [(4, 5, 32)] * 4
    assert torch.equal(model.backbone.head(told.decoder_hidden_states[-1]), told.logits)
    found = model.generate(batch()["input_ids"], max_new_tokens=3, output_hidden_states=True, return_dict_in_generate=True)
    assert len(found.decoder_hidden_states) == found.sequences.shape[1] - 1


@pytest.mark.parametrize(
    ("ask", "message"),
    [
        (
            lambda model: model.resize_token_embeddings(500),
            r"^a frozen backbone learns no new tokens: resize the model of transformers first",
        ),
        (lambda model: model.get_input_embeddings(), r"^the backbone's word table is frozen"),
        (lambda model: model(input_ids=torch.ones(1, 3, dtype=torch.long), output_attentions=True), r"^a ladder returns no attentions"),
    ],
)
def test_what_a_ladder_is_not_is_one_line(ask: Callable[[LadderModel], Any], message: str, plain: Any) -> None:
    with pytest.raises(LadderError, match=message) as refusal:
        ask(ladder(plain))
    assert "\n" not in str(refusal.value)


def test_an_encoder_decoder_in_a_trainer_of_trl_is_one_line() -> None:
    model = LadderModel(tiny_t5(), LadderConfig(reduction_factor=2, side_layers=(0, 2)))
    with pytest.raises(LadderError, match=r"^an encoder-decoder has no last state without a target"):
        model.base_model(input_ids=batch()["input_ids"])
    assert isinstance(model, nn.Module)
