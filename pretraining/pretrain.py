"""Pretrain the embedded T5 by span corruption (Raffel et al., JMLR 2020, section 3.3.4): 15 % of the tokens, spans of 3 on average.

    python pretraining/text.py --folder /tmp/pretraining
    python pretraining/pretrain.py --folder /tmp/pretraining --output lst_scale/embedded/tiny-t5 --minutes 60

The learning rate follows the clock, so that training ends annealed after `--minutes`, however fast the machine. Every 200 steps
the model is saved to the output under a temporary name and renamed; its card is written from what was measured.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import platform
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import labelled
import numpy as np
import text
import tokenizer as tokenizer_script
import torch
from transformers import Adafactor, PreTrainedTokenizerBase, T5Config, T5ForConditionalGeneration

NOISE_DENSITY, MEAN_SPAN = 0.15, 3.0
WINDOW = 160  # tokens before corruption
BATCH = 32
PEAK_RATE = 2e-2  # of Adafactor with scale_parameter, relative to each matrix's root mean square
WARMUP_SHARE = 0.05
SAVE_EVERY = 200


def build_model() -> T5ForConditionalGeneration:
    """Return the untrained model: 4.9 M parameters; all widths divide by 8, so that a ladder may reduce by 2, 4 or 8."""
    torch.manual_seed(0)
    config = T5Config(
        vocab_size=4096,
        d_model=192,
        d_ff=512,
        d_kv=32,
        num_heads=6,
        num_layers=4,
        feed_forward_proj="gated-gelu",
        dropout_rate=0.0,
        decoder_start_token_id=0,
    )
    return T5ForConditionalGeneration(config)


def pack(texts: list[str], tokenizer: PreTrainedTokenizerBase) -> np.ndarray:
    """Return one stream of token ids; each document ends with </s>."""
    ids = [token for start in range(0, len(texts), 1000) for row in tokenizer(texts[start : start + 1000]).input_ids for token in row]
    return np.array(ids, dtype=np.int64)


def noise_lengths(draw: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Return the lengths of the kept and the masked spans of one window, alternating, a kept one first."""
    num_noise = round(WINDOW * NOISE_DENSITY)
    num_spans = round(num_noise / MEAN_SPAN)
    return _random_parts(WINDOW - num_noise, num_spans, draw), _random_parts(num_noise, num_spans, draw)


def _random_parts(total: int, parts: int, draw: np.random.Generator) -> np.ndarray:
    cuts = np.sort(draw.choice(total - 1, parts - 1, replace=False)) + 1
    return np.diff(np.concatenate([[0], cuts, [total]]))


def corrupt(window: np.ndarray, first_sentinel: int, draw: np.random.Generator) -> tuple[list[int], list[int]]:
    """Return (source, target): every masked span becomes one sentinel in the source, and follows it in the target."""
    source: list[int] = []
    target: list[int] = []
    position = 0
    for index, (kept, masked) in enumerate(zip(*noise_lengths(draw), strict=True)):
        sentinel = first_sentinel - index
        source += [*window[position : position + kept].tolist(), sentinel]
        target += [sentinel, *window[position + kept : position + kept + masked].tolist()]
        position += kept + masked
    return [*source, 1], [*target, 1]


def batches(stream: np.ndarray, first_sentinel: int, seed: int) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Yield (source, target) batches for ever; all rows have the same length, so nothing is padded. A short text has smaller ones."""
    if len(stream) <= 2 * WINDOW:
        raise SystemExit(f"{len(stream)} tokens are too few to learn or to measure on: there have to be more than {2 * WINDOW}")
    draw = np.random.default_rng(seed)
    while True:
        starts = draw.permutation(np.arange(int(draw.integers(WINDOW)), len(stream) - WINDOW, WINDOW))
        rows = min(BATCH, len(starts))
        for first in range(0, len(starts) - rows + 1, rows):
            pairs = [corrupt(stream[start : start + WINDOW], first_sentinel, draw) for start in starts[first : first + rows]]
            sources, targets = zip(*pairs, strict=True)
            yield torch.tensor(sources), torch.tensor(targets)


@torch.no_grad()
def held_out_loss(model: T5ForConditionalGeneration, stream: np.ndarray, first_sentinel: int) -> float:
    """Return the mean loss in nats a target token over 15 fixed held-out batches."""
    model.eval()
    corrupted = batches(stream, first_sentinel, seed=1)
    losses = [model(input_ids=source, labels=target).loss.item() for source, target in (next(corrupted) for _ in range(15))]
    model.train()
    return sum(losses) / len(losses)


def rate(share: float) -> float:
    """Return the learning rate when `share` of the time is spent: a linear rise, then a cosine to a twentieth."""
    if share < WARMUP_SHARE:
        return PEAK_RATE * max(share, 1e-3) / WARMUP_SHARE
    progress = min(1.0, (share - WARMUP_SHARE) / (1 - WARMUP_SHARE))
    return PEAK_RATE * (0.05 + 0.95 * 0.5 * (1 + math.cos(math.pi * progress)))


def save(model: T5ForConditionalGeneration, tokenizer: PreTrainedTokenizerBase, output: Path, facts: dict[str, Any]) -> None:
    """Write model, tokenizer, facts and card under a temporary name, then rename."""
    partial = output.with_name(f".{output.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    model.config.dropout_rate = 0.1  # what fine-tuning and side networks use; pretraining ran without
    model.save_pretrained(partial)
    tokenizer.save_pretrained(partial)
    shutil.copy(Path(__file__).parent / "PRINCETON-WORDNET-LICENSE.txt", partial)
    (partial / "pretraining.json").write_text(json.dumps(facts, indent=2) + "\n")
    (partial / "README.md").write_text((Path(__file__).parent / "card.md").read_text().format(**facts))
    shutil.rmtree(output, ignore_errors=True)
    os.replace(partial, output)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, required=True, help="where text.py put the text")
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--minutes", type=float, default=60)
    options = parser.parse_args()

    excluded = {synset.key for chosen in labelled.choose(options.folder).values() for synset in chosen}
    train_texts, held_out_texts = text.split(options.folder, excluded)
    tokenizer = tokenizer_script.train(train_texts, options.output)
    sentinel = tokenizer.convert_tokens_to_ids("<extra_id_0>")
    train_stream, held_out_stream = pack(train_texts, tokenizer), pack(held_out_texts, tokenizer)

    model = build_model()
    untrained_loss = held_out_loss(model, held_out_stream, sentinel)
    optimizer = Adafactor(model.parameters(), lr=PEAK_RATE, relative_step=False, scale_parameter=True, warmup_init=False)
    start, step, tokens = time.monotonic(), 0, 0
    for source, target in batches(train_stream, sentinel, seed=0):
        share = (time.monotonic() - start) / (60 * options.minutes)
        optimizer.param_groups[0]["lr"] = rate(share)
        loss = model(input_ids=source, labels=target, use_cache=False).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        step, tokens = step + 1, tokens + source.numel() + target.numel()
        if step % SAVE_EVERY == 0 or share >= 1:
            facts = {
                "held_out_loss": round(held_out_loss(model, held_out_stream, sentinel), 4),
                "untrained_loss": round(untrained_loss, 4),
                "steps": step,
                "tokens_seen": tokens,
                "corpus_tokens": len(train_stream),
                "held_out_tokens": len(held_out_stream),
                "minutes": round((time.monotonic() - start) / 60, 1),
                "planned_minutes": options.minutes,
                "parameters": sum(parameter.numel() for parameter in model.parameters()),
                "machine": f"{os.cpu_count()} CPU cores ({platform.machine()}), float32, torch {torch.__version__}",
            }
            print(json.dumps({"train_loss": round(loss.item(), 4), "rate": round(rate(share), 5)} | facts), flush=True)
            save(model, tokenizer, options.output, facts)
            model.config.dropout_rate = 0.0
        if share >= 1:
            break


if __name__ == "__main__":
    main()
