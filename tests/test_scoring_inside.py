"""Methods that train inside a model read each source once, too, where several targets are scored after it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from torch import Tensor, nn

from helpers.llamas import make_llama
from helpers.models import make_t5
from helpers.t5gemmas import make_t5gemma
from lst_scale.backbone.cache_argument import CACHE
from lst_scale.backbone.placement.replicated import LocalBackbone
from lst_scale.data.batches import Batch
from lst_scale.methods import build_trainee
from lst_scale.methods.base import as_labels, divided, trained_parameters
from lst_scale.methods.full import WholeModel, WholeModelTrainee
from lst_scale.recipe.schema import Recipe
from lst_scale.training.evaluation import label_scores
from lst_scale.training.sessions import Session

COUNT = 5  # trained vectors
METHODS: dict[str, dict[str, Any]] = {
    "full": {"name": "full"},
    "lora": {"name": "lora", "rank": 2, "dropout": 0.5},
    "adapters": {"name": "adapters", "bottleneck": 8},
    "bitfit": {"name": "bitfit"},
    "prompt": {"name": "prompt", "num_vectors": COUNT},
}
# Windows are of six tokens: shorter than a prompt with its vectors, and than the longest with a label.
KINDS = ["llama", "qwen2", "qwen3", "mistral", "gemma2", "gemma3_text", "smollm3", "t5", "t5gemma2"]
LENGTHS = (7, 4, 2)
TARGETS = {"a": [5], "b": [7, 9], "c": [7, 11, 1], "d": [8, 6]}
RUN = [3, 2]  # tokens of c, along which a and b are scored, and of d


class Words:
    """What scoring asks of a tokenizer."""

    def __call__(self, *, text_target: str) -> Any:
        return type("Encoded", (), {"input_ids": TARGETS[text_target]})


@pytest.fixture(scope="module", params=KINDS)
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    where = tmp_path_factory.mktemp("inside") / request.param
    if request.param == "t5":
        return make_t5(where)
    (make_t5gemma() if request.param == "t5gemma2" else make_llama(request.param)).save_pretrained(where)
    return where


def trainee_of(name: str, folder: Path) -> Any:
    """Return a method whose weights are some way from where they start."""
    task = {"kind": "text", "train": "x", "validation": "x", "source": ("a",), "target": "b"}
    recipe = Recipe.model_validate({"name": "m", "task": task, "backbone": {"checkpoint": str(folder)}, "method": METHODS[name]})
    made = build_trainee(recipe, LocalBackbone.load(str(folder), precision="fp32"), zero_stage=0)
    torch.manual_seed(1)
    for parameter in trained_parameters(made.module).values():
        parameter.data.add_((0.02 if name == "full" else 0.2) * torch.randn_like(parameter))
    return made


def batch() -> Batch:
    """Return three rows, padded after their last token."""
    ids = torch.randint(3, 90, (3, 7), generator=torch.Generator().manual_seed(0))
    mask = (torch.arange(7)[None] < torch.tensor(LENGTHS)[:, None]).long()
    return Batch(input_ids_BS=ids * mask, attention_mask_BS=mask, labels_BT=torch.tensor([[5]] * 3), indices=(0, 1, 2))


def answered(session: Session[Tensor]) -> Tensor:
    """Return what a session ends with that needs nothing of a frozen backbone."""
    with pytest.raises(StopIteration) as ended:
        next(session)
        while True:
            session.send(type("Nothing", (), {"prepared": None}))
    found: Tensor = ended.value.value
    return found


def evaluated(made: WholeModelTrainee) -> AbstractContextManager[WholeModel]:
    return made.evaluating({name: weight.detach().clone() for name, weight in trained_parameters(made.module).items()})


def behind_their_own(made: WholeModelTrainee, model: WholeModel, rows: Batch) -> Tensor:
    """Return the scores of all labels as training reads rows: source and label in one pass, of which nothing is kept."""
    scores = []
    for target in TARGETS.values():
        labels = as_labels(target, rows)
        logits = made.backbone.family.whole_logits(model.run, *divided(rows, labels, made.backbone.spec))[0]
        scores.append(logits.log_softmax(-1).gather(-1, labels[..., None])[..., 0].sum(-1))
    return torch.stack(scores, -1)


@contextmanager
def counted(blocks: nn.ModuleList) -> Iterator[list[int]]:
    """Count the tokens that the first of some blocks reads, pass by pass."""
    counts: list[int] = []

    def count(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        hidden = args[0] if args else kwargs["hidden_states"]
        counts.append(hidden.shape[0] * hidden.shape[1])

    hook = blocks[0].register_forward_pre_hook(count, with_kwargs=True)
    yield counts
    hook.remove()


@pytest.mark.parametrize("name", METHODS)
def test_a_prompt_is_read_once_and_labels_score_as_each_does_behind_its_own(name: str, folder: Path) -> None:
    made, rows = trainee_of(name, folder), batch()
    whole = made.module.get_base_model() if isinstance(made.module, PeftModel) else made.module
    of_source, of_target = (made.backbone.family.stack_of(whole, target=target) for target in (False, True))
    with evaluated(made) as model:
        expected = behind_their_own(made, model, rows)
        with counted(of_source) as read, counted(of_target) as said:
            found = answered(label_scores(model, rows, Words(), list(TARGETS)))
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=2e-5)  # fp32, summed in another order
    assert torch.equal(found.argmax(-1), expected.argmax(-1))
    source = 3 * (divided(rows, rows.labels_BT, made.backbone.spec)[0].shape[1] + (COUNT if name == "prompt" else 0))
    labels = [3 * tokens for tokens in RUN]
    if made.backbone.spec.one_stack:
        assert read == said == [source + labels[0], *labels[1:]]
    else:
        assert read == [source] and said == labels


@pytest.mark.parametrize("name", ["lora", "prompt"])
@pytest.mark.parametrize("kind", ["llama", "gemma3_text"])
def test_the_order_of_targets_and_padding_before_a_prompt_change_nothing(kind: str, name: str, tmp_path: Path) -> None:
    make_llama(kind).save_pretrained(tmp_path / kind)
    made, rows = trainee_of(name, tmp_path / kind), batch()
    source, mask, _ = divided(rows, rows.labels_BT, made.backbone.spec)
    width = mask.shape[1]
    places = (torch.arange(width)[None] + mask.sum(1, keepdim=True)) % width
    source, mask = source.gather(1, places), mask.gather(1, places)
    targets = [divided(rows, as_labels(target, rows), made.backbone.spec)[2] for target in TARGETS.values()]
    with evaluated(made) as model:
        expected = [made.backbone.family.whole_logits(model.run, source, mask, target)[0] for target in targets]
        for order in ((0, 1, 2), (2, 0, 1, 2)):
            found = model.logits_for_targets(source, mask, [targets[number] for number in order])
            torch.testing.assert_close(list(found), [expected[number] for number in order], rtol=1e-5, atol=2e-5)  # as above


def test_nothing_is_kept_in_training_or_of_a_prompt_after_which_one_target_is_scored(tmp_path: Path) -> None:
    make_llama("llama").save_pretrained(tmp_path / "llama")
    made, rows, held = trainee_of("lora", tmp_path / "llama"), batch(), []
    made.module.register_forward_hook(lambda _module, _args, output: held.append(getattr(output, CACHE)))
    made.nll(made.module, rows, None).backward()
    with evaluated(made) as model:
        for labels in (["b"], ["d", "b"]):
            answered(label_scores(model, rows, Words(), labels))
    assert [cache is None for cache in held] == [True, True, False, False]
