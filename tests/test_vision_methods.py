"""The paper's other methods on texts with images, whose tokens enter the source's stack: what trains, and what an image reaches."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import T5Config, T5ForConditionalGeneration

from helpers.tiny import batch, tiny_t5
from lst_scale import LadderConfig, VisionConfig
from lst_scale.backbone.families import family_of
from lst_scale.backbone.weights.checkpoint import spec_of
from lst_scale.inputs.images import Images
from lst_scale.methods import changed_with_images
from lst_scale.methods.base import trained_parameters
from lst_scale.recipe.method import AdaptersRecipe, BitfitRecipe, FullRecipe, LoraRecipe, PromptRecipe
from lst_scale.side.network import SideNetwork

T5 = family_of("t5", "tests")
VOCABULARY = 32_200  # 32,000 words, 100 extra ids, 100 for images
CLIP = VisionConfig(feature_dim=2048, pooled_grid=6, num_images=(1, 2))
METHODS: dict[str, Any] = {
    "full": FullRecipe(name="full"),
    "adapters": AdaptersRecipe(name="adapters", bottleneck=192, cross_attention=True, train_norms=False, start_small=False),
    "lora": LoraRecipe(name="lora", rank=150),
    "bitfit": BitfitRecipe(name="bitfit"),
    "prompt": PromptRecipe(name="prompt", num_vectors=40),
}
# What trains, of how many in all with what the method adds, and the supplement's share in percent.
TABLE_3 = {
    "full": (224_540_160, 224_540_160, 100.0),
    "adapters": (19_333_632, 242_292_480, 7.98),
    "lora": (18_170_112, 241_128_960, 7.54),
    "bitfit": (1_865_416, 224_824_264, 0.83),
    "prompt": (2_842_400, 225_801_248, 1.26),
}


def t5_base(vocab_size: int) -> Any:
    with torch.device("meta"):
        model = T5ForConditionalGeneration(
            T5Config(vocab_size=vocab_size, d_model=768, d_ff=3072, d_kv=64, num_heads=12, num_layers=12, decoder_start_token_id=0)
        )
    model.name_or_path = "t5-base"  # peft asks
    return model.requires_grad_(False)


@pytest.mark.parametrize("name", METHODS)
def test_a_method_trains_what_the_release_trains_on_clip_t5(name: str) -> None:
    model = changed_with_images(METHODS[name], t5_base(32_128), T5, CLIP, "t5-base", 0, VOCABULARY)
    trained, in_all, share = TABLE_3[name]
    assert sum(parameter.numel() for parameter in trained_parameters(model).values()) == trained
    assert sum(parameter.numel() for parameter in model.parameters()) == in_all
    assert round(100 * trained / in_all, 2) == share


def test_a_ladder_trains_what_the_release_trains_on_clip_t5() -> None:
    model = t5_base(VOCABULARY)
    with torch.device("meta"):
        side = SideNetwork(spec_of(model.config), LadderConfig(reduction_factor=4, side_layers="all", vision=CLIP))
    trained = sum(parameter.numel() for parameter in side.parameters())
    in_all = trained + sum(parameter.numel() for parameter in model.parameters())
    assert (trained, in_all, round(100 * trained / in_all, 2)) == (17_967_384, 240_926_232, 7.46)


def tiny(name: str, **changes: Any) -> Any:
    method = METHODS[name].model_copy(update={"num_vectors": 3} if name == "prompt" else changes)
    vision = VisionConfig(feature_dim=12, pooled_grid=2)
    backbone = tiny_t5(num_decoder_layers=3).requires_grad_(False)  # transformers sizes a cache by the encoder's
    backbone.name_or_path = "tiny"  # peft asks
    return changed_with_images(method, backbone, T5, vision, "tiny", 0, vocab_size=72).eval()


def images(seed: int = 3) -> Images:
    return Images(features_BIGF=torch.randn(4, 1, 16, 12, generator=torch.Generator().manual_seed(seed)))


def logits_of(model: Any, given: Images, target: Tensor | None = None, source: Any | None = None) -> Tensor:
    target = batch()["labels"].clamp(min=0) if target is None else target
    logits: Tensor = model(batch()["input_ids"], batch()["attention_mask"], given, target, source)[0]
    return logits


@pytest.mark.parametrize("name", METHODS)
def test_everything_that_trains_gets_a_gradient_and_an_image_reaches_the_answer(name: str) -> None:
    model = tiny(name)
    logits = logits_of(model, images())
    assert not torch.allclose(logits, logits_of(model, images(4)), atol=1e-3)
    logits.square().sum().backward()
    # LoRA's A has no gradient while B is zero; without boxes nothing is learned of them, and one image has no second.
    silent = {n for n, p in trained_parameters(model).items() if (p.grad is None or not p.grad.any()) and "lora_A" not in n}
    assert silent <= {"visual_embedding.boxes.linear.weight"}


@pytest.mark.parametrize("name", METHODS)
def test_recomputed_blocks_know_where_positions_end(name: str) -> None:
    gradients = []
    for recomputed in (False, True):
        model = tiny(name, dropout=0.0)
        for module in model.modules():
            if isinstance(module, torch.nn.Dropout):
                module.p = 0.0
            if hasattr(module, "dropout") and isinstance(module.dropout, float):
                module.dropout = 0.0
        if recomputed:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        logits_of(model.train(), images()).square().sum().backward()
        gradients.append({n: p.grad for n, p in trained_parameters(model).items()})
    largest = max(float(gradient.abs().max()) for gradient in gradients[0].values())
    for parameter, gradient in gradients[0].items():
        # float32 sums in another order; a bias of keys changes nothing, so its gradient is their rounding alone
        torch.testing.assert_close(gradients[1][parameter], gradient, rtol=1e-4, atol=1e-5 * largest, msg=parameter)


def test_image_tokens_have_no_positions_and_no_order_but_what_is_added_to_them() -> None:
    """With the order rows gone, the tokens of an image may be shuffled: nothing else tells them apart."""
    model = tiny("full")
    with torch.no_grad():
        model.model.shared.weight[-4:] = 0.0
    given = Images(features_BIGF=images().features_BIGF[:, :, :4])
    other = Images(features_BIGF=given.features_BIGF[:, :, torch.tensor([2, 0, 3, 1])])
    torch.testing.assert_close(logits_of(model, given), logits_of(model, other), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["full", "prompt", "lora"])
def test_generation_is_the_argmax_of_the_forward_pass(name: str) -> None:
    model = tiny(name)
    ids = model.generate(batch()["input_ids"], batch()["attention_mask"], images(), max_new_tokens=5, eos_token_id=63, do_sample=False)
    assert torch.equal(logits_of(model, images(), ids[:, :-1]).argmax(-1), ids[:, 1:])


def test_a_source_that_was_run_serves_other_targets() -> None:
    model, target = tiny("prompt"), torch.randint(2, 64, (4, 3), generator=torch.Generator().manual_seed(7))
    _, source = model(batch()["input_ids"], batch()["attention_mask"], images(), target)
    assert torch.equal(logits_of(model, images(), target.flip(0), source), logits_of(model, images(), target.flip(0)))
