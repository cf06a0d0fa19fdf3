"""The side network's forward pass: what reaches what, and what trains."""

from __future__ import annotations

import re
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import nn
from transformers.models.t5.modeling_t5 import T5Block

from helpers.inputs import inputs_of
from helpers.tiny import batch, tiny_ladder, tiny_t5
from lst_scale import LadderConfig, LadderModel
from lst_scale.backbone.taps import FrozenHead
from lst_scale.errors import LadderError
from lst_scale.side import loss
from lst_scale.side.designs.parts import make_gate
from lst_scale.side.initialize import initialize_by_pruning
from lst_scale.side.loss import cross_entropy_sum, mean_cross_entropy, shift_right
from lst_scale.side.network import Gate, SideNetwork
from lst_scale.training.engine import parameter_groups


def test_only_kept_layers_have_a_block_a_downsample_and_a_gate() -> None:
    side = tiny_ladder(side_layers=(0, 2)).side
    for stack in (side.encoder, side.decoder):
        for part in (stack.blocks, stack.downsamples, stack.gates):
            assert list(part) == ["0", "2"]


def test_side_blocks_are_the_backbone_s_block_class_at_narrow_widths_with_all_heads() -> None:
    block = tiny_ladder(reduction_factor=4).side.decoder.blocks["2"]
    assert type(block) is T5Block
    attention = block.layer[0].SelfAttention
    assert (attention.d_model, attention.key_value_proj_dim, attention.n_heads) == (32 // 4, 8 // 4, 4)
    assert attention.config._attn_implementation == "lst_side"


def test_the_first_kept_block_of_each_stack_owns_the_only_position_table() -> None:
    side = tiny_ladder(side_layers=(1, 2)).side
    tables = [name for name, _ in side.named_parameters() if "relative_attention_bias" in name]
    assert tables == [f"{stack}.blocks.1.layer.0.SelfAttention.relative_attention_bias.weight" for stack in ("encoder", "decoder")]


@pytest.mark.parametrize("merge_last", [False, True])
def test_every_weight_is_float32_trains_and_gets_a_gradient(merge_last: bool) -> None:
    model = tiny_ladder(merge_last=merge_last).train()
    model(**batch()).loss.backward()
    for name, parameter in model.named_parameters():
        assert parameter.dtype == torch.float32 and parameter.requires_grad, name
        assert parameter.grad is not None and parameter.grad.abs().sum() > 0, name


def test_nothing_flows_back_into_the_backbone() -> None:
    backbone = tiny_t5()
    tiny_ladder(backbone)(**batch()).loss.backward()
    assert all(parameter.grad is None for parameter in backbone.parameters())


def test_no_module_uses_another_module_s_parameter() -> None:
    """ZeRO-3 gathers a weight around its own module's forward: read elsewhere, it is empty. Poison each outside that time."""
    model, inputs = tiny_ladder(merge_last=True), batch()
    expected = model(**inputs).logits
    for module in model.side.modules():
        own = list(module.named_parameters(recurse=False))
        if not own:
            continue
        values = {name: parameter.data.clone() for name, parameter in own}

        def gather(module: nn.Module, _inputs: object, values: dict[str, torch.Tensor] = values) -> None:
            for name, value in values.items():
                getattr(module, name).data = value

        def release(module: nn.Module, _inputs: object, _output: object, values: dict[str, torch.Tensor] = values) -> None:
            for name in values:
                getattr(module, name).data = torch.empty(0)

        module.register_forward_pre_hook(gather)
        module.register_forward_hook(release)
        release(module, None, None)
    torch.testing.assert_close(model(**inputs).logits, expected, rtol=0, atol=0)


def test_a_gate_is_half_side_half_tap_at_the_start_and_leans_to_the_side_with_alpha() -> None:
    gate = Gate(temperature=0.1)
    side, tap = torch.ones(1, 2, 3), torch.zeros(1, 2, 3)
    assert torch.equal(gate(side, tap), torch.full((1, 2, 3), 0.5))
    nn.init.constant_(gate.alpha, 0.1)
    torch.testing.assert_close(gate(side, tap), torch.full((1, 2, 3), torch.sigmoid(torch.tensor(1.0)).item()))


def test_padding_and_later_tokens_do_not_reach_a_position() -> None:
    model, inputs = tiny_ladder(), batch()
    before = model(**inputs).logits
    padded = inputs | {"input_ids": inputs["input_ids"].masked_fill(inputs["attention_mask"] == 0, 7)}
    assert torch.equal(model(**padded).logits, before)
    decoder_input_ids = shift_right(inputs["labels"], model.backbone.spec)
    changed = decoder_input_ids.clone()
    changed[:, 3:] = 9
    arguments = {name: inputs[name] for name in ("input_ids", "attention_mask")}
    after = model(**arguments, decoder_input_ids=changed).logits
    assert torch.equal(after[:, :3], before[:, :3]) and not torch.equal(after[:, 3:], before[:, 3:])


def test_a_row_of_padding_alone_gives_finite_numbers() -> None:
    model, inputs = tiny_ladder(), batch()
    inputs["attention_mask"][3], inputs["labels"][3] = 0, -100
    output = model(**inputs)
    output.loss.backward()
    assert output.logits.isfinite().all()
    assert all(parameter.grad.isfinite().all() for parameter in model.parameters())


def test_bf16_computes_in_bf16_keeps_float32_weights_and_stays_near_float32() -> None:
    exact, rough = tiny_ladder(tiny_t5()), tiny_ladder(tiny_t5(), precision="bf16")
    seen: set[torch.dtype] = set()
    rough.side.upsample.register_forward_hook(lambda _module, _inputs, output: seen.add(output.dtype))
    ours, theirs = rough(**batch()), exact(**batch())
    assert seen == {torch.bfloat16}
    ours.loss.backward(), theirs.loss.backward()
    # bf16 has 8 bits: 0.4 % a rounding, a few dozen roundings deep
    torch.testing.assert_close(ours.loss, theirs.loss, rtol=2e-2, atol=0)
    for (name, rounded), parameter in zip(rough.named_parameters(), exact.parameters(), strict=True):
        assert rounded.grad.dtype == torch.float32, name
        if parameter.numel() > 1:
            cosine = torch.cosine_similarity(rounded.grad.flatten(), parameter.grad.flatten(), dim=0)
            assert cosine > 0.98, f"{name}: {cosine}"


def test_taps_of_a_bf16_backbone_are_cast_where_they_enter_a_float32_side_network() -> None:
    model = tiny_ladder(tiny_t5().to(torch.bfloat16))
    hidden: list[torch.dtype] = []
    model.side.upsample.register_forward_hook(lambda _module, _inputs, output: hidden.append(output.dtype))
    output = model(**batch())
    assert hidden == [torch.float32] and output.loss.dtype == torch.float32


def test_dropout_acts_in_training_alone_and_only_in_the_side_network() -> None:
    model, inputs = tiny_ladder(dropout=0.3), batch()
    assert torch.equal(model(**inputs).logits, model(**inputs).logits)
    model.train()
    assert not torch.equal(model(**inputs).logits, model(**inputs).logits)
    given = inputs_of(inputs["input_ids"], inputs["attention_mask"], shift_right(inputs["labels"], model.backbone.spec))
    first, second = (model.backbone(given, model.side.request) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first.target.hidden, second.target.hidden, strict=True))


def test_the_side_network_builds_on_the_meta_device() -> None:
    model = tiny_ladder()
    with torch.device("meta"):
        empty = SideNetwork(model.backbone.spec, model.side.config)
    shapes = {name: p.shape for name, p in model.side.named_parameters()}
    assert {name: p.shape for name, p in empty.named_parameters()} == shapes


def summed(model: LadderModel, labels: torch.Tensor) -> tuple[torch.Tensor, int]:
    inputs = batch()
    spec = model.backbone.spec
    taps = model.backbone(inputs_of(inputs["input_ids"], inputs["attention_mask"], shift_right(labels, spec)), model.side.request)
    return cross_entropy_sum(model.backbone.head, model.side(taps), labels)


def test_the_summed_loss_over_its_tokens_is_the_mean_loss() -> None:
    model, labels = tiny_ladder(), batch()["labels"]
    loss, count = summed(model, labels)
    assert count == int((labels != -100).sum())
    torch.testing.assert_close(loss / count, model(**batch()).loss)


@pytest.mark.parametrize("chunk", [256, 3])
@pytest.mark.parametrize(
    ("hidden", "head", "allowed"), [("float32", "float32", 1e-5), ("bfloat16", "bfloat16", 2e-2), ("float32", "bfloat16", 1e-5)]
)
def test_the_loss_over_the_frozen_head_and_its_gradient_are_autograd_s(
    chunk: int, hidden: str, head: str, allowed: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loss, "CHUNK", chunk)
    draw = torch.Generator().manual_seed(0)
    frozen = FrozenHead(weight_VD=torch.randn(40, 16, generator=draw).to(getattr(torch, head)), scale=0.25)
    labels = torch.randint(0, 40, (4, 5), generator=draw)
    labels[0, 3:] = labels[2] = -100
    states = 30 * torch.randn(4, 5, 16, generator=draw)  # logits of a hundred, whose plain exponentials overflow
    mine, theirs = (states.to(getattr(torch, hidden)).requires_grad_(True) for _ in range(2))
    found, _ = cross_entropy_sum(frozen, mine, labels)
    expected = torch.nn.functional.cross_entropy(frozen(theirs).float().flatten(0, 1), labels.flatten(), reduction="sum")
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-4)
    (found * 0.5).backward()
    (expected * 0.5).backward()
    assert mine.grad is not None and theirs.grad is not None
    assert not mine.grad[2].any() and not mine.grad[0, 3:].any()
    torch.testing.assert_close(mine.grad, theirs.grad, rtol=allowed, atol=allowed)  # bf16 keeps 8 bits of mantissa


def test_without_a_single_label_the_loss_is_zero_and_still_has_a_gradient() -> None:
    model = tiny_ladder()
    loss, count = summed(model, torch.full_like(batch()["labels"], -100))
    loss.backward()
    assert loss.item() == 0 and count == 0
    assert all(parameter.grad is not None and not parameter.grad.any() for parameter in model.parameters())
    assert float(mean_cross_entropy(torch.randn(1, 2, 5), torch.full((1, 2), -100))) == 0


def test_labels_shift_right_behind_the_start_token() -> None:
    spec = tiny_ladder(tiny_t5(decoder_start_token_id=3)).backbone.spec
    assert shift_right(torch.tensor([[5, 6, 1], [7, -100, -100]]), spec).tolist() == [[3, 5, 6], [3, 7, 0]]


@pytest.mark.parametrize("normalize_taps", [False, True])
def test_normalised_taps_have_no_scale(normalize_taps: bool) -> None:
    """Taps scaled block by block, as a deep T5's residual stream is, reach the side network alike when they are normalised."""
    model, inputs = tiny_ladder(normalize_taps=normalize_taps), batch()
    taps = model.backbone(inputs_of(inputs["input_ids"], inputs["attention_mask"], inputs["labels"].clamp(min=0)), model.side.request)
    grown = [replace(s, hidden=tuple(t * 7.0 ** (i + 1) for i, t in enumerate(s.hidden))) for s in (taps.source, taps.target)]
    same = torch.allclose(model.side(replace(taps, source=grown[0], target=grown[1])), model.side(taps), rtol=1e-4, atol=1e-4)
    assert same is normalize_taps


DESIGNS: list[dict[str, Any]] = [
    {"design": "cross_attention"},
    {"design": "adapter"},
    {"gate": "per_channel", "side_heads": 2},
    {"downsample_rank": 3, "gate": "fixed"},
    {"merge_last": True, "start_as_backbone": True, "gate": "none"},
]


@pytest.mark.parametrize("options", DESIGNS, ids=str)
def test_every_weight_of_every_design_trains_and_none_is_read_outside_its_module(options: dict[str, Any]) -> None:
    model = tiny_ladder(**options).train()
    model(**batch()).loss.backward()
    for name, parameter in model.named_parameters():
        assert parameter.dtype == torch.float32 and parameter.grad is not None and parameter.grad.abs().sum() > 0, name


def test_a_ladder_that_starts_as_the_backbone_predicts_what_the_backbone_predicts() -> None:
    backbone, inputs = tiny_t5(), batch()
    fresh = LadderModel(backbone, LadderConfig(reduction_factor=2, side_layers=(0, 2), merge_last=True, start_as_backbone=True)).eval()
    torch.testing.assert_close(fresh(**inputs).logits, backbone(**inputs).logits, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(tiny_ladder(backbone, merge_last=True)(**inputs).logits, backbone(**inputs).logits, atol=1e-2)


def test_gates_weigh_side_and_tap_as_they_say() -> None:
    side, tap = torch.randn(2, 3, 4), torch.randn(2, 3, 4)
    gates = {name: make_gate(LadderConfig(side_layers=(0,), gate=name), 4) for name in ("learnable", "per_channel", "fixed", "none")}
    for name in ("learnable", "per_channel", "fixed"):  # all start at half
        torch.testing.assert_close(gates[name](side, tap), (side + tap) / 2)
    torch.testing.assert_close(gates["none"](side, tap), side + tap)
    counts = {name: sum(p.numel() for p in gate.parameters()) for name, gate in gates.items()}
    assert counts == {"learnable": 1, "per_channel": 4, "fixed": 0, "none": 0}
    with torch.no_grad():
        gates["per_channel"].alpha[1] = 10.0  # this channel takes the side state alone
    torch.testing.assert_close(gates["per_channel"](side, tap)[..., 1], side[..., 1])


def test_fewer_heads_and_a_two_step_downsample_make_what_they_say() -> None:
    side = tiny_ladder(side_heads=2, downsample_rank=3).side
    attention = side.encoder.blocks["0"].layer[0].SelfAttention
    assert attention.n_heads == 2 and attention.relative_attention_bias.weight.shape == (32, 2)
    assert side.encoder.downsamples["0"].first.weight.shape == (3, 32) and side.encoder.downsamples["0"].second.weight.shape == (16, 3)


@pytest.mark.parametrize("options", [{"design": "cross_attention"}, {"side_heads": 2}], ids=str)
def test_pruning_starts_every_narrow_design(options: dict[str, Any]) -> None:
    backbone = tiny_t5()
    model = LadderModel(backbone, LadderConfig(reduction_factor=2, side_layers=(0, 2), **options))
    before = model.side.encoder.blocks["2"].layer[0].SelfAttention.q.weight.clone()
    initialize_by_pruning(model.side, dict(backbone.named_parameters()).__getitem__)
    block = model.side.encoder.blocks["2"]
    assert not torch.equal(block.layer[0].SelfAttention.q.weight, before)
    if "design" in options:  # the ladder's attention starts as the self-attention
        assert torch.equal(block.layer[1].EncDecAttention.q.weight, block.layer[0].SelfAttention.q.weight)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"design": "adaptor"}, "Did you mean 'adapter'?"),
        ({"gate": "learned"}, "Did you mean 'learnable'?"),
        ({"reduction_factor": 2, "start_as_backbone": True}, "has no effect without merge_last"),
        ({"design": "adapter", "downsample_rank": 2}, "downsample_rank has no effect on design adapter"),
        ({"design": "cross_attention", "gate": "none"}, "gate none has no effect on design cross_attention"),
        ({"side_heads": 0}, "side_heads 0 must be a whole number of at least 1"),
    ],
)
def test_switches_that_do_not_go_together_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(LadderError, match=re.escape(message)):
        LadderConfig(side_layers=(0,), **options).validate(LadderModel(tiny_t5(), LadderConfig(reduction_factor=2, side_layers=(0,))).spec)


def test_a_matrix_that_is_called_gate_decays_and_a_gate_does_not() -> None:
    class Gated(nn.Module):
        """As a feed-forward of Llama's names it."""

        def __init__(self) -> None:
            super().__init__()
            self.gate_proj, self.side = nn.Linear(4, 4), tiny_ladder(gate="per_channel", merge_last=True).side

    module = Gated()
    decayed, left_alone = parameter_groups(module, 0.1, {f"side.{name}" for name in module.side.no_decay()})
    assert (decayed["weight_decay"], left_alone["weight_decay"]) == (0.1, 0.0)
    assert any(p is module.gate_proj.weight for p in decayed["params"])
    gates = [gate.alpha for gate in module.side.gates().values()]
    assert len(gates) == 2 * 2 + 1 and all(any(p is alpha for p in left_alone["params"]) for alpha in gates)
