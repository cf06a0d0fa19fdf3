"""What the tests of the hub do, in a process that is not offline: prints what came of it as JSON.

Arguments: the folder of a finished run, and one to write in.
"""

from __future__ import annotations

import json
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, Trainer, TrainingArguments

import lst_scale
from helpers.tiny import batch, tiny_ladder, tiny_t5
from lst_scale import LadderModel
from lst_scale.errors import LstScaleError


def same(model: LadderModel, other: LadderModel) -> bool:
    return torch.equal(model(**batch()).logits, other(**batch()).logits)


def said(action: Callable[[], Any]) -> str:
    try:
        return f"no error: {action()}"
    except LstScaleError as error:
        return f"{type(error).__name__}: {error}"


def of_a_ladder() -> dict[str, Any]:
    t5 = tiny_t5()
    model, second = tiny_ladder(t5), tiny_ladder(t5, seed=9)
    found: dict[str, Any] = {"commit": model.push_to_hub("me/side", private=True)}
    found["branch"] = second.push_to_hub("me/side", revision="second", commit_message="another seed")
    found["main is the first"] = same(LadderModel.from_pretrained("me/side", t5), model)
    found["the branch is the second"] = same(LadderModel.from_pretrained("me/side", t5, revision="second"), second)
    config = AutoConfig.from_pretrained("me/side")
    found["config"] = [config.model_type, config.is_encoder_decoder, config.ladder["side_layers"], config.architectures]
    found["no such name"] = said(lambda: LadderModel.from_pretrained("me/nothing", t5))
    found["no such branch"] = said(lambda: LadderModel.from_pretrained("me/side", t5, revision="third"))
    found["no token"] = said(lambda: model.push_to_hub("me/other", token="hf_wrong"))
    found["no name"] = said(lambda: model.push_to_hub("a b/c"))
    return found


def of_a_trainer(folder: Path) -> dict[str, Any]:
    t5 = tiny_t5()
    model = tiny_ladder(t5)
    options: dict[str, Any] = {"use_cpu": True, "report_to": [], "disable_tqdm": True, "hub_model_id": "me/trained", "max_steps": 2}
    whole = batch(8)
    rows = [{name: tensor[row] for name, tensor in whole.items()} for row in range(8)]
    trainer = Trainer(model=model, args=TrainingArguments(output_dir=str(folder / "trainer"), **options), train_dataset=rows)
    trainer.train()
    trainer.push_to_hub()
    return {"opens": same(LadderModel.from_pretrained("me/trained", t5), model.eval())}


def of_a_run(run: Path) -> dict[str, Any]:
    rows = [{"word": "cat", "definition": "a feline"}, {"word": "run", "definition": "to move"}]
    with lst_scale.pipeline(run) as here:
        here.push_to_hub("me/run")
        expected = here(rows)
    with lst_scale.pipeline("me/run") as there:
        found = {"same answers": there(rows) == expected, "labels": there.labels}
    beside = LadderModel.from_pretrained("me/run", subfolder="side_network")
    found["side network"] = beside.backbone.identity.fingerprint == here.model.backbone.identity.fingerprint
    found["root"] = said(lambda: LadderModel.from_pretrained("me/run"))
    with lst_scale.pipeline("me/side", backbone=tiny_t5(), tokenizer=here.tokenizer) as alone:
        alone.push_to_hub("me/copy")
    found["copy"] = same(LadderModel.from_pretrained("me/copy", tiny_t5()), LadderModel.from_pretrained("me/side", tiny_t5()))
    return found


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    told = {"ladder": of_a_ladder(), "trainer": of_a_trainer(Path(sys.argv[2])), "run": of_a_run(Path(sys.argv[1]))}
    Path(sys.argv[2], "told.json").write_text(json.dumps(told))
