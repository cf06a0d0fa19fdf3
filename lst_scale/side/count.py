"""Count what trains, by the closed forms of a backbone's family: no torch, no weights, no network.

Shapes of well-known checkpoints are in shapes.json, as their config.json gives them.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lst_scale.backbone.families import Numbers, numbers_of, text_part
from lst_scale.backbone.model_config import find_config, read_config
from lst_scale.backbone.spec import BackboneSpec
from lst_scale.data.tasks import GLUE
from lst_scale.errors import BackboneError, did_you_mean, fence
from lst_scale.recipe.method import LoraRecipe, Method, ProbeRecipe, PromptRecipe
from lst_scale.recipe.schema import Recipe
from lst_scale.recipe.task import FileTask

SHAPES = Path(__file__).with_name("shapes.json")


@dataclass(frozen=True, kw_only=True)
class Shape:
    """The numbers of a checkpoint, and whether its head is a matrix of its own."""

    spec: BackboneSpec
    own_head: bool


def trainable_parameters(shape: Shape, method: Method) -> int:
    """Return how many weights a method trains on a backbone of this shape, on text alone."""
    if isinstance(method, LoraRecipe):
        check_targets(method, shape.spec)
    return _numbers(shape).trainable_parameters(shape.spec, shape.own_head, method)


def trainable_of(recipe: Recipe, shape: Shape) -> int:
    """Return how many weights a recipe trains on a backbone of this shape, with what makes tokens of images where it has some.

    Of a probe: how many it has at most, on all of its blocks together; of one label, where nobody knows yet how many there are.
    """
    vision, method, d = recipe.vision, recipe.method, shape.spec.d_model
    if isinstance(method, ProbeRecipe):
        return probe_parameters(method, shape) * len(_labels_of(recipe) or ("one",))
    on_text = trainable_parameters(shape, method)
    if vision is None:
        return on_text
    # Two linear maps with a norm each, of features and of a box with its area; and an order of images.
    visual = d * ((vision.feature_dim + 2) + (5 + 2) + max(2, *recipe.image_counts))
    more_words = (vision.vocab_size or shape.spec.vocab_size) - shape.spec.vocab_size
    added = {"full": more_words * d, "bitfit": more_words + 2 * d}
    if isinstance(method, PromptRecipe):
        added["prompt"] = 2 * d * method.hidden + method.hidden + d
    return on_text + visual + added.get(method.name, 0)


def probe_parameters(method: ProbeRecipe, shape: Shape) -> int:
    """Return the weights for each label of a probe on all of its blocks together.

    Raises:
        BackboneError: the backbone has not so many blocks.
    """
    return len(blocks_of(method, shape.spec)) * shape.spec.d_model + 1


def blocks_of(method: ProbeRecipe, spec: BackboneSpec) -> tuple[int, ...]:
    """Return the blocks that a probe tries, by number.

    Raises:
        BackboneError: the backbone has no such block.
    """
    if method.layers == "all":
        return tuple(range(spec.depth))
    layers: tuple[int, ...] = method.layers
    if layers[-1] >= spec.depth:
        raise BackboneError(f"method.layers names block {layers[-1]}, but this backbone has blocks 0 to {spec.depth - 1}")
    return layers


def _labels_of(recipe: Recipe) -> tuple[str, ...] | None:
    """Return a task's labels as far as they are known without its rows."""
    task = recipe.each_task[0]
    if isinstance(task, str):
        return GLUE[task].labels
    return task.labels if isinstance(task, FileTask) else None


def backbone_parameters(shape: Shape) -> int:
    """Return the weights of the backbone; a tied head counts once."""
    return _numbers(shape).backbone_parameters(shape.spec, shape.own_head)


def check_targets(method: LoraRecipe, spec: BackboneSpec) -> LoraRecipe:
    """Return the method with its matrices under the backbone's own names; refuse those that its blocks do not have.

    Raises:
        BackboneError: names the first of them, and those that there are.
    """
    valid = numbers_of(spec.model_type, "this backbone").lora_targets(spec)
    for target in method.targets:
        if target not in valid:
            raise BackboneError(f"method.targets: blocks of this backbone have no matrix {target!r}.{did_you_mean(target, tuple(valid))}")
    return method.model_copy(update={"targets": tuple(dict.fromkeys(valid[target] for target in method.targets))})


def _numbers(shape: Shape) -> Numbers:
    return numbers_of(shape.spec.model_type, "this backbone")


def shape_of(checkpoint: str) -> Shape | None:
    """Return a checkpoint's shape from the table or its local config.json; None when neither knows it.

    Raises:
        BackboneError: the folder holds another kind of model, or its config.json can't be read.
    """
    table: dict[str, dict[str, Any]] = json.loads(SHAPES.read_text())
    if checkpoint in table:
        entry = table[checkpoint]
        config = text_part(entry)
        return Shape(spec=numbers_of(config["model_type"], checkpoint).spec_from(config), own_head=entry["own_head"])
    path = find_config(checkpoint)
    if path is None:
        return None
    config = read_config(path)
    with fence(BackboneError, f"{path} can't be read as a model configuration"):
        return _shape_in(path.parent, config)


def _shape_in(folder: Path, config: dict[str, Any]) -> Shape:
    numbers = numbers_of(config.get("model_type"), folder)
    return Shape(spec=numbers.spec_from(config), own_head=numbers.head_name in _stored_names(folder))


def _stored_names(folder: Path) -> set[str]:
    """Return the names in a checkpoint's safetensors, read from their headers: transformers 5 calls every T5 tied in config.json."""
    index, single = folder / "model.safetensors.index.json", folder / "model.safetensors"
    if index.is_file():
        return set(json.loads(index.read_text())["weight_map"])
    if not single.is_file():
        return set()
    with single.open("rb") as stream:
        return set(json.loads(stream.read(int.from_bytes(stream.read(8), "little"))))


def describe_count(recipe: Recipe) -> str:
    """Return one sentence: trainable weights, backbone weights, share."""
    shape = shape_of(recipe.backbone.checkpoint)
    if shape is None:
        return f"trainable parameters: unknown before {recipe.backbone.checkpoint} is downloaded"
    trainable, backbone = trainable_of(recipe, shape), backbone_parameters(shape)
    if isinstance(recipe.method, ProbeRecipe):
        labels = _labels_of(recipe)
        of = "for each label" if labels is None else f"for {len(labels)} labels"
        return f"trainable parameters: at most {trainable:,} {of}, beside the backbone's {backbone:,}: validation chooses the blocks"
    return f"trainable parameters: {trainable:,} of the backbone's {backbone:,} ({100 * trainable / backbone:.3f} %)"
