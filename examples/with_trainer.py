"""transformers' own Seq2SeqTrainer with a LadderModel: it trains, generates answers, keeps the best checkpoint and resumes.

    python examples/with_trainer.py

The question is the one that T5 was pretrained on, "which words are missing at <extra_id_0>?", asked of WordNet definitions.
"""

from __future__ import annotations

import argparse
from typing import Any

import numpy as np
from datasets import load_dataset
from transformers import AutoTokenizer, DataCollatorForSeq2Seq, Seq2SeqTrainer, Seq2SeqTrainingArguments

from lst_scale import LadderConfig, LadderModel
from lst_scale.system.assets import resolve


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="embedded:tiny-t5", help="a T5: a folder, or a name of the hub")
    parser.add_argument("--steps", type=int, default=150)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--rows", type=int, default=200, help="validation rows to answer at the end")
    parser.add_argument("--output", default="runs/with-trainer")
    arguments = parser.parse_args()

    tokenizer = AutoTokenizer.from_pretrained(resolve(arguments.model))

    def as_ids(row: dict[str, str]) -> dict[str, Any]:
        text = f"{row['word']} is a kind of <extra_id_0> : {row['definition']}"
        return tokenizer(text, text_target=f"<extra_id_0> {row['kind']}", truncation=True, max_length=64)

    files = {split: resolve(f"embedded:wordnet/{split}.jsonl") for split in ("train", "validation")}
    rows = load_dataset("json", data_files=files)
    rows = rows.map(as_ids, remove_columns=rows["train"].column_names)

    # A fresh side network on the frozen backbone. Parameters, state_dict() and checkpoints are the side network's alone.
    model = LadderModel(arguments.model, LadderConfig(side_layers="all", reduction_factor=4, normalize_taps=True, recompute=False))
    print(f"{sum(p.numel() for p in model.parameters()):,} parameters train")

    def accuracy(found: Any) -> dict[str, float]:
        said, wanted = (np.where(ids < 0, tokenizer.pad_token_id, ids) for ids in (found.predictions, found.label_ids))
        texts = [tokenizer.batch_decode(ids, skip_special_tokens=True) for ids in (said, wanted)]
        return {"accuracy": float(np.mean([a.strip() == b.strip() for a, b in zip(*texts, strict=True)]))}

    trainer = Seq2SeqTrainer(
        model=model,
        args=Seq2SeqTrainingArguments(
            output_dir=arguments.output,
            max_steps=arguments.steps,
            per_device_train_batch_size=arguments.batch,
            per_device_eval_batch_size=50,
            learning_rate=3e-3,
            logging_steps=max(1, arguments.steps // 5),
            predict_with_generate=True,
            generation_max_length=8,
            report_to=[],
            use_cpu=True,  # leave this out on a GPU
        ),
        train_dataset=rows["train"],
        eval_dataset=rows["validation"].select(range(arguments.rows)),
        data_collator=DataCollatorForSeq2Seq(tokenizer),
        compute_metrics=accuracy,
    )
    trainer.train()  # or trainer.train(resume_from_checkpoint=True)
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    print(f"loss {losses[0]:.3f} -> {losses[-1]:.3f}")
    print(f"validation accuracy {100 * trainer.evaluate()['eval_accuracy']:.1f} % (one of eight kinds)")

    trainer.save_model(arguments.output)
    again = LadderModel.from_pretrained(arguments.output, arguments.model)
    question = tokenizer("sparrow is a kind of <extra_id_0> : a small brown bird", return_tensors="pt")
    print("sparrow:", tokenizer.decode(again.generate(**question, max_new_tokens=6)[0], skip_special_tokens=True))


if __name__ == "__main__":
    main()
