"""A ladder beside a decoder-only model of each family: its taps, its first predictions, generation, training, files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from helpers.llamas import FAMILIES, make_beside_images, make_llama
from helpers.targets import scored_together_and_apart
from lst_scale import LadderConfig, LadderEnsemble, LadderModel
from lst_scale.backbone import as_backbone, load_backbone
from lst_scale.backbone.families import family_of, numbers_of, text_part
from lst_scale.backbone.taps import TapRequest
from lst_scale.errors import BackboneError, LadderError
from lst_scale.inputs.batch import Inputs
from lst_scale.recipe.method import LstRecipe
from lst_scale.side.count import backbone_parameters, shape_of
from lst_scale.side.loss import cross_entropy_sum, mean_cross_entropy

CONFIG = {"reduction_factor": 8, "side_layers": [1, 3], "start_as_backbone": True}


@pytest.fixture(params=FAMILIES, scope="module")
def model(request: pytest.FixtureRequest) -> Any:
    return make_llama(request.param)


def ladder(model: Any, *, trained: bool = False, **changes: Any) -> LadderModel:
    made = LadderModel(model, LadderConfig(**(CONFIG | changes))).eval()
    if trained:
        torch.manual_seed(1)
        for parameter in made.parameters():
            parameter.data.add_(torch.randn_like(parameter) * 0.1)
    return made


def texts(rows: int = 2, length: int = 9) -> Tensor:
    return torch.randint(3, 97, (rows, length), generator=torch.Generator().manual_seed(0))


def left_padded(ids: Tensor, by: int) -> tuple[Tensor, Tensor]:
    padding = torch.zeros(len(ids), by, dtype=torch.long)
    return torch.cat([padding, ids], 1), torch.cat([padding, torch.ones_like(ids)], 1)


def test_taps_are_what_blocks_return_and_a_target_goes_on_from_its_source(model: Any) -> None:
    ids, seen = texts(), dict[int, Tensor]()
    handles = [
        block.register_forward_hook(lambda _m, _i, out, n=number: seen.__setitem__(n, out))
        for number, block in enumerate(model.model.layers)
    ]
    with torch.no_grad():
        final = model.model(ids).last_hidden_state
    for handle in handles:
        handle.remove()
    backbone, request = as_backbone(model), TapRequest(layers=(0, 2, 3), target_final=True)
    inputs = Inputs(source_BS=ids[:, :6], source_mask_BS=torch.ones(2, 6, dtype=torch.long), target_BT=ids[:, 6:])
    taps = backbone(inputs, request)
    for layer, source, target in zip(request.layers, taps.source.tensors, taps.target.tensors, strict=True):
        torch.testing.assert_close(torch.cat([source, target], 1), seen[layer], rtol=1e-4, atol=1e-4)
    assert taps.final_BTD is not None
    torch.testing.assert_close(taps.final_BTD, final[:, 6:], rtol=1e-4, atol=1e-4)
    several = list(backbone.each_target([inputs, inputs.with_target(ids[0, 6:])], request))
    torch.testing.assert_close(several[0].final_BTD, taps.final_BTD)
    assert not torch.equal(several[1].target.tensors[0][1], taps.target.tensors[0][1])


def test_first_predictions_are_the_model_s_own_bit_for_bit(model: Any) -> None:
    ids = texts()
    mask = torch.ones_like(ids)
    mask[1, 6:] = 0
    with torch.no_grad():
        assert torch.equal(ladder(model)(input_ids=ids).logits, model(ids).logits)
        assert torch.equal(ladder(model)(input_ids=ids, attention_mask=mask).logits, model(ids, attention_mask=mask).logits)


def test_left_padding_changes_nothing(model: Any) -> None:
    ids, made = texts(), ladder(model, trained=True)
    padded, mask = left_padded(ids, 3)
    with torch.no_grad():
        expected, found = made(input_ids=ids).logits, made(input_ids=padded, attention_mask=mask).logits
    torch.testing.assert_close(found[:, 3:], expected, rtol=1e-4, atol=1e-4)
    expected = made.generate(ids, max_new_tokens=8, do_sample=False)
    assert torch.equal(made.generate(padded, attention_mask=mask, max_new_tokens=8, do_sample=False)[:, 3:], expected)


@pytest.mark.parametrize("options", [{"do_sample": False}, {"num_beams": 3}], ids=["greedy", "beams"])
def test_a_cache_changes_no_answer(model: Any, options: dict[str, Any]) -> None:
    """Past the window of blocks that see a few tokens alone."""
    made, ids = ladder(model, trained=True), texts()
    cached = made.generate(ids, max_new_tokens=10, **options)
    assert torch.equal(cached[:, : ids.shape[1]], ids)
    assert cached.shape[1] > ids.shape[1] + 3
    assert torch.equal(made.generate(ids, max_new_tokens=10, use_cache=False, **options), cached)


def test_a_step_moves_the_side_network_alone(model: Any) -> None:
    made, ids = ladder(model).train(), texts()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    optimizer = torch.optim.AdamW(made.parameters(), lr=1e-2)
    losses = []
    for _ in range(6):
        loss = made(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert not model.training and all(parameter.grad is None for parameter in model.parameters())


def test_the_loss_is_transformers_own(model: Any) -> None:
    ids = texts()
    labels = ids.clone()
    labels[:, :4] = -100
    with torch.no_grad():
        found, expected = ladder(model)(input_ids=ids, labels=labels).loss, model(ids, labels=labels).loss
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("precision", ["int8", "nf4"])
@pytest.mark.parametrize("model_type", ["llama", "qwen2"])
def test_a_packed_matrix_keeps_its_bias(model_type: str, precision: str, tmp_path: Path) -> None:
    model = make_llama(model_type)
    model.save_pretrained(tmp_path)
    packed = load_backbone(str(tmp_path), revision=None, precision=precision).give_model()
    biased = [name for name, module in model.named_modules() if isinstance(module, torch.nn.Linear) and module.bias is not None]
    assert len(biased) == 4 * {"llama": 4, "qwen2": 3}[model_type]  # with the output's, or without
    for name in biased:
        linear, nothing = model.get_submodule(name), torch.zeros(1, model.get_submodule(name).in_features, dtype=torch.bfloat16)
        torch.testing.assert_close(packed.get_submodule(name)(nothing)[0], linear.bias.bfloat16(), rtol=0, atol=0)


def test_what_is_saved_reads_back_and_fits_its_own_backbone_alone(model: Any, tmp_path: Path) -> None:
    made, ids = ladder(model, trained=True), texts()
    made.save_pretrained(tmp_path / "side")
    model.save_pretrained(tmp_path / "backbone")
    again = LadderModel.from_pretrained(tmp_path / "side", model)
    whole = LadderModel.from_pretrained(tmp_path / "side", load_backbone(str(tmp_path / "backbone"), revision=None, precision="fp32"))
    with torch.no_grad():
        expected = made(input_ids=ids).logits
        assert torch.equal(again(input_ids=ids).logits, expected)
        assert torch.equal(whole(input_ids=ids).logits, expected)
    other = make_llama(model.config.model_type)
    other.model.layers[0].mlp.down_proj.weight.data[0, 0] += 1
    with pytest.raises(LadderError, match="was trained on"):
        LadderModel.from_pretrained(tmp_path / "side", other)


def test_closed_forms_count_what_there_is(model: Any) -> None:
    spec = family_of(model.config.model_type, "it").spec(model.config)
    numbers = numbers_of(model.config.model_type, "it")
    own_head = model.lm_head.weight is not model.model.embed_tokens.weight
    assert numbers.backbone_parameters(spec, own_head) == sum(p.numel() for p in model.parameters())
    method = LstRecipe(name="lst", **(CONFIG | {"side_layers": (1, 3), "merge_last": True, "initialization": "random"}))
    assert numbers.trainable_parameters(spec, own_head, method) == sum(p.numel() for p in ladder(model).parameters())
    assert numbers.spec_from(model.config.to_dict()) == spec


def test_the_loss_in_parts_knows_the_head_s_divisor_and_soft_cap(model: Any) -> None:
    head = as_backbone(model).head
    hidden = torch.randn(2, 5, 64, generator=torch.Generator().manual_seed(0), requires_grad=True)
    labels = texts(length=5)
    whole = mean_cross_entropy(head(hidden), labels)
    (expected,) = torch.autograd.grad(whole, hidden)
    total, count = cross_entropy_sum(head, hidden, labels)
    (found,) = torch.autograd.grad(total / count, hidden)
    torch.testing.assert_close(total / count, whole)
    torch.testing.assert_close(found, expected)


def test_a_ladder_that_stands_alone_trains_too() -> None:
    made, ids = ladder(make_llama("llama"), start_as_backbone=False).train(), texts()
    made(input_ids=ids, labels=ids).loss.backward()
    assert all(parameter.grad is not None for parameter in made.parameters())


@pytest.mark.parametrize("reduction_factor", [8, 1], ids=["one head", "several heads on the same keys"])
def test_what_is_recomputed_and_what_is_dropped_leave_the_gradient_right(reduction_factor: int) -> None:
    model, ids, found = make_llama("llama"), texts(), []
    for recompute in (False, True):
        made = ladder(model, trained=True, recompute=recompute, dropout=0.1, reduction_factor=reduction_factor).train()
        torch.manual_seed(3)
        made(input_ids=ids, labels=ids).loss.backward()
        found.append({name: p.grad for name, p in made.named_parameters()})
    for name, gradient in found[0].items():
        torch.testing.assert_close(found[1][name], gradient, msg=name)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"design": "adapter", "start_as_backbone": False},
            "^design adapter stands beside an encoder-decoder: beside a llama write design",
        ),
        ({"design": "cross_attention", "gate": "learnable"}, "^design cross_attention stands beside an encoder-decoder"),
        ({"side_layers": [4]}, "^side_layers names block 4, but this backbone has blocks 0 to 3"),
        ({"reduction_factor": 0}, "^reduction_factor 0 must be 1 or more, such as 8$"),
    ],
)
def test_what_does_not_fit_is_one_line(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(LadderError, match=message):
        ladder(make_llama("llama"), **changes)


def test_an_encoder_decoder_s_arguments_are_refused() -> None:
    made, ids = ladder(make_llama("llama")), texts()
    with pytest.raises(LadderError, match="give the whole text as input_ids"):
        made(input_ids=ids, decoder_input_ids=ids)
    with pytest.raises(LadderError, match=r"^labels are \(2, 3\), but must be as long as input_ids, \(2, 9\)"):
        made(input_ids=ids, labels=ids[:, :3])


def test_another_kind_of_model_is_one_line_that_lists_those_that_are_known() -> None:
    from transformers import GPT2Config, GPT2LMHeadModel

    with pytest.raises(
        BackboneError, match=r"^GPT2LMHeadModel can't be a backbone: pass a .*LlamaForCausalLM.* or a T5Gemma2ForConditionalGeneration$"
    ):
        as_backbone(GPT2LMHeadModel(GPT2Config(n_layer=1, n_head=2, n_embd=8, vocab_size=11)))


def test_a_target_does_not_know_how_long_the_sources_beside_its_own_are(model: Any) -> None:
    """Sources are padded after their last token, so that padding stands between a shorter one and its target."""
    made, ids = ladder(model, trained=True), texts()
    source, target = ids[:, :6], ids[:, 6:]
    shorter = 3  # tokens of the second source
    mask = torch.ones(2, 6, dtype=torch.long)
    mask[1, shorter:] = 0
    with torch.no_grad():
        (together,) = made.logits_for_targets(source, mask, [target])
        (alone,) = made.logits_for_targets(source[1:, :shorter], mask[1:, :shorter], [target[1:]])
        whole = made(input_ids=torch.cat([source[1:, :shorter], target[1:]], 1)).logits[:, shorter:]
    torch.testing.assert_close(alone, whole, rtol=1e-4, atol=1e-4)
    if not getattr(model.config, "sliding_window", None):  # in which padding counts, as in transformers
        torch.testing.assert_close(together[1:], alone, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("changes", [{}, {"merge_last": False, "start_as_backbone": False}, {"tap_storage": "int8"}], ids=str)
def test_a_side_network_reads_a_source_once_for_several_targets(model: Any, changes: dict[str, Any]) -> None:
    made = ladder(model, trained=True, **changes)
    lengths, together, apart = scored_together_and_apart(made, made.side.stack)
    assert lengths == [6 + 3, 5, 1]
    torch.testing.assert_close(together, apart, rtol=1e-4, atol=1e-4)


def test_several_networks_read_a_source_once_for_several_targets() -> None:
    model = make_llama("llama")
    made = LadderEnsemble(model, [ladder(model, trained=True, side_layers=[layer]).side for layer in (1, 3)])
    for stack in (each.stack for each in made.side.each):
        lengths, together, apart = scored_together_and_apart(made, stack)
        assert lengths == [6 + 3, 5, 1]
        torch.testing.assert_close(together, apart, rtol=1e-4, atol=1e-4)


def test_the_text_part_of_a_model_of_images_is_a_backbone(tmp_path: Path) -> None:
    whole = make_beside_images(tmp_path)
    ids = texts()
    backbone = load_backbone(str(tmp_path), revision=None, precision="fp32")
    with torch.no_grad():
        assert torch.equal(ladder(backbone)(input_ids=ids).logits, whole(input_ids=ids).logits)
    shape = shape_of(str(tmp_path))
    assert shape is not None and shape.spec == backbone.spec and not shape.own_head
    assert backbone_parameters(shape) == sum(p.numel() for p in whole.model.language_model.parameters())
    assert backbone.num_parameters == backbone_parameters(shape)


def test_what_a_text_config_leaves_out_is_what_transformers_takes() -> None:
    from transformers import Gemma3Config

    said: dict[str, Any] = {"model_type": "gemma3", "eos_token_id": [1, 106], "text_config": {"num_hidden_layers": 7, "sliding_window": 9}}
    read, found = Gemma3Config(**said).text_config, numbers_of("gemma3_text", "it").spec_from(text_part(said))
    wanted = family_of("gemma3_text", "it").spec(read)
    assert (found.architecture, found.pad_token_id, found.decoder_start_token_id) == (
        wanted.architecture,
        wanted.pad_token_id,
        wanted.decoder_start_token_id,
    )
