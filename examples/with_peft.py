"""A ladder as an adapter of PEFT: two beside one frozen model, saved, read back, switched and turned off.

    python examples/with_peft.py

Any training loop will do, since the model is a PeftModel like any other; this one is four lines.
"""

from __future__ import annotations

import argparse
import json
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel, TaskType, get_peft_model
from transformers import AutoModelForSeq2SeqLM, AutoTokenizer

from lst_scale.peft import LadderPeftConfig
from lst_scale.system.assets import resolve


def batches(tokenizer: Any, field: str, size: int) -> Iterator[dict[str, torch.Tensor]]:
    """Yield rows of WordNet: the definition, and what `field` says of it."""
    rows = [json.loads(line) for line in Path(resolve("embedded:wordnet/train.jsonl")).read_text().splitlines()]
    random.Random(0).shuffle(rows)
    for start in range(0, len(rows), size):
        some = rows[start : start + size]
        texts = [f"<extra_id_0> : {row['definition']}" for row in some]
        batch = tokenizer(texts, text_target=[f"<extra_id_0> {row[field]}" for row in some], padding=True, truncation=True,
                          max_length=64, return_tensors="pt")  # fmt: skip
        batch["labels"][batch["labels"] == tokenizer.pad_token_id] = -100
        yield dict(batch)


def train(model: Any, tokenizer: Any, field: str, steps: int) -> None:
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=3e-3)
    model.train()
    losses = []
    for _, batch in zip(range(steps), batches(tokenizer, field, 16), strict=False):
        loss = model(**batch).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    print(f"{model.active_adapter}: loss {losses[0]:.3f} -> {losses[-1]:.3f}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="embedded:tiny-t5", help="a T5: a folder, or a name of the hub")
    parser.add_argument("--steps", type=int, default=60, help="of each adapter")
    parser.add_argument("--output", default="runs/with-peft")
    arguments = parser.parse_args()

    folder = resolve(arguments.model)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    config = LadderPeftConfig(task_type=TaskType.SEQ_2_SEQ_LM, reduction_factor=4, normalize_taps=True)

    model = get_peft_model(AutoModelForSeq2SeqLM.from_pretrained(folder), config, adapter_name="kind")
    model.print_trainable_parameters()
    train(model, tokenizer, "kind", arguments.steps)  # which kind of thing is defined?

    model.add_adapter("word", LadderPeftConfig(task_type=TaskType.SEQ_2_SEQ_LM, reduction_factor=4, side_layers=[1, 3]))
    model.set_adapter("word")
    train(model, tokenizer, "word", arguments.steps)  # which word is defined?
    model.save_pretrained(arguments.output)  # a folder an adapter

    base = AutoModelForSeq2SeqLM.from_pretrained(folder)
    again = PeftModel.from_pretrained(base, Path(arguments.output) / "kind", adapter_name="kind").eval()
    again.load_adapter(Path(arguments.output) / "word", adapter_name="word")
    question = tokenizer("<extra_id_0> : a small brown bird", return_tensors="pt")
    for name in ("kind", "word"):
        again.set_adapter(name)
        print(f"{name}:", tokenizer.decode(again.generate(**question, max_new_tokens=6)[0], skip_special_tokens=True))
    with again.disable_adapter():  # the plain model, bit for bit
        print("plain model:", tokenizer.decode(again.generate(**question, max_new_tokens=6)[0], skip_special_tokens=True))


if __name__ == "__main__":
    main()
