"""PEFT's own tests of a tuner, made to run on a ladder. They are in PEFT's repository, not in its package, and none of their code is here.

    git clone https://github.com/huggingface/peft /tmp/peft
    python benchmarks/peft_tests.py /tmp/peft /tmp/ladder-tests

Its tests are parametrized over lists: of configs, and of models on the hub. In a copy of them both lists are replaced: by LadderPeftConfig,
and by small models with random weights, made here. Tests that name another method themselves do not run. Prints a line a module, and a
line for each test that failed or was passed over.
"""

from __future__ import annotations

import argparse
import ast
import re
import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path
from xml.etree import ElementTree

import torch
from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM, T5Config
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

LADDER = {"reduction_factor": 2, "side_layers": [0, 1]}
SHAPE = {
    "vocab_size": 1000, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 8, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
CAUSAL = ("llama", "qwen2", "mistral", "gemma", "gemma3_text")
MODULES = {  # the list of configs, its task, the list of models
    "test_config.py": ("ALL_CONFIG_CLASSES", None, None),
    "test_decoder_models.py": ("ALL_CONFIGS", "CAUSAL_LM", "PEFT_DECODER_MODELS_TO_TEST"),
    "test_encoder_decoder_models.py": ("ALL_CONFIGS", "SEQ_2_SEQ_LM", "PEFT_ENCODER_DECODER_MODELS_TO_TEST"),
}


def make_models(folder: Path) -> dict[str, list[str]]:
    """Write small models; return their folders by the list that they replace."""
    torch.manual_seed(0)
    t5 = T5Config(
        vocab_size=1000, d_model=32, d_ff=64, d_kv=8, num_heads=4, num_layers=2, dropout_rate=0.0, decoder_start_token_id=0
    )  # fmt: skip
    AutoModelForSeq2SeqLM.from_config(t5).save_pretrained(folder / "t5")
    for name in CAUSAL:
        AutoModelForCausalLM.from_config(CONFIG_MAPPING[name](**SHAPE)).save_pretrained(folder / name)
    causal = [str(folder / name) for name in CAUSAL]
    return {"PEFT_ENCODER_DECODER_MODELS_TO_TEST": [str(folder / "t5")], "PEFT_DECODER_MODELS_TO_TEST": causal}


def replaced(source: str, lists: dict[str, str]) -> str:
    """Return a module whose lists at the top level, by name, have other contents."""
    lines = source.splitlines(keepends=True)
    for node in reversed(ast.parse(source).body):
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name) and node.targets[0].id in lists:
            name = node.targets[0].id
            lines[node.lineno - 1 : node.end_lineno] = [f"{name} = {lists.pop(name)}\n"]
    assert not lists, f"these are not there: {sorted(lists)}"
    return with_ladder("".join(lines))


def with_ladder(source: str) -> str:
    """Return a module that knows LadderPeftConfig."""
    return re.sub(r"^from peft import \(", "from lst_scale.peft import LadderPeftConfig\nfrom peft import (", source, flags=re.MULTILINE)


def prepare(checkout: Path, folder: Path) -> None:
    """Copy the tests, with our lists in place of theirs."""
    models = make_models(folder / "models")
    shutil.copytree(checkout / "tests", folder / "tests", dirs_exist_ok=True)
    for module, (configs, task, names) in MODULES.items():
        options = {} if task is None else LADDER | {"task_type": task}
        lists = {configs: f"[(LadderPeftConfig, {options!r})]"} | ({} if names is None else {names: repr(models[names])})
        path = folder / "tests" / module
        path.write_text(replaced(path.read_text(), lists))
    utils = folder / "tests" / "testing_utils.py"  # a ladder starts at random, and has no init_weights to say so
    without = "if config_cls in (LNTuningConfig, VBLoRAConfig"
    assert without in utils.read_text()
    utils.write_text(with_ladder(utils.read_text()).replace(without, f"{without}, LadderPeftConfig"))
    common = folder / "tests" / "testing_common.py"  # of diffusers it asks one thing: is this model one of its pipelines?
    common.write_text(common.read_text().replace("from diffusers import StableDiffusionPipeline", "StableDiffusionPipeline = ()"))


def carry_out(folder: Path, module: str) -> tuple[Counter[str], list[str]]:
    """Return how many tests passed, failed and were passed over, and what is to be said of each of the latter two."""
    report = folder / f"{module}.xml"
    command = [
        sys.executable,
        "-m",
        "pytest",
        f"tests/{module}",
        "-k",
        "LadderPeftConfig",
        "-q",
        f"--junitxml={report}",
        "-p",
        "no:cacheprovider",
    ]
    subprocess.run(command, cwd=folder, capture_output=True, check=False)
    counts: Counter[str] = Counter()
    said = []
    for case in ElementTree.parse(report).iter("testcase"):
        found = next((child for child in case if child.tag in ("failure", "error", "skipped")), None)
        counts["passed" if found is None else found.tag] += 1
        if found is not None:
            lines = (found.get("message") or "").strip().splitlines() or [""]
            said.append(f"{found.tag}: {re.sub(r'/[^-]*/models/', '', case.get('name') or '')}: {lines[0][:200]}")
    return counts, said


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("checkout", type=Path, help="PEFT's repository")
    parser.add_argument("folder", type=Path, help="where the copy is made; removed first")
    parser.add_argument("--modules", nargs="+", default=list(MODULES), choices=list(MODULES))
    arguments = parser.parse_args()
    shutil.rmtree(arguments.folder, ignore_errors=True)
    prepare(arguments.checkout, arguments.folder)
    for module in arguments.modules:
        counts, said = carry_out(arguments.folder, module)
        print(f"{module}: " + ", ".join(f"{number} {what}" for what, number in counts.items()))
        print("".join(f"    {line}\n" for line in said), end="", flush=True)


if __name__ == "__main__":
    main()
