"""Model cards: what a folder of trained weights is, and code that goes from a text to an answer and runs as it is printed.

A side network saved by itself knows its design and backbone (`card_of_side_network`); a run adds task, data, scores (`training/card.py`).
"""

from __future__ import annotations

import re
from pathlib import Path

from lst_scale.backbone.taps import BackboneIdentity
from lst_scale.side.config import LadderConfig
from lst_scale.system.assets import EMBEDDED, resolve

LIVE = "live model"  # what a backbone is called that was given as an object without a name
# Of the models in these families that their makers publish.
_APACHE = re.compile(r"(google-t5/)?t5-\w+|google/(flan-t5|t5-v1_1|t5-efficient|mt5|byt5|ul2|flan-ul2|switch)[\w.-]*|Qwen/Qwen3-[\w.-]+")
_HUB_NAME = re.compile(r"[\w.-]+(/[\w.-]+)?")


def card_of_side_network(source: str, config: LadderConfig, identity: BackboneIdentity, count: int) -> str:
    """Return the README.md of a side network that was saved without a run.

    Args:
        source: what `from_pretrained` finds it by.
    """
    code = loading_code(source, identity)
    if _has_tokenizer(identity.checkpoint):
        code += prediction_code(identity.checkpoint, identity.revision, 'text = "a text like those that it was trained on"', generation(32))
    return "\n".join([head(identity.checkpoint), *about(config, identity, count), *code_block(code), *backbone_lines(identity)]) + "\n"


def head(checkpoint: str) -> str:
    """Return the metadata block. The backbone's name stands there if it can be one of the hub."""
    base = [f"base_model: {checkpoint}"] if _HUB_NAME.fullmatch(checkpoint) and not Path(checkpoint).exists() else []
    return "\n".join(["---", "library_name: lst_scale", *base, "tags: [ladder-side-tuning]", "---"])


def about(config: LadderConfig, identity: BackboneIdentity, count: int) -> list[str]:
    name = "a model that was given as an object" if identity.checkpoint == LIVE else identity.checkpoint
    layers = ", ".join(map(str, config.layers))
    what = f"design {config.design}, reduction factor {config.reduction_factor}, side layers {layers}"
    if config.tail is not None:
        updates = f"updates of rank {config.tail.rank} and alpha {config.tail.alpha} on {', '.join(config.tail.targets)}"
        what = f"design {config.design}, {updates} in the blocks after {layers}"
    return [
        f"# Side network for {name}",
        "",
        f"A ladder side network (Sung et al., NeurIPS 2022) of {count:,} weights: {what}. It needs its backbone, which stays as it is and "
        "is not in this folder.",
        "",
    ]


def backbone_lines(identity: BackboneIdentity) -> list[str]:
    known = licence_of(identity.checkpoint)
    return [
        "",
        f"Backbone: {identity.checkpoint} in {identity.precision}, fingerprint {identity.fingerprint}.",
        f"Licence of the backbone: {known}." if known else "The backbone's own licence applies to it.",
    ]


def loading_code(source: str, identity: BackboneIdentity) -> list[str]:
    """Return lines that make `model`; a live backbone has to be there as `t5`."""
    given = ", t5)  # the T5 that it was trained on" if identity.checkpoint == LIVE else ")"
    return ["from lst_scale import LadderModel", "", f"model = LadderModel.from_pretrained({source!r}{given}"]


def prediction_code(checkpoint: str, revision: str | None, text: str, answer: list[str], max_length: int | None = None) -> list[str]:
    """Return lines that take `model` from a text to an answer.

    Args:
        text: lines that make `text`.
        answer: lines that print the answer, given `ids` and `mask`.
        max_length: of the source in tokens.
    """
    cut = "" if max_length is None else f", truncation=True, max_length={max_length}"
    return [
        "",
        "from lst_scale.data.tokenizer import load_tokenizer",
        "",
        f"tokenizer = load_tokenizer({', '.join(map(repr, (checkpoint, revision)))})",
        text,
        f'ids = tokenizer(text{cut}, return_tensors="pt").input_ids.to(model.device)',
        "mask = ids.new_ones(ids.shape)",
        *answer,
    ]


def generation(max_new_tokens: int, num_beams: int = 1, prefix: str = "") -> list[str]:
    """Return lines that print a generated answer, without the prefix that was written before each target."""
    cut = f".strip().removeprefix({prefix!r})" if prefix else ""
    return [
        f"output = model.generate(input_ids=ids, attention_mask=mask, num_beams={num_beams}, max_new_tokens={max_new_tokens})",
        f"print(tokenizer.decode(output[0], skip_special_tokens=True){cut}.strip())",
    ]


def code_block(lines: list[str], language: str = "python") -> list[str]:
    return [f"```{language}", *lines, "```"]


def licence_of(checkpoint: str) -> str | None:
    """Return what is known of a checkpoint's licence: that of well-known models, or what its own README.md says."""
    if _APACHE.fullmatch(checkpoint):
        return "apache-2.0"
    folder = Path(resolve(checkpoint)) if checkpoint.startswith(EMBEDDED) or Path(checkpoint).is_dir() else None
    if folder is None or not (folder / "README.md").is_file():
        return None
    found = re.match(r"---\n(?:.*\n)*?license: *([\w.+-]+) *\n", (folder / "README.md").read_text(errors="replace")[:4000])
    if found is None:
        return None
    return "see the backbone's README.md" if found[1] == "other" else found[1]


def _has_tokenizer(checkpoint: str) -> bool:
    if checkpoint == LIVE:
        return False
    folder = Path(checkpoint)
    return not folder.is_dir() or any((folder / name).is_file() for name in ("tokenizer.json", "spiece.model", "tokenizer_config.json"))
