"""Small real models, made here: nothing is downloaded, nothing is mocked."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import absl.logging
import pytest
import torch

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("OMP_NUM_THREADS", "1")
if not torch.cuda.is_available():
    os.environ.setdefault("DS_ACCELERATOR", "cpu")

from transformers import MT5ForConditionalGeneration

from helpers import counting, slurm
from helpers.launchers import fresh, launch
from helpers.models import make_t5
from helpers.paths import EMBEDDED, ROOT
from helpers.recipes import recipe_writer
from helpers.training import train

__all__ = ["EMBEDDED", "ROOT", "fresh", "launch", "make_t5", "recipe_writer", "train"]  # old names: import them from `helpers`

# absl, which rouge_score brings along, closes the stream that it found as sys.stderr, here pytest's own, when logging is configured while
# a test has put another in its place, as importing submitit inside a CliRunner does. This stream it leaves alone.
absl.logging.get_absl_handler().python_handler.stream = sys.__stderr__

STARTED = counting.watch()
BEFORE = pytest.StashKey[tuple[int, int]]()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item: pytest.Item) -> Iterator[object]:
    item.stash[BEFORE] = STARTED.now()
    return (yield)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_teardown(item: pytest.Item) -> Iterator[object]:
    result = yield
    programs, forked = (now - before for now, before in zip(STARTED.now(), item.stash[BEFORE], strict=True))
    item.user_properties.append(("started", (programs, forked)))
    return result


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Say how many processes were started: nearly all of a suite's minutes go into that."""
    done = [report for report in terminalreporter.stats.get("", []) if getattr(report, "when", None) == "teardown"]
    started = [value for report in done for name, value in report.user_properties if name == "started" and any(value)]
    programs, forked = (sum(pair[number] for pair in started) for number in (0, 1))
    terminalreporter.write_line(f"{len(started)} of {len(done)} tests started {programs} programs and forked {forked} ranks")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Begin with what waits for Slurm: it leaves the other workers the cores. Skip what needs a GPU where there is none."""
    items.sort(key=lambda item: item.path.name not in ("test_slurm_requeue.py", "test_slurm_jobs.py", "test_slurm_signals.py"))
    for item in items:
        if item.get_closest_marker("gpu") and not torch.cuda.is_available():
            item.add_marker(pytest.mark.skip(reason="needs a GPU: torch sees none here"))


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


@pytest.fixture
def write_recipe(tmp_path: Path, tiny_t5_dir: Path) -> Callable[..., Path]:
    return recipe_writer(tmp_path, tiny_t5_dir)


@pytest.fixture(scope="session")
def cluster() -> Iterator[slurm.Cluster]:
    yield from slurm.running()


@pytest.fixture
def an_empty_queue(cluster: slurm.Cluster) -> Iterator[None]:
    yield
    cluster("scancel", "--me")
    cluster.wait_until_idle()
