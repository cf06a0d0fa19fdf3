"""Small real models, made here: nothing is downloaded, nothing is mocked."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from transformers import MT5ForConditionalGeneration, T5ForConditionalGeneration

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("OMP_NUM_THREADS", "1")
if not torch.cuda.is_available():
    os.environ.setdefault("DS_ACCELERATOR", "cpu")

DISTRIBUTED = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
ROOT = Path(__file__).parent.parent
EMBEDDED = ROOT / "lst_scale" / "embedded"


def make_t5(folder: Path, kind: Any = T5ForConditionalGeneration, **changes: Any) -> Path:
    """Save a random T5, or mT5, that knows the embedded tokenizer's vocabulary."""
    torch.manual_seed(0)
    values = {
        "vocab_size": 4096,
        "d_model": 32,
        "d_ff": 64,
        "d_kv": 8,
        "num_heads": 4,
        "num_layers": 3,
        "decoder_start_token_id": 0,
    } | changes
    model = kind(kind.config_class(**values))
    if values.get("tie_word_embeddings") is False:
        model.lm_head.weight = torch.nn.Parameter(torch.randn_like(model.shared.weight))
        model.config.tie_word_embeddings = False
    model.save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(EMBEDDED / "tiny-t5" / name, folder)
    return folder


@pytest.fixture(scope="session")
def tiny_t5_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """T5 v1.0: ReLU, tied and scaled head, no dropout."""
    return make_t5(tmp_path_factory.mktemp("t5"), dropout_rate=0.0)


@pytest.fixture(scope="session")
def tiny_gated_t5_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """T5 v1.1: gated GELU, a head of its own, no scaling."""
    return make_t5(tmp_path_factory.mktemp("t5-v1_1"), dropout_rate=0.0, feed_forward_proj="gated-gelu", tie_word_embeddings=False)


@pytest.fixture(scope="session")
def tiny_mt5_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """mT5: as T5 v1.1, by a class and configuration of its own."""
    options = {"feed_forward_proj": "gated-gelu", "tie_word_embeddings": False}
    return make_t5(tmp_path_factory.mktemp("mt5"), MT5ForConditionalGeneration, dropout_rate=0.0, **options)


def recipe_writer(folder: Path, checkpoint: Path) -> Callable[..., Path]:
    """Return a function that writes a small recipe into `folder`: 22 training rows, batches of 6, 8 steps. `a__b=value` sets a.b."""

    def write(name: str, **changes: Any) -> Path:
        tree: dict[str, Any] = {
            "name": name,
            "task": {
                "name": "kind",
                "kind": "classification",
                "train": "embedded:wordnet/train.jsonl",
                "validation": "embedded:wordnet/validation.jsonl",
                "source": ["word", "definition"],
                "target": "kind",
                "labels": ["act", "artifact", "attribute", "cognition", "communication", "food", "person", "state"],
            },
            "output_dir": str(folder / "runs"),
            "backbone": {"checkpoint": str(checkpoint), "precision": "fp32"},
            "method": {"name": "lst", "reduction_factor": 4, "side_layers": [0, 2]},
            "optimizer": {"learning_rate": 1e-2, "warmup": 2},
            "training": {"epochs": 2, "global_batch_size": 6, "micro_batch_size": 2, "evaluate_every": 4},
            "data": {"max_source_length": 24, "max_train_rows": 22, "max_eval_rows": 7},
            "logging": {"log_every_steps": 1},
        }
        for dotted, value in changes.items():
            *parents, last = dotted.split("__")
            node = tree
            for parent in parents:
                node = node.setdefault(parent, {})
            node[last] = value
        path = folder / f"{name}.yaml"
        path.write_text(yaml.safe_dump(tree))
        return path

    return write


@pytest.fixture
def write_recipe(tmp_path: Path, tiny_t5_dir: Path) -> Callable[..., Path]:
    return recipe_writer(tmp_path, tiny_t5_dir)


def launch(
    arguments: list[str], *, processes: int = 1, timeout: float = 300, launcher: str = "deepspeed"
) -> subprocess.CompletedProcess[str]:
    """Run a script of ours under a launcher, or plainly for `launcher="python"`, and return what it printed."""
    port = str(29600 + os.getpid() % 1000)
    prefix = {
        "python": [sys.executable],
        "torchrun": [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", str(processes), "--master_port", port],
        "deepspeed": [sys.executable, "-m", "deepspeed.launcher.runner", "--num_accelerators", str(processes), "--master_port", port],
    }[launcher]
    return subprocess.run([*prefix, *arguments], cwd=ROOT, env=fresh(), capture_output=True, text=True, timeout=timeout, check=False)


def train(*arguments: str | Path, processes: int = 1, timeout: float = 300) -> str:
    """Carry out recipes one after another under the deepspeed launcher and return what they said."""
    done = launch(["tests/run_recipes.py", *map(str, arguments)], processes=processes, timeout=timeout)
    assert done.returncode == 0, done.stderr[-3000:] + done.stdout[-3000:]
    return done.stderr


def fresh() -> dict[str, str]:
    """Return the environment of a shell in which nothing distributed has run; tests in this process may have left theirs."""
    environment = os.environ | {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}", "PYTHONPATH": ""}
    return {name: value for name, value in environment.items() if name not in DISTRIBUTED}
