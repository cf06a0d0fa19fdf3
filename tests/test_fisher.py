"""Fisher information, streamed, is what autograd gives for the whole model; and pruning by it is stored and reused."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import T5ForConditionalGeneration

from helpers.llamas import make_llama
from helpers.models import make_t5
from lst_scale.backbone.families import family_of
from lst_scale.backbone.placement.load import load_placed
from lst_scale.backbone.weights import fisher
from lst_scale.backbone.weights.checkpoint import open_checkpoint
from lst_scale.backbone.weights.fisher import Example, fisher_importance, stored_importance
from lst_scale.data.encode import encode
from lst_scale.data.rows import Row
from lst_scale.data.tokenizer import load_tokenizer
from lst_scale.methods.importance import task_importance
from lst_scale.recipe.schema import load_recipe
from lst_scale.system import distributed


def examples(count: int) -> list[Example]:
    draw = torch.Generator().manual_seed(0)
    return [
        Example(
            input_ids_S=torch.randint(3, 4000, (4 + i % 5,), generator=draw), labels_T=torch.randint(3, 4000, (1 + i % 3,), generator=draw)
        )
        for i in range(count)
    ]


def by_autograd(folder: Path, given: list[Example]) -> dict[str, torch.Tensor]:
    model: Any = T5ForConditionalGeneration.from_pretrained(folder, attn_implementation="eager").eval()
    stored = load_file(folder / "model.safetensors")
    if "lm_head.weight" in stored:
        model.lm_head.weight = torch.nn.Parameter(stored["lm_head.weight"])
    sums = {name: torch.zeros_like(p) for name, p in model.named_parameters()}
    for example in given:
        model.zero_grad()
        model(input_ids=example.input_ids_S[None], labels=example.labels_T[None]).loss.backward()
        for name, parameter in model.named_parameters():
            sums[name] += parameter.grad.square()
    return sums


@pytest.mark.parametrize("changes", [{}, {"feed_forward_proj": "gated-gelu", "tie_word_embeddings": False}], ids=["v1.0", "v1.1"])
def test_sums_equal_autograd_s_over_the_whole_model(changes: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = make_t5(tmp_path / "t5", dropout_rate=0.0, num_decoder_layers=2, **changes)
    monkeypatch.setattr(fisher, "TOKENS_AT_ONCE", 20)  # several walks
    found, expected = fisher_importance(open_checkpoint(str(folder)), examples(7)), by_autograd(folder, examples(7))
    matrices = {n for n, p in expected.items() if p.ndim == 2 and "relative" not in n and ".block." in n}
    assert found.keys() == matrices | {"shared.weight"}
    for name, sums in found.items():
        whole = expected[name] if name != "shared.weight" else expected[name].sum(0, keepdim=True)
        torch.testing.assert_close(sums, whole, rtol=1e-3, atol=1e-4 * float(whole.abs().max()), msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("model_type", ["llama", "gemma"])
def test_sums_of_a_decoder_only_model_equal_autograd_s(model_type: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = make_llama(model_type, **({"attention_bias": False, "rms_norm_eps": 1e-5} if model_type == "llama" else {}))
    model.save_pretrained(tmp_path)
    draw = torch.Generator().manual_seed(0)
    given = [
        Example(input_ids_S=torch.randint(3, 97, (1 + i % 5,), generator=draw), labels_T=torch.randint(3, 97, (1 + i % 3,), generator=draw))
        for i in range(7)
    ]
    spec = family_of(model_type, "it").spec(model.config)
    sums = {name: torch.zeros_like(p) for name, p in model.named_parameters()}
    for example in given:
        ids = example.input_ids_S[None]
        source, _, target = family_of(model_type, "it").divide(spec, ids, torch.ones_like(ids), example.labels_T[None])
        model.zero_grad()
        logits = model(torch.cat([source, target], 1)).logits[0, -len(example.labels_T) :]
        torch.nn.functional.cross_entropy(logits, example.labels_T).backward()
        for name, parameter in model.named_parameters():
            sums[name] += parameter.grad.square()
    monkeypatch.setattr(fisher, "TOKENS_AT_ONCE", 20)
    found = fisher_importance(open_checkpoint(str(tmp_path)), given)
    assert found.keys() == {n for n, p in sums.items() if p.ndim == 2 and ".layers." in n} | {"model.embed_tokens.weight"}
    for name, ours in found.items():
        whole = sums[name] if "embed" not in name else sums[name].sum(0, keepdim=True)
        torch.testing.assert_close(ours, whole, rtol=1e-3, atol=1e-4 * float(whole.abs().max()), msg=lambda m, n=name: f"{n}: {m}")


def test_what_was_made_once_is_read_afterwards(tmp_path: Path) -> None:
    made: list[int] = []

    def make() -> dict[str, torch.Tensor]:
        made.append(1)
        return {"a": torch.ones(2)}

    key = {"backbone": "x", "task": "y", "samples": 4, "seed": 0}
    for _ in range(2):
        assert torch.equal(stored_importance(tmp_path, key, make)("a"), torch.ones(2))
    stored_importance(tmp_path, key | {"seed": 1}, make)
    assert len(made) == 2


def test_of_runs_that_need_it_at_once_one_makes_it(tmp_path: Path) -> None:
    made, entered, go_on = [], threading.Event(), threading.Event()
    found: list[torch.Tensor] = []

    def make() -> dict[str, torch.Tensor]:
        made.append(1)
        entered.set()
        assert go_on.wait(60)
        return {"a": torch.ones(2)}

    runs = [threading.Thread(target=lambda: found.append(stored_importance(tmp_path, {"seed": 0}, make)("a"))) for _ in range(3)]
    for one in runs:
        one.start()
    assert entered.wait(60)
    go_on.set()
    for one in runs:
        one.join(60)
    assert made == [1] and len(found) == 3


def test_rows_that_have_changed_under_the_same_name_are_not_pruned_by_what_was_made_of_the_old_ones(
    write_recipe: Callable[..., Path], tiny_t5_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    recipe = load_recipe(str(write_recipe("pruned", method__initialization="fisher", method__fisher_samples=2)))
    world = distributed.connect()
    backbone, tokenizer = load_placed(recipe.backbone, world), load_tokenizer(str(tiny_t5_dir))

    def importance(*sources: str) -> torch.Tensor:
        split = encode([Row(source, "act") for source in sources], tokenizer, 24, None)
        read = task_importance(recipe, [split], backbone, world)
        assert read is not None
        return read("shared.weight")

    old, new = importance("a deed", "a walk"), importance("a deed", "a soup")
    assert not torch.equal(old, new)
    assert torch.equal(importance("a deed", "a walk"), old) and len(list(tmp_path.glob("lst_scale/fisher/*/key.json"))) == 2
