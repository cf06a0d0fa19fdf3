"""recipe.method -> what trains: a side network beside the backbone, or something inside it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from lst_scale.backbone.families import NO_PROBE
from lst_scale.errors import BackboneError
from lst_scale.recipe.backbone import QUANTIZED
from lst_scale.recipe.method import AdaptersRecipe, BitfitRecipe, FullRecipe, LoraRecipe, LstRecipe, ProbeRecipe, PromptRecipe
from lst_scale.recipe.schema import Recipe
from lst_scale.side.count import blocks_of, check_targets, shape_of

if TYPE_CHECKING:
    from torch import Tensor

    from lst_scale.backbone.families import Family
    from lst_scale.backbone.placement.replicated import LocalBackbone
    from lst_scale.backbone.spec import BackboneSpec
    from lst_scale.backbone.taps import TapRequest
    from lst_scale.methods.base import Method, Trainee
    from lst_scale.methods.images import ReadingImages
    from lst_scale.side.vision_config import VisionConfig

    InsideMethod = FullRecipe | AdaptersRecipe | BitfitRecipe | LoraRecipe | PromptRecipe


def check_method(recipe: Recipe) -> None:
    """Refuse a backbone that the method can't train in, before anything is loaded.

    Raises:
        BackboneError: the reason and what to write instead.
    """
    if isinstance(recipe.method, ProbeRecipe) and (found := shape_of(recipe.backbone.checkpoint)) is not None:
        blocks_of(recipe.method, found.spec)
    if isinstance(recipe.method, LstRecipe) and recipe.method.initialization == "probe":
        shape = shape_of(recipe.backbone.checkpoint)
        if shape is not None and not shape.spec.one_stack:
            raise BackboneError(NO_PROBE)
    if recipe.method.beside_backbone:
        return
    name, backbone = recipe.method.name, recipe.backbone
    if recipe.cache.enabled:
        raise BackboneError(f"method {name} changes the backbone, so its states can't be remembered: write cache.enabled=false")
    if not backbone.placement.trains_inside:
        raise BackboneError(
            f"method {name} trains inside the backbone, which {backbone.placement.name} runs forward only: "
            "write backbone.placement=replicated, or method.name=lst"
        )
    if backbone.precision in QUANTIZED:
        raise BackboneError(
            f"method {name} runs backward through the backbone, whose {backbone.precision} layers here run forward only: "
            "write backbone.precision=bf16, or method.name=lst"
        )
    if isinstance(recipe.method, FullRecipe) and backbone.precision != "fp32":
        raise BackboneError(
            f"method full trains the backbone's own weights, which {backbone.precision} would round at every step: "
            "write backbone.precision=fp32 (method.precision=bf16 computes in bf16)"
        )
    if isinstance(recipe.method, LoraRecipe):
        shape = shape_of(backbone.checkpoint)
        if shape is not None:  # or it is checked when the backbone is there
            check_targets(recipe.method, shape.spec)


def build_trainee(recipe: Recipe, backbone: Any, *, zero_stage: int, importance: Callable[[str], Tensor] | None = None) -> Trainee:
    """Return the recipe's method on its backbone. The same seed gives the same start on every rank."""
    method = recipe.method
    if isinstance(method, LstRecipe):
        from lst_scale.methods.images import vision_config
        from lst_scale.methods.lst import LadderTrainee

        return LadderTrainee(method, backbone, recipe.seed, importance, vision_config(recipe))
    return _inside(recipe, backbone, in_step=zero_stage == 3)


def request_of(recipe: Recipe, spec: BackboneSpec) -> TapRequest | None:
    """Return what a recipe's method reads of a frozen backbone of this shape; None: nothing."""
    method = recipe.method
    if isinstance(method, LstRecipe):
        from lst_scale.methods.images import vision_config
        from lst_scale.methods.lst import ladder_config
        from lst_scale.side.network import SideNetwork

        return SideNetwork.request_of(ladder_config(method, spec, vision_config(recipe)))
    if isinstance(method, ProbeRecipe):
        from lst_scale.methods import probe

        return probe.request_of(method, blocks_of(method, spec))
    return None


def method_of(recipe: Recipe, backbone: Any, labels: Sequence[str] | None) -> Method:
    """Return the recipe's method on its backbone, about to load what a run trained and answer with it.

    Args:
        labels: of a classification; None: there are none.
    """
    if isinstance(recipe.method, ProbeRecipe):
        from lst_scale.methods.probe import Probe

        return Probe(recipe.method, backbone, labels or ())
    if isinstance(recipe.method, LstRecipe):  # what was trained replaces any start
        recipe = recipe.model_copy(update={"method": recipe.method.model_copy(update={"initialization": "random"})})
    return build_trainee(recipe, backbone, zero_stage=0)


def _inside(recipe: Recipe, backbone: LocalBackbone, *, in_step: bool) -> Trainee:
    from lst_scale.methods.full import WholeModelTrainee
    from lst_scale.methods.images import vision_config
    from lst_scale.methods.peft import LoraTrainee, PromptTrainee

    method = recipe.method
    assert not isinstance(method, LstRecipe | ProbeRecipe)
    if isinstance(method, LoraRecipe):
        method = check_targets(method, backbone.spec)
    model, family, checkpoint = backbone.give_model(), backbone.family, recipe.backbone.checkpoint
    kind: type[Any] = WholeModelTrainee
    vision = vision_config(recipe)
    if vision is not None:
        assert recipe.vision is not None
        model = changed_with_images(method, model, family, vision, checkpoint, recipe.seed, recipe.vision.vocab_size)
    else:
        model = changed(method, model, family, checkpoint, recipe.seed)
        kind = LoraTrainee if isinstance(method, LoraRecipe) else PromptTrainee if isinstance(method, PromptRecipe) else kind
    if method.gradient_checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    facts = {"method": method.model_dump(mode="json"), "backbone": backbone.identity.as_json()}
    trainee: Trainee = kind(model.train(), backbone, bf16=method.precision == "bf16", in_step=in_step, facts=facts)
    return trainee


def changed(method: InsideMethod, model: Any, family: Family, checkpoint: str, seed: int) -> Any:
    """Return a frozen model of transformers with what a method adds to it; what trains requires a gradient."""
    from lst_scale.methods.inside import add_adapters, add_biases
    from lst_scale.methods.peft import with_lora, with_prompt

    if isinstance(method, FullRecipe):
        model.requires_grad_(True)
    elif isinstance(method, AdaptersRecipe):
        add_adapters(model, family, method, seed)
    elif isinstance(method, BitfitRecipe):
        add_biases(model, family)
    elif isinstance(method, LoraRecipe):
        model = with_lora(model, family, method, checkpoint, seed)
    else:
        model = with_prompt(model, family, method, checkpoint, seed)
    return model


def changed_with_images(
    method: InsideMethod, model: Any, family: Family, vision: VisionConfig, checkpoint: str, seed: int, vocab_size: int | None = None
) -> ReadingImages:
    """Return the same as a model that reads images inside, through a visual embedding that trains in every method.

    Args:
        vocab_size: of the word table with the rows that tell an image's tokens apart, as the release lengthens it; None: as it is.
    """
    from lst_scale.methods.images import reading_images
    from lst_scale.methods.inside import add_biases

    whole = reading_images(model, family, vision, seed, method if isinstance(method, PromptRecipe) else None, vocab_size)
    if isinstance(method, BitfitRecipe):
        add_biases(whole, family)  # the visual embedding's norms gain some, too
    elif not isinstance(method, PromptRecipe):
        whole.model = changed(method, whole.model, family, checkpoint, seed)
    whole.visual_embedding.requires_grad_(True)
    return whole
