"""What pages show is carried out as it stands there, in short: a small model in the place of a large one, a few rows, a few steps.

Every command is in a table: IN_A_FOLDER and the tests below carry it out; ELSEWHERE says which test does, or why none does.
All of them go through their parsers in test_docs_commands.py.
"""

from __future__ import annotations

import contextlib
import json
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml
from typer.testing import CliRunner

from helpers.launchers import free_port, fresh
from helpers.models import make_t5
from helpers.paths import ROOT
from helpers.pictures import CHANNELS, make_pictures, make_tower
from helpers.runs import result
from helpers.shown import commands, folder_of_recipes
from lst_scale.cli.main import app

LINES = {shlex.join(shown.words) for shown in commands()}
BIN = Path(sys.executable).parent
RUN, OTHER = "runs/tone-reviews-seed0", "runs/tone-reviews-seed1"
STEPS = ("training.max_steps=2", "training.evaluate_every=2")
FEW = (*STEPS, "data.max_train_rows=32", "data.max_eval_rows=8")
FILM = {"name": "reviews", "kind": "classification", "source": ["text"], "target": "tone"} | dict.fromkeys(
    ("train", "validation"), "rows.csv"
)


@dataclass(frozen=True)
class Short:
    """How a command is made short: words in the place of some of its own, and more at its end; what it then says."""

    says: str = ""
    instead: dict[str, str] = field(default_factory=dict)
    more: tuple[str, ...] = ()
    where: str = "."

    def words(self, line: str) -> list[str]:
        return [*(self.instead.get(word, word) for word in shlex.split(line)), *self.more]


ON_A_RUN = {"RUN": RUN, "FILE": "rows.csv"}
DRY = ("--dry-run",)
IN_A_FOLDER = {  # in that of the README's two commands
    "lst-scale runs": Short("done"),
    "lst-scale runs --json": Short('"state": "done"'),
    "lst-scale compare runs": Short("trainable_percent"),
    "lst-scale compare runs --plot score-memory.png": Short("trainable_percent"),
    "lst-scale chat runs/kinds-person-or-food-seed0": Short(),
    "lst-scale chat RUN": Short(instead=ON_A_RUN),
    "lst-scale predict RUN FILE --output answers.jsonl": Short("answers.jsonl", ON_A_RUN),
    "lst-scale predict RUN FILE --with RUN": Short("4 predictions", ON_A_RUN, ("--output", "with.jsonl")),
    "lst-scale ensemble RUN RUN ...": Short("score", ON_A_RUN | {"...": OTHER}),
    "lst-scale predict runs/t5-base-reviews-seed0 rows.csv --beside runs/t5-base-tone-seed0 --output answers.jsonl": Short(
        "each answered by 2 runs", where="server"
    ),
    "lst-scale eval runs/kinds-person-or-food-seed0 --tasks kinds --include my-tasks --output kinds.json": Short("acc"),
    "lst-scale train --recipe t5-3b --print-recipe": Short("normalize_taps"),
    "lst-scale train RECIPE --print-recipe": Short("normalize_taps", {"RECIPE": "quickstart"}),
    "lst-scale cache list": Short(),
    "lst-scale cache rows": Short(),
    "lst-scale plan --recipe qwen3-8b": Short("QLoRA, nf4, checkpointed"),
    "lst-scale plan --recipe t5-3b --gpu-memory 24GB --json": Short('"fits": true'),
    "lst-scale train baskets.yaml": Short(
        more=(
            "backbone.checkpoint=t5",
            "vision.image_model=transformers:tower",
            f"vision.feature_dim={CHANNELS}",
            "vision.pooled_grid=2",
            *FEW,
        )
    ),
    "lst-scale predict runs/baskets-baskets-seed0 new.jsonl": Short("8 predictions", more=("--output", "said.jsonl")),
    "python slurm/submit.py --recipe t5-base task=rte --dry-run": Short("#SBATCH --nodes=1"),
    "python slurm/submit.py --recipe t5-3b --nodes 2 --gpus-per-node 8 task=rte": Short("#SBATCH --nodes=2", more=DRY),
    "python slurm/sweep.py --recipe t5-base task=rte,mrpc seed=0,1,2 method.reduction_factor=4,8 --at-most 6": Short(
        "--array=0-11%6", more=DRY
    ),
    "python slurm/sweep.py --recipe t5-base task=rte,mrpc seed=0,1,2 --at-most 6": Short("--array=0-5%6", more=DRY),
    "python slurm/sweep.py --recipe t5-3b seed=0,1,2,3 optimizer.learning_rate=1e-3,3e-3 data.shuffle_seed=0 --together 8": Short(
        "t5-3b-learning_rate-3e-3-rte-seed3", more=DRY
    ),
    "python slurm/status.py": Short("DONE"),
    "python slurm/resubmit.py": Short("nothing to resubmit"),
    "python slurm/collect.py --format markdown": Short("| trainable"),
}
ELSEWHERE = {  # what a command begins with: what carries it out, or why nothing does
    "python benchmarks/": "tests/test_benchmarks_in_short.py",
    "bash benchmarks/gpu.sh": "needs a GPU",
    "python docs/make_": "tests/test_benchmarks_in_short.py",
    "python examples/": "tests/test_examples.py",
    "python pretraining/": "tests/test_benchmarks_in_short.py",
    "cd ": "a shell's; what follows it is carried out",
    "echo ": "a shell's; what reads it is carried out",
    "jupyter execute": "tests/test_examples.py carries the notebook out",
    "make test": "this test is part of it; CI carries out test-newest after it, and test-fast is a part of that",
    "make docs": "tests/test_docs_site.py builds the site by the same command",
    "pip ": "from a registry: make setup, which comes before every test, and make test-newest, which installs the wheel and its extras",
    "apt-get download": "another's package, from Debian",
    "git ": "git's, and of an older commit",
    "sbatch ": "Slurm's; tests/test_slurm_jobs.py submits slurm/train.sbatch",
    "python slurm/submit.py --predict runs/NAME": "tests/test_slurm_jobs.py",
    "python slurm/sweep.py ... --together 8": "a part of a command that is carried out",
    "python slurm/status.py --watch 10": "never ends; without --watch it is carried out",
    "lst-scale slurm sweep ... backbone.context.draw=0,1,2": "a part of a command; tests/test_context.py trains after draws",
    "lst-scale eval RUN --tasks hellaswag": "a download; tests/test_eval_harness.py has tasks of its own",
    "lst-scale eval --backbone HuggingFaceTB/SmolLM2-135M": "a download; tests/test_eval_harness.py has tasks of its own",
    "lst-scale predict RUN rows.jsonl task=vqa": "tests/test_release_tasks.py",
    "lst-scale plan --recipe t5-3b backbone.precision=int8": "tests/test_docs_commands.py compares its figures with the pages'",
    "deepspeed --num_accelerators 2 lst_scale/train.py --recipe quickstart seed=N": "make quickstart is that command",
    "deepspeed --num_accelerators 2 lst_scale/train.py --recipe easy-vqa": "make quickstart-vision is that command",
    "lst-scale predict runs/easy-vqa-easy-vqa-seedN": "make quickstart-vision has that command",
    "python -m lst_scale.train --recipe t5-3b-8bit name=cpu": "deepspeed lst_scale/train.py --recipe t5-3b-8bit is carried out",
    "lst-scale plan --recipe t5-3b --gpu-memory 24GB": "with --json it is carried out",
    "lst-scale plan --recipe NAME --gpu-memory 24GB": "with a name it is carried out",
    "lst-scale train smollm2-135m": "make quickstart-llm trains that recipe, and the probe",
    "lst-scale from-gguf": "make quickstart-llm begins with it",
    "python -m lst_scale.data.easy_vqa": "make quickstart-vision begins with it",
}


def lst_scale(*words: str, given: str = "") -> str:
    """Carry out a command of ours in this process; return what it printed, on stderr too."""
    done = CliRunner().invoke(app, words, input=given)
    assert done.exit_code == 0, done.output + repr(done.exception)
    return done.output


def run(*words: object, cwd: Path = ROOT, **options: str) -> str:
    """Carry out a program; return what it printed."""
    done = subprocess.run([*map(str, words)], cwd=cwd, env=fresh() | options, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0 and "Traceback" not in done.stderr, done.stderr[-4000:] + done.stdout[-2000:]
    return done.stdout + done.stderr


@pytest.fixture(scope="module")
def here(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder in which the README's two commands were carried out, and in which there is what other pages name."""
    here = folder_of_recipes(tmp_path_factory.mktemp("short") / "here")
    for split in ("train", "validation", "test"):
        lines = (ROOT / "examples" / "own_csv" / f"{split}.csv").read_text().splitlines(keepends=True)
        (here / f"{split}.csv").write_text("".join(lines[:33]))
    (here / "rows.csv").write_text("text,tone\na fine film,good\na dull film,bad\na warm play,good\na long play,bad\n")
    make_t5(here / "t5", dropout_rate=0.0)
    make_tower(here / "tower")
    pictures = make_pictures(here / "pictures")
    questions = [json.loads(line) for line in pictures.read_text().splitlines()]
    rows = "".join(json.dumps(row | {"photo": f"pictures/{row['image']}"}) + "\n" for row in questions)
    for name, size in (("train", 32), ("validation", 8), ("new", 8)):
        (here / f"{name}.jsonl").write_text("".join(rows.splitlines(keepends=True)[:size]))
    recipe = {
        "name": "tone",
        "task": FILM,
        "backbone": {"checkpoint": "t5", "precision": "fp32"},
        "method": {"name": "lst", "reduction_factor": 4},
    }
    (here / "tone.yaml").write_text(yaml.safe_dump(recipe | {"evaluation": {"method": "likelihood"}}))
    first, second = readme()
    with contextlib.chdir(here):
        lst_scale(*shlex.split(first)[1:], *FEW)
        lst_scale(*shlex.split(second)[1:])
        for seed in (0, 1):
            lst_scale("train", "tone.yaml", f"seed={seed}", "training.global_batch_size=2", *STEPS)
    for name in ("t5-base-reviews-seed0", "t5-base-tone-seed0", "t5-base-kinds-seed0", "t5-11b-reviews-seed0"):
        shutil.copytree(here / RUN, here / "server" / "runs" / name)
    for name in ("t5", "rows.csv"):
        (here / "server" / name).symlink_to(here / name)
    write_task(here / "my-tasks")
    return here


def write_task(folder: Path) -> None:
    """Write the task of lm_eval that a page shows, and rows for it."""
    [text] = [
        block
        for block in re.findall(r"```yaml\n(.*?)```", (ROOT / "docs" / "tools.md").read_text(), flags=re.DOTALL)
        if "task: kinds" in block
    ]
    rows = [{"definition": "a person who cooks", "kind": "person"}, {"definition": "a sweet dish", "kind": "food"}]
    folder.mkdir()
    (folder / "test.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "kinds.yaml").write_text(text.replace("/data/kinds/test.jsonl", str(folder / "test.jsonl")))


def readme() -> list[str]:
    """Return the README's two commands on a table of one's own."""
    blocks = re.findall(r"```bash\n(.*?)```", (ROOT / "README.md").read_text(), flags=re.DOTALL)
    [lines] = [block.strip().splitlines() for block in blocks if "kinds.yaml" in block]
    assert len(lines) == 2
    return lines


@pytest.mark.slow
def test_the_two_commands_of_the_readme_train_on_a_table_and_answer_it(here: Path) -> None:
    assert len((here / "answers.jsonl").read_text().splitlines()) == 32


@pytest.mark.slow
@pytest.mark.parametrize("line", IN_A_FOLDER)
def test_a_command_is_carried_out_in_a_folder(here: Path, line: str, monkeypatch: pytest.MonkeyPatch) -> None:
    assert line in LINES, "no page shows it any more"
    program, *words = IN_A_FOLDER[line].words(line)
    if program == "python":
        path = Path(words.pop(0))
        assert path.parent.name == "slurm"
        words = ["slurm", path.stem, *words]
    monkeypatch.setenv("XDG_CACHE_HOME", str(here / "cache"))
    with contextlib.chdir(here / IN_A_FOLDER[line].where):
        assert IN_A_FOLDER[line].says in lst_scale(*words, given="a large bird that can not fly\n")


@pytest.mark.slow
def test_the_pipeline_that_a_page_shows_answers_for_that_run(here: Path) -> None:
    text = (ROOT / "docs" / "python.md").read_text()
    [shown] = [block for block in re.findall(r"```python\n(.*?)```", text, flags=re.DOTALL) if "as pipe:" in block]
    one, two = "\n    first = pipe(", "\n    both = pipe("
    names: dict[str, Any] = {}
    with contextlib.chdir(here):
        exec(shown.replace("\n    pipe(", one, 1).replace("\n    pipe(", two, 1), names)
    alone, beside = (answer["probabilities"] for answer in (names["first"], names["both"][0]))
    assert alone.keys() == {"food", "person"} and alone == pytest.approx(beside, abs=1e-4)  # beside another row sums round otherwise


def deepspeed(line: str, *more: object) -> str:
    """Carry out a command with DeepSpeed's launcher, at a port that is free."""
    words = shlex.split(line)
    assert words[0] == "deepspeed" and line in LINES
    return run(BIN / words[0], "--master_port", free_port(), *words[1:], *more)


@pytest.mark.slow
@pytest.mark.parametrize("recipe", ["t5-3b", "t5-3b-8bit"])
def test_the_main_job_trains(recipe: str, tmp_path: Path) -> None:
    """Its recipe beside a small T5 of as many blocks, on a table in the place of RTE."""
    make_t5(tmp_path / "t5", num_layers=24, dropout_rate=0.0)
    (tmp_path / "rows.csv").write_text("text,tone\na fine film,good\na dull film,bad\n")
    files = dict.fromkeys(("train", "validation"), str(tmp_path / "rows.csv"))
    more = [f"task={json.dumps(FILM | files)}", f"backbone.checkpoint={tmp_path / 't5'}", f"output_dir={tmp_path}", *STEPS]
    assert "step 2" in deepspeed(f"deepspeed lst_scale/train.py --recipe {recipe} task=rte", *more)
    assert (tmp_path / f"{recipe}-reviews-seed0" / "side_network" / "side_network.safetensors").is_file()


@pytest.mark.slow
def test_taps_are_kept_and_listed(tmp_path: Path) -> None:
    """Beside the embedded backbone, which is small as it is."""
    first, second = "python -m lst_scale.train --recipe quickstart cache.enabled=true evaluation.method=likelihood", "lst-scale cache list"
    assert {first, second} <= LINES
    run(sys.executable, *shlex.split(first)[1:], f"output_dir={tmp_path}", *FEW, XDG_CACHE_HOME=str(tmp_path))
    assert " payloads " in run(BIN / "lst-scale", "cache", "list", XDG_CACHE_HOME=str(tmp_path))


def make(target: str, cut: dict[Path, int], /, *, cwd: Path, **variables: object) -> str:
    """Carry out the lines of a target, but for those that install something; cut files to so many lines as soon as they are there."""
    given = [f"{name}={value}" for name, value in {"BIN": BIN, "PORT": free_port()}.items()]
    given += [f"{name}={value}" for name, value in variables.items()]
    lines = run("make", "--no-print-directory", "-n", "-o", "setup", target, *given, CURDIR=str(ROOT)).splitlines()
    said, left = "", dict(cut)
    for line in (line for line in lines if "pip install" not in line):
        said += run("bash", "-c", line, XDG_CACHE_HOME=str(cwd / "cache"))
        for path in [path for path in left if path.exists()]:
            path.write_text("".join(path.read_text().splitlines(keepends=True)[: left.pop(path)]))
    assert not left
    return said


def splits(folder: Path, **sizes: int) -> dict[Path, int]:
    return {folder / f"{split}.jsonl": size for split, size in sizes.items()}


@pytest.mark.slow
def test_make_quickstart(tmp_path: Path) -> None:
    """And a page answers rows with its run."""
    said = make("quickstart", {}, cwd=tmp_path, RUNS=tmp_path / "runs", MORE=" ".join(FEW))
    assert "step 2" in said
    rows = (ROOT / "lst_scale" / "embedded" / "wordnet" / "test.jsonl").read_text().splitlines(keepends=True)
    line = "lst-scale predict runs/quickstart-wordnet-kind-seed0 lst_scale/embedded/wordnet/test.jsonl --output predictions.jsonl"
    assert line in LINES
    (tmp_path / "lst_scale" / "embedded" / "wordnet").mkdir(parents=True)
    (tmp_path / "lst_scale" / "embedded" / "wordnet" / "test.jsonl").write_text("".join(rows[:8]))
    with contextlib.chdir(tmp_path):
        assert "8 predictions" in lst_scale(*shlex.split(line)[1:])


@pytest.mark.slow
def test_make_quickstart_vision(tmp_path: Path) -> None:
    data, sizes = tmp_path / "data", {"train": 256, "validation": 32, "test": 32}
    files = [f"task.{split}={data / split}.jsonl" for split in sizes]
    cut = splits(data, **sizes)
    said = make("quickstart-vision", cut, cwd=tmp_path, RUNS=tmp_path / "runs", VISION=data, MORE=" ".join([*files, "training.epochs=1"]))
    assert "32 predictions" in said and (data / "answers.png").is_file()


@pytest.mark.slow
def test_make_quickstart_llm(tmp_path: Path) -> None:
    """With the model that it names, and little of the data: what the model says without training is right more often than chance."""
    data, sizes = tmp_path / "data", {"train": 56, "validation": 16, "test": 48}
    more = [f"backbone.checkpoint={tmp_path / 'llm'}", *(f"task.{split}={data / split}.jsonl" for split in sizes)]
    cut = splits(data, **sizes)
    said = make("quickstart-llm", cut, cwd=tmp_path, RUNS=tmp_path / "runs", LLM=tmp_path / "llm", REVIEWS=data, MORE=" ".join(more))
    assert "before training" in said and "probabilities" in said
    ladder, probe = (result(tmp_path / "runs" / f"smollm2-135m{name}-movie-reviews-seed0") for name in ("", "-probe"))
    assert ladder["start_scores"]["accuracy"] > 60 and ladder["scores"]["accuracy"] > 60 and probe["scores"]["accuracy"] > 60
    assert ladder["context"].count("Sentiment:") == 8 and ladder["steps"] == 6 and ladder["cache"]["rows_run"] > 0
    assert {json.loads(line)["prediction"] for line in (data / "answers.jsonl").read_text().splitlines()} <= {"negative", "positive"}

    (data / "smollm2-135m").symlink_to(tmp_path / "llm")
    line = "lst-scale plan --recipe smollm2-135m --cpu backbone.precision=fp32 training.global_batch_size=4 backbone.context=null"
    assert line in LINES
    with contextlib.chdir(tmp_path):
        assert "checkpointed" in lst_scale(*shlex.split(line)[1:])


@pytest.mark.slow
@pytest.mark.parametrize("target", ["lint", "fuzz"])
def test_make_looks_after_the_code(target: str, tmp_path: Path) -> None:
    assert f"make {target}" in LINES
    make(target, {}, cwd=tmp_path, MINUTES=0.1, SEED=0)


@contextlib.contextmanager
def started(*words: object, cwd: Path, port: int) -> Iterator[str]:
    """Start a server; yield its address as soon as it answers. It ends in peace when it is told to."""
    with subprocess.Popen([*map(str, words)], cwd=cwd, env=fresh(), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as process:
        address, patience = f"http://127.0.0.1:{port}", time.monotonic() + 120
        try:
            while not answers(address):
                assert process.poll() is None and time.monotonic() < patience, process.communicate()[0]
                time.sleep(0.2)
            yield address
        finally:
            process.send_signal(signal.SIGTERM)
            process.communicate(timeout=60)


def answers(address: str) -> bool:
    try:
        return httpx.get(f"{address}/health").status_code == 200
    except httpx.ConnectError:
        return False


def asks(address: str) -> dict[str, dict[str, float]]:
    """Return what a server says to the request that a page shows, by model."""
    [line] = [line for line in LINES if line.startswith("curl ")]
    body = json.loads(shlex.split(line)[-1])
    results = httpx.post(f"{address}/v1/classify", json=body, timeout=60).raise_for_status().json()["results"]
    return {result["model"]: result["rows"][0]["probabilities"] for result in results}


@pytest.mark.slow
def test_a_server_answers_the_request_that_is_shown(here: Path) -> None:
    line = "lst-scale serve --backbone google-t5/t5-base --side reviews=runs/t5-base-reviews-seed0 --side kinds=runs/t5-base-kinds-seed0"
    assert line in LINES
    port, words = free_port(), line.replace("google-t5/t5-base", "t5").split()
    with started(
        BIN / words[0], *words[1:], "--side", "tone=runs/t5-base-tone-seed0", "--port", port, cwd=here / "server", port=port
    ) as address:
        said = asks(address)
    assert said["reviews"] == said["tone"] and said["tone"].keys() == {"good", "bad"}


@pytest.mark.slow
def test_a_server_on_two_ranks_answers_as_one_process(here: Path) -> None:
    [line] = [line for line in LINES if line.startswith("torchrun ")]
    port, words = free_port(), line.replace("google-t5/t5-11b", "t5").split()
    launcher = [BIN / words[0], "--master-port", free_port(), *words[1:]]
    with started(*launcher, "--side", "tone=runs/t5-base-tone-seed0", "--port", port, cwd=here / "server", port=port) as address:
        said = asks(address)
    assert sum(said["reviews"].values()) == pytest.approx(1)


@pytest.mark.slow
def test_a_shell_is_told_what_completes(tmp_path: Path) -> None:
    for line in ("lst-scale --show-completion", "lst-scale --install-completion"):
        assert line in LINES
        said = run("bash", "-c", f"{BIN / line}; exit $?", HOME=str(tmp_path))
    assert "completion installed" in said and "lst-scale" in (tmp_path / ".bashrc").read_text()


def carried_out() -> set[str]:
    """Return the lines that tests of this file name."""
    text = Path(__file__).read_text()
    return {line for line in LINES if f'"{line}"' in text}


def test_every_command_is_carried_out_or_excused() -> None:
    parts = (
        "lst-scale serve",
        "lst-scale ensemble",
        "lst-scale predict",
        "lst-scale plan",
        "lst-scale eval",
        "lst-scale slurm submit",
        "lst-scale plan --cpu",
    )
    named = {f"make {name}" for name in ("quickstart", "quickstart-vision", "quickstart-llm", "lint", "fuzz")}
    named |= {f"deepspeed lst_scale/train.py --recipe {name} task=rte" for name in ("t5-3b", "t5-3b-8bit")}
    left = (
        LINES
        - carried_out()
        - named
        - {*parts, *readme(), "lst-scale runs '[FOLDER]'", "lst-scale predict RUN FILE --output answers.jsonl"}
    )
    left = {line for line in left if not line.startswith(("curl ", "torchrun ", *ELSEWHERE))}
    assert left == set(), "carry it out here, or say in ELSEWHERE what does"
    assert [start for start in ELSEWHERE if not any(f"{line} ".startswith(start) for line in LINES)] == []
