"""Finished runs, served: their fields, template, labels and context are those of their training."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import pytest

from helpers.llama_runs import checkpoint, tokenizer, trained, write
from helpers.paths import EMBEDDED
from lst_scale.data import files
from lst_scale.inference.json_lines import as_json
from lst_scale.inference.predict import predict_file
from lst_scale.serving.start import Options, build

__all__ = ["checkpoint", "tokenizer", "write"]


def predicted(run: Path, tmp_path: Path) -> list[dict[str, Any]]:
    predict_file([run], EMBEDDED / "wordnet/test.jsonl", tmp_path / "answers.jsonl", probabilities=True)
    found = (as_json(each.record, "answers") for each in files.read_records(str(tmp_path / "answers.jsonl"), "test", where="answers"))
    return list(found)[:6]


async def ask(options: Options, body: Any) -> Any:
    app, _ = build(options, print)
    transport = httpx.ASGITransport(app=app)  # type: ignore[arg-type]
    inner = app._app  # type: ignore[attr-defined]
    async with inner.router.lifespan_context(inner), httpx.AsyncClient(transport=transport, base_url="http://here") as client:
        return (await client.post("/v1/classify", json=body, timeout=60)).json()


@pytest.mark.slow
@pytest.mark.parametrize("context", [None, {"examples": 4}])
def test_rows_are_labelled_as_predict_labels_them(context: Any, write: Callable[..., Path], tmp_path: Path) -> None:
    run = trained(write("served", backbone__context=context))
    rows = predicted(run, tmp_path)
    recipe = str(next((tmp_path).glob("*.yaml")))
    from lst_scale.recipe.schema import load_recipe

    options = Options(checkpoint=load_recipe(recipe).backbone.checkpoint, sides={"kinds": run}, precision="fp32")
    fields = [{name: row[name] for name in ("word", "definition")} for row in rows]
    found = asyncio.run(ask(options, {"model": "kinds", "input": fields}))["results"][0]["rows"]
    for row, answer in zip(rows, found, strict=True):
        assert answer["label"] == row["prediction"]
        assert answer["probabilities"] == pytest.approx(row["probabilities"], abs=1e-5)
