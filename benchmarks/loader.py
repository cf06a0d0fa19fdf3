"""Does a device wait for its rows? Tokens a second of the loader alone, of a training step, and of HF's Trainer's loader on the same rows.

    python benchmarks/loader.py

20,000 rows of 25 words in tables on disk, global batches of 32, one epoch in order; the embedded backbone's quickstart for the step. HF's
loader has the same ids in a data set of `datasets` and DataCollatorForSeq2Seq, without workers. Tokens are those of sources that are not
padding; each is counted by its loader's own pace, one after another, --rounds times in turn; medians. The step's is that of --steps steps.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from rows import ROOT, make_rows

BATCH = 32


def pace(batches: Iterable[Any]) -> float:
    """Return source tokens a second."""
    start, tokens = time.perf_counter(), 0
    for mask_BS in batches:
        tokens += int(mask_BS.sum())
    return tokens / (time.perf_counter() - start)


def our_split(rows: Path, tokenizer: Any) -> Any:
    from lst_scale.data.encode import encode
    from lst_scale.data.files import load_records
    from lst_scale.data.rows import Row, keep_rows

    records = load_records(str(rows), "train")
    made = (Row(record["text"], record["label"]) for record in records)
    kept = keep_rows(made, lambda: {"benchmark": str(rows)}, tally=False, likely_bytes=200 * len(records))
    return encode(kept, tokenizer, 64, None)


def our_masks(split: Any, epoch: int) -> Iterable[Any]:
    from lst_scale.data.ahead import Ahead
    from lst_scale.data.batches import training_steps

    steps = training_steps(split, epoch=epoch, seed=0, global_batch_size=BATCH, micro_batch_size=BATCH, rank=0, world_size=1)
    ahead = Ahead(lambda number: list(steps[number].micro_batches), len(steps))
    return (batch.attention_mask_BS for number in range(len(steps)) for batch in ahead[number])


def their_masks(split: Any, tokenizer: Any, folder: Path) -> Iterable[Any]:
    from datasets import Dataset
    from transformers import AutoModelForSeq2SeqLM, DataCollatorForSeq2Seq, Seq2SeqTrainer, Seq2SeqTrainingArguments

    ids = {"input_ids": [row.tolist() for row in split.input_ids], "labels": [row.tolist() for row in split.labels]}
    Dataset.from_dict(ids).save_to_disk(str(folder / "hf"))  # mapped, as ours is
    model = AutoModelForSeq2SeqLM.from_pretrained(ROOT / "lst_scale" / "embedded" / "tiny-t5")
    arguments = Seq2SeqTrainingArguments(str(folder / "out"), per_device_train_batch_size=BATCH, report_to=[], use_cpu=True)
    collator = DataCollatorForSeq2Seq(tokenizer, model)
    trainer = Seq2SeqTrainer(model, arguments, train_dataset=Dataset.load_from_disk(str(folder / "hf")), data_collator=collator)
    return (batch["attention_mask"] for batch in trainer.get_train_dataloader())


def step_pace(rows: Path, folder: Path, steps: int) -> float:
    """Return source tokens a second of some steps of the quickstart on these rows."""
    fields = {"kind": "classification", "train": str(rows), "validation": str(rows), "source": ["text"], "target": "label"}
    command = [sys.executable, "-m", "lst_scale.train", "--recipe", "quickstart", "--overwrite", f"task={json.dumps(fields)}"]
    command += [
        f"output_dir={folder / 'runs'}",
        "name=step",
        f"training.max_steps={steps}",
        "data.max_eval_rows=32",
        "evaluation.method=likelihood",
    ]
    subprocess.run(command, check=True, capture_output=True, cwd=ROOT)
    (result,) = (folder / "runs").glob("step-*/result.json")
    return float(json.loads(result.read_text())["tokens_per_second"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=20_000)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=60)
    options = parser.parse_args()
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(ROOT / "lst_scale" / "embedded" / "tiny-t5")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        os.environ["XDG_CACHE_HOME"] = str(folder / "cache")
        rows = make_rows(folder / "rows.csv", options.rows)
        split = our_split(rows, tokenizer)
        found: dict[str, list[float]] = {"the loader alone": [], "HF's Trainer's loader": [], "a training step": []}
        for number in range(options.rounds):
            found["the loader alone"].append(pace(our_masks(split, number)))
            found["HF's Trainer's loader"].append(pace(their_masks(split, tokenizer, folder)))
            found["a training step"].append(step_pace(rows, folder, options.steps))
    step = statistics.median(found["a training step"])
    print("| | source tokens a second | over a training step |\n| --- | --- | --- |")
    for what, each in found.items():
        print(f"| {what} | {statistics.median(each):,.0f} | {statistics.median(each) / step:.1f} |")


if __name__ == "__main__":
    main()
