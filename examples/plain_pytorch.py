"""Ladder Side-Tuning (Sung, Cho, Bansal, NeurIPS 2022) in one file: PyTorch, transformers' T5, and nothing of lst_scale.

    python examples/plain_pytorch.py

A large frozen T5, the backbone, runs forward only. A side network an r-th as wide reads the output of each of its blocks through small
linear layers, the ladder, and makes the prediction:

    T5 block 3 ──down──┐                     Two things follow. Nothing is kept of the backbone for a backward pass, so memory is
    T5 block 2 ──down──┼─ side block 3       that of the small network; and no gradient meets a weight of the backbone, so it may be
    T5 block 1 ──down──┼─ side block 2       quantized, shared between many side networks, or run once and remembered.
    T5 block 0 ──down──┼─ side block 1       LoRA has few trained weights too, but its gradient walks back through all of the T5.
    embedding  ──down──┴─ side block 0

Shapes: B rows, S source tokens, T target tokens, D backbone width, R = D / r side width, V vocabulary.
"""

import argparse
import copy
import json
import random
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn
from transformers import AutoTokenizer, T5ForConditionalGeneration
from transformers.models.t5.modeling_t5 import T5Block, T5LayerNorm

EMBEDDED = Path(__file__).resolve().parent.parent / "lst_scale" / "embedded"  # a small pretrained T5, and 4,800 WordNet definitions


# ----------------------------------------------------------------------------- the backbone: frozen, forward only


class Backbone:
    """A T5 that gives the outputs of its blocks. No nn.Module, so that no optimizer and no .train() ever finds it."""

    def __init__(self, folder):
        self.t5 = T5ForConditionalGeneration.from_pretrained(folder).eval().requires_grad_(False)
        self.config = self.t5.config
        self.seen = {"encoder": [], "decoder": []}
        # Hooks, not output_hidden_states: the last entry of that has gone through the final norm, the last block's output has not.
        for name, stack in (("encoder", self.t5.encoder), ("decoder", self.t5.decoder)):
            for block in stack.block:
                block.register_forward_hook(lambda _module, _args, out, name=name: self.seen[name].append(out[0]))

    @torch.no_grad()  # this line is what saves the memory
    def taps(self, ids_BS, mask_BS, target_BT):
        """Return the embeddings and all blocks' outputs, (B, S, D) each for the encoder and (B, T, D) for the decoder."""
        self.seen = {"encoder": [], "decoder": []}
        self.t5(input_ids=ids_BS, attention_mask=mask_BS, decoder_input_ids=target_BT, use_cache=False)
        embed = self.t5.shared
        return [embed(ids_BS), *self.seen["encoder"]], [embed(target_BT), *self.seen["decoder"]]

    def head(self, hidden_BTD):
        """Return logits (B, T, V). The gradient goes through this one matrix, and stops there."""
        if self.config.scale_decoder_outputs:  # T5 v1.0 with a tied head scales, v1.1 doesn't
            hidden_BTD = hidden_BTD * self.config.d_model**-0.5
        return self.t5.lm_head(hidden_BTD)


# ----------------------------------------------------------------------------- the side network: all that trains


class SideStack(nn.Module):
    """The ladder beside one stack, encoder or decoder: T5's own blocks, r times narrower."""

    def __init__(self, config, r, is_decoder):
        super().__init__()
        small = copy.deepcopy(config)
        small.is_decoder, small._attn_implementation = is_decoder, "eager"
        small.d_model, small.d_ff, small.d_kv = config.d_model // r, config.d_ff // r, config.d_kv // r  # as many heads, each narrower
        num_layers = config.num_decoder_layers if is_decoder else config.num_layers
        self.is_decoder = is_decoder
        self.down = nn.ModuleList(nn.Linear(config.d_model, small.d_model) for _ in range(num_layers + 1))
        self.blocks = nn.ModuleList(T5Block(small, has_relative_attention_bias=i == 0, layer_idx=i) for i in range(num_layers))
        self.gates = nn.Parameter(torch.zeros(num_layers))  # sigmoid(0) = 1/2: both sides of a rung count alike at first
        self.norm = T5LayerNorm(small.d_model, eps=config.layer_norm_epsilon)
        for linear in self.down:  # small: a side network that shouts at the start has to be calmed first
            nn.init.normal_(linear.weight, std=0.01)
            nn.init.zeros_(linear.bias)

    def forward(self, taps, mask_BS, source_BSR=None):
        # A block's output has had no norm and grows from block to block. Dividing it by its root mean square is worth some points; the
        # paper doesn't.
        taps = [taps[0], *(tap * torch.rsqrt(tap.pow(2).mean(-1, keepdim=True) + 1e-6) for tap in taps[1:])]
        padding = forbid(mask_BS[:, None, None, :] == 0)
        length = taps[0].shape[1]
        own_mask = forbid(torch.ones(1, 1, length, length).triu(1) > 0) if self.is_decoder else padding  # no token sees a later one
        cross = {"encoder_hidden_states": source_BSR, "encoder_attention_mask": padding} if self.is_decoder else {}
        s, bias, cross_bias = self.down[0](taps[0]), None, None
        for block, down, gate, tap in zip(self.blocks, self.down[1:], self.gates, taps[1:], strict=True):
            g = torch.sigmoid(gate / 0.1)
            s = g * s + (1 - g) * down(tap)  # a rung of the ladder: what came up, mixed with what the backbone says here
            # The first block makes the relative-position bias, and the others are given it: T5's custom.
            s, bias, cross_bias = block(s, own_mask, bias, **cross, encoder_decoder_position_bias=cross_bias)
        return self.norm(s)


class SideNetwork(nn.Module):
    def __init__(self, config, r):
        super().__init__()
        self.encoder, self.decoder = SideStack(config, r, is_decoder=False), SideStack(config, r, is_decoder=True)
        self.up = nn.Linear(config.d_model // r, config.d_model)
        nn.init.normal_(self.up.weight, std=0.01)
        nn.init.zeros_(self.up.bias)

    def forward(self, encoder_taps, decoder_taps, mask_BS):
        source_BSR = self.encoder(encoder_taps, mask_BS)
        return self.up(self.decoder(decoder_taps, mask_BS, source_BSR))  # (B, T, D), for the backbone's head


def forbid(where):
    return torch.zeros(where.shape).masked_fill(where, torch.finfo(torch.float32).min)


# ----------------------------------------------------------------------------- rows


def read(split):
    return [json.loads(line) for line in (EMBEDDED / "wordnet" / f"{split}.jsonl").read_text().splitlines()]


def to_ids(tokenizer, rows, kinds):
    """Return ids (B, S), mask (B, S) and labels (B, T). The question is the one T5 was pretrained on: what stood at <extra_id_0>?"""
    texts = [f"{row['word']} is a kind of <extra_id_0> : {row['definition']}" for row in rows]
    source = tokenizer(texts, padding=True, truncation=True, max_length=64, return_tensors="pt")
    target = tokenizer([f"<extra_id_0> {kind}" for kind in kinds], padding=True, return_tensors="pt")
    return source.input_ids, source.attention_mask, target.input_ids.masked_fill(target.attention_mask == 0, -100)


def token_losses(backbone, side, ids_BS, mask_BS, labels_BT):
    """Return each target token's negative log-likelihood (B, T), 0 at padding."""
    target_BT = backbone.t5._shift_right(labels_BT)
    hidden_BTD = side(*backbone.taps(ids_BS, mask_BS, target_BT), mask_BS)
    return F.cross_entropy(backbone.head(hidden_BTD).transpose(1, 2), labels_BT, ignore_index=-100, reduction="none")


# ----------------------------------------------------------------------------- train, then score by the likeliest kind


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default=str(EMBEDDED / "tiny-t5"), help="a T5: a folder, or a name of the hub")
    parser.add_argument("--steps", type=int, default=150)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--r", type=int, default=4, help="the side network is so many times narrower; divides d_model, d_ff and d_kv")
    parser.add_argument("--rows", type=int, default=200, help="validation rows to score")
    args = parser.parse_args()
    torch.manual_seed(0)
    random.seed(0)

    tokenizer, backbone = AutoTokenizer.from_pretrained(args.model), Backbone(args.model)
    side = SideNetwork(backbone.config, args.r)
    trained, frozen = (sum(p.numel() for p in module.parameters()) for module in (side, backbone.t5))
    print(f"{trained:,} parameters train beside {frozen:,} frozen ones")

    rows, kinds = read("train"), sorted({row["kind"] for row in read("train")})
    optimizer = torch.optim.AdamW(side.parameters(), lr=3e-3, weight_decay=0.0)  # decay would pull the gates to 1/2
    side.train()
    losses = []
    for step in range(args.steps):
        batch = random.sample(rows, args.batch)
        ids_BS, mask_BS, labels_BT = to_ids(tokenizer, batch, [row["kind"] for row in batch])
        loss = token_losses(backbone, side, ids_BS, mask_BS, labels_BT).sum() / (labels_BT != -100).sum()
        loss.backward()  # ends at the taps
        nn.utils.clip_grad_norm_(side.parameters(), 1.0)
        for group in optimizer.param_groups:
            group["lr"] = 3e-3 * min(1.0, (step + 1) / 10) * (1 - step / args.steps)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
        if step % max(1, args.steps // 5) == 0:
            print(f"step {step}: loss {losses[-1]:.3f}")
    print(f"loss {losses[0]:.3f} -> {losses[-1]:.3f}")

    side.eval()
    right = 0
    with torch.no_grad():
        for row in read("validation")[: args.rows]:
            ids_BS, mask_BS, labels_BT = to_ids(tokenizer, [row] * len(kinds), kinds)  # one row a kind
            nll_B = token_losses(backbone, side, ids_BS, mask_BS, labels_BT).sum(1)
            right += kinds[int(nll_B.argmin())] == row["kind"]
    print(f"validation accuracy {100 * right / args.rows:.1f} % (one of {len(kinds)} kinds)")


if __name__ == "__main__":
    main()
