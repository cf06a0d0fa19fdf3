"""Every script of benchmarks/, docs/ and pretraining/ that a page shows is carried out: on small stand-ins, few rows and few steps.

One table says which line of a page is carried out how, and what must come of it. No time is asserted: figures of so little say nothing.
"""

from __future__ import annotations

import json
import re
import shlex
import shutil
import subprocess
import sys
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from helpers.launchers import fresh
from helpers.llama_runs import ENDS, make_tokenizer, save_with_tokenizer
from helpers.models import make_t5
from helpers.paths import EMBEDDED, ROOT
from helpers.pictures import make_pictures, make_tower, task_of, vision_of
from helpers.shown import commands

pytestmark = pytest.mark.slow
SCRIPTS = ("benchmarks/", "docs/", "pretraining/")
EXCUSED = {  # what is not carried out here, and why
    "bash benchmarks/gpu.sh": "needs a GPU, and weights of T5-3B",
    "python benchmarks/peft_tests.py": "needs a clone of PEFT, whose tests are not in its package",
    "python pretraining/text.py": "downloads what it reads; that is what it does",
}
SMALL = "--batch 2 --source 16 --target 4 --layers 0,2 --warmup 1 --repeat 1"
N = r"[\d,.]+"


@dataclass(frozen=True, kw_only=True)
class Short:
    """What is carried out in place of a line that pages show."""

    shown: str  # what the line begins with, after settings; nothing where only the script's own docstring shows it
    words: str
    says: str = ""  # a pattern in what it prints
    makes: str = ""  # a file
    after: str = ""  # the name of another that has to be carried out first

    @property
    def script(self) -> str:
        return self.words.split()[0].removeprefix("{here}/")


TABLE = {
    "untrained": Short(
        shown="python benchmarks/untrained_backbone.py /tmp/untrained",
        words="benchmarks/untrained_backbone.py {here}/untrained",
        makes="untrained/model.safetensors",
    ),
    "checkpoint": Short(
        shown="python benchmarks/make_checkpoint.py google-t5/",
        words="benchmarks/make_checkpoint.py google-t5/t5-small {here}/t5-small",
        makes="t5-small/model-00001.safetensors",
    ),
    "placements": Short(
        shown="python benchmarks/placements.py /tmp/t5-large",
        words="benchmarks/placements.py {t5} --cases tensor_parallel:2:bf16",
        says=rf"\| tensor_parallel \| 2 \| bf16 \| [1-9]\d* \| 1\.00 \| -?{N} \| -?{N} \|",
    ),
    "planned": Short(
        shown="python benchmarks/planned.py",
        words="benchmarks/planned.py --recipes quickstart --batches 2 --set data.max_source_length=16",
        says=rf"\| quickstart \| 2 \| {N} \| {N} \| [+-]\d\.\d% \| \w.* \|",
    ),
    "the paper's memory": Short(
        shown="python benchmarks/paper_memory.py",
        words="benchmarks/paper_memory.py --recipes t5-base-lst",
        says=r"\| t5-base-lst \| 5\.5 \| 1\.6 \| 1\.6 \| 1\.0 \|",
    ),
    "steps": Short(
        shown="python benchmarks/steps.py /tmp/t5-",
        words=f"benchmarks/steps.py {{t5}} {SMALL} --together --cases lora-checkpointed:fp32 lst:fp32",
        says=rf"\| lora-checkpointed:fp32 \| {N} \| 1\.00 \|.*\n\| lst:fp32 \| {N} \| {N} \| {N} \|",
    ),
    "reuse": Short(
        shown="python benchmarks/reuse.py /tmp/t5-",
        words=f"benchmarks/reuse.py {{t5}} {SMALL} --batches 2 --epochs 1 --members 2 --cases members-cached-plain:fp32",
        says=rf"\| members-cached-plain:fp32, warm \| {N} \| {N} \| {N} \|",
    ),
    "reuse, two trees": Short(
        shown="python benchmarks/reuse.py /tmp/t5-small --batch 8 --layers 1,2,3,4,5 --batches 2 --epochs 5",
        words=f"benchmarks/reuse.py {{t5}} {SMALL} --batches 2 --epochs 1 --against . --cases lst:fp32",
        says=rf"\| lst:fp32 \| {N} \| {N} \| {N} \|",
    ),
    "sweep": Short(
        shown="python benchmarks/sweep.py /tmp/sweep",
        words="benchmarks/sweep.py {here}/sweep --rows 16 --eval-rows 8 --epochs 1 --grid seed=0,1 --alone 1",
        says=rf"2 together, cached: {N} s(.*\n)*together over alone: {N}, {N}",
        makes="sweep/times.json",
    ),
    "Fisher": Short(
        shown="python benchmarks/fisher.py /tmp/t5-large",
        words="benchmarks/fisher.py {t5} --examples 2 --source 16",
        says=rf"\| pass, stored and read \| [1-9]\d* \| {N} \| {N} \| {N} \|",
    ),
    "methods": Short(
        shown="python benchmarks/methods.py /tmp/study --packages",
        words="benchmarks/methods.py {here}/study --tasks kind --methods lst-norm --epochs 1",
        says=r"kind lst-norm: learning rate \d",
    ),
    "methods, table": Short(
        shown="python benchmarks/methods_table.py /tmp/study",
        words="benchmarks/methods_table.py {here}/study --tasks kind --epochs 1 --plot {here}/methods.png",
        says=rf"\| lst-norm \| {N} ± {N} \({N}\*?\) \| {N} \| 7\.35 \| 1\.74 \| 0\.49 \|",
        makes="methods.png",
        after="methods",
    ),
    "ensemble": Short(
        shown="python benchmarks/ensemble.py /tmp/study",
        words="benchmarks/ensemble.py {here}/study --tasks kind --seeds 2 --epochs 1",
        says=rf"\| lst-norm, 1 \| kind \| {N} ± {N} \| {N} \|",
    ),
    "pictures": Short(
        shown="python benchmarks/pictures.py N.jsonl N.png",
        words="benchmarks/pictures.py {here}/pictures/predictions.jsonl {here}/answers.png",
        says=r"all +75\.00 % of 48 questions",
        makes="answers.png",
    ),
    "pictures, blank": Short(
        shown="python benchmarks/pictures.py blank data/easy-vqa",
        words="benchmarks/pictures.py blank {here}/pictures {here}/blank",
        makes="blank/rows.jsonl",
    ),
    "methods on pictures": Short(
        shown="python benchmarks/picture_methods.py /tmp/six",
        words="benchmarks/picture_methods.py {here}/six --epochs 1 --methods lst --set {pictures} data.max_train_rows=8",
        says=rf"\| lst \| {N} \| 0\.003: {N} \| {N} \| {N} \| [1-9]\d* \| -?{N} \| {N} \|",
    ),
    "beside an LLM": Short(
        shown="python benchmarks/llm.py /tmp/llm-study",
        words="benchmarks/llm.py {here}/llm-study --model {llama} --tasks few --contexts none --parts pair ladder tail pretrained probe",
        says=rf"\| few \| ladder and tail, averaged \| [\de.-]+, [\de.-]+ \| {N} \| {N} \({N} {N} {N}\) \| {N} \| {N} \|\n"
        rf"(.*\n)*\| few \| ladder, no context: chosen \w+, none \| [\de.-]+ \| {N} \| {N} \({N} {N} {N}\) \| {N} \| {N} \|\n"
        rf"(.*\n)*\| few \| tail: chosen tail\d+(-wide)? \| [\de.-]+ \| {N} \| {N} \({N} {N} {N}\) \| {N} \| {N} \|\n"
        rf"(.*\n)*\| few \| ladder, trained on plain text first \| [\de.-]+ \| {N} \| {N} \({N} {N} {N}\) \| {N} \| {N} \|\n"
        rf"(.*\n)*\| few \| probe, no context \|  \| {N} \| {N} \({N}\) \|  \| {N} \|",
    ),
    "faces": Short(  # both train as many weights beside the language model
        shown="python benchmarks/faces.py /tmp/faces",
        words="benchmarks/faces.py {here}/faces --llm {llama} --steps 1 --llm-steps 1 --rounds 1 "
        "--only 'SFTTrainer, ladder' 'SmolLM2-135M, harness'",
        says=rf"SFTTrainer, ladder \| \d+ \| ([\d,]+) \|.* {N} \|\n\| .* harness, ladder \| \d+ \| \1 \|.* {N} \|",
    ),
    "serving": Short(
        shown="python benchmarks/serving.py",
        words="benchmarks/serving.py tiny-t5 --requests 1 --rounds 1 --clients 4 --sides 2 --apart 1 --parts together labels",
        says=rf"(\d+) of \1 answers are(.*\n)+PEFT LoRA, 2 adapters.* {N} times\n.*twenty {N} ms",
    ),
    "rows": Short(
        shown="python benchmarks/rows.py --rows",
        words="benchmarks/rows.py --rows 500 --starts 1 cache.enabled=true evaluation.method=likelihood",
        says=rf"500 rows, start 1: \{{'peak_mb': {N}, 'seconds_to_first_step': .*, peak above 400 rows: -?{N} MB",
    ),
    "loader": Short(
        shown="python benchmarks/loader.py --rounds 2",
        words="benchmarks/loader.py --rows 400 --rounds 1 --steps 2",
        says=rf"\| HF's Trainer's loader \| {N} \| {N} \|\n\| a training step \| {N} \| 1\.0 \|",
    ),
    "rows to predict": Short(
        shown="python benchmarks/predict_rows.py --rows",
        words="benchmarks/predict_rows.py --rows 300",
        says=rf"300 rows: {N} s, peak {N} MB(.*\n)+killed after .* answers equal",
    ),
    "index of taps": Short(
        shown="python benchmarks/tap_index.py",
        words="benchmarks/tap_index.py --records 1000",
        says=rf'1,000 records: .*"one_look_up_us": {N}',
    ),
    "start": Short(
        shown="python benchmarks/start.py .",
        words="benchmarks/start.py . --runs 1",
        says=rf"\| {re.escape(str(ROOT))} \| [1-9]{N} \| {N} \| 1\.00 \|",
    ),
    "kills": Short(
        shown="python benchmarks/kills.py --kills",
        words="benchmarks/kills.py --kills 1 --interrupts 1 --each 2 --seed 7 --kinds cache",
        says=r'"runs": ([1-9]\d*), "identical": \1, .*"tracebacks": 0',
    ),
    "faults": Short(
        shown="python benchmarks/faults.py .",
        words="benchmarks/faults.py . --only B11f",
        says=r"\| B11f \| .* \| holds \| test_",
    ),
    "trace": Short(
        shown="",
        words="benchmarks/trace.py {here}/trace.json --steps 2",
        says=r"0\.5 ms a step, of them 40% idle; 1 kernels\nwaits a step: cudaStreamSynchronize 0\.5; 0\.1 ms of them\n"
        r" +0\.30 ms a step  gemm",
    ),
    "labelled set": Short(
        shown="",
        words="pretraining/labelled.py --folder {here}/text --output {here}/labelled",
        makes="labelled/test.jsonl",
    ),
    "pretraining": Short(
        shown="python pretraining/pretrain.py --folder F",
        words="pretraining/pretrain.py --folder {here}/text --output {here}/pretrained --minutes 0.02",
        says=rf'"held_out_loss": {N}, "untrained_loss": {N}, "steps": [1-9]',
        makes="pretrained/README.md",
    ),
    "what a recipe can say": Short(shown="python docs/make_recipe_md.py", words="{here}/docs/make_recipe_md.py", makes="docs/recipe.md"),
    "what works with what": Short(shown="python docs/make_support_md.py", words="{here}/docs/make_support_md.py", makes="docs/support.md"),
}


def embedded_rows(split: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (EMBEDDED / "wordnet" / f"{split}.jsonl").read_text().splitlines()]


def write_rows(path: Path, rows: list[dict[str, Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def write_studies(here: Path) -> None:
    """Write the tasks of both studies as the studies keep them, so that nothing has to be downloaded."""
    for split, count in (("train", 16), ("validation", 8), ("test", 8)):
        rows = [row for row in embedded_rows(split) if row["kind"] in ("person", "food")][:count]
        kinds = [{"word": row["word"], "definition": row["definition"], "target": row["kind"]} for row in rows]
        moods = [{"text": row["definition"], "target": ("positive", "negative")[number % 2]} for number, row in enumerate(rows)]
        write_rows(here / "study" / "kind" / f"{split}.jsonl", kinds)
        write_rows(here / "llm-study" / "few" / f"{split}.jsonl", moods)
        write_rows(here / "llm-study" / "plain" / f"{split}.jsonl", [{"text": row["word"], "target": row["definition"]} for row in rows])


def write_predictions(rows: Path) -> None:
    """Say of each row of pictures what a run would have answered: always yes where the question is whether it is red."""
    told = [json.loads(line) for line in rows.read_text().splitlines()]
    for row in told:
        row["kind"] = "yes or no" if row["answer"] in ("yes", "no") else "colour"
        row["prediction"] = row["answer"] if row["kind"] == "colour" or row["answer"] == "yes" else "yes"
    for row in [row for row in told if row["kind"] == "yes or no"][1:13:2]:
        row["prediction"] = row["answer"]
    for row in told:
        row["image"] = str(rows.parent / row["image"])
    write_rows(rows.parent / "predictions.jsonl", told)


def write_trace(path: Path) -> None:
    """Two steps in a millisecond: two kernels, of which the second waits, and one look from the processor."""
    kernel = {"ph": "X", "cat": "kernel", "name": "gemm", "dur": 300}
    events = [kernel | {"ts": 0}, kernel | {"ts": 700}]
    path.write_text(json.dumps({"traceEvents": [*events, {"ph": "X", "name": "cudaStreamSynchronize", "ts": 0, "dur": 200}, {"ph": "M"}]}))


def write_text(folder: Path) -> None:
    """Write the embedded rows as WordNet's files have them, and a novel as R keeps it, where pretraining reads them."""
    numbers = {"act": 4, "artifact": 6, "attribute": 7, "cognition": 9, "communication": 10, "food": 13, "person": 18, "state": 26}
    rows = [row for split in ("train", "validation", "test") for row in embedded_rows(split)]
    wordnet = folder / "wordnet-base/usr/share/wordnet"
    wordnet.mkdir(parents=True)
    for part in ("noun", "verb", "adj", "adv"):  # nouns are drawn for the labelled set, verbs are read
        lines = [
            f"{number:08} {numbers[row['kind']]:02} {part[0]} 01 {row['word'].replace(' ', '_')} 0 000 | {row['definition']}"
            for number, row in enumerate(rows if part in ("noun", "verb") else rows[:10])
        ]
        (wordnet / f"data.{part}").write_text("  1 a licence\n" + "\n".join(lines) + "\n", "latin-1", errors="replace")
    lines = [b"It is a truth universally acknowledged,", b"that a single man must be in want of a wife.", b""]
    raw = b"".join(b"\x00\x04\x00\x09" + len(line).to_bytes(4, "big") + line for line in lines)
    novels = folder / "r-cran-janeaustenr/usr/lib/R/site-library/janeaustenr/data/Rdata.rdb"
    novels.parent.mkdir(parents=True)
    novels.write_bytes(len(raw).to_bytes(4, "big") + zlib.compress(raw))


@pytest.fixture(scope="module")
def here(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with what stands in for checkpoints, data sets and downloads."""
    here = tmp_path_factory.mktemp("short")
    make_t5(here / "t5", d_model=128, d_ff=256, d_kv=32)
    save_with_tokenizer("llama", make_tokenizer(**ENDS), here / "llama", num_hidden_layers=30, max_position_embeddings=1024)
    write_studies(here)
    write_predictions(make_pictures(here / "pictures"))
    make_tower(here / "tower")
    write_trace(here / "trace.json")
    write_text(here / "text")
    shutil.copytree(ROOT / "docs", here / "docs", ignore=lambda _, names: [name for name in names if not name.startswith("make_")])
    (here / "tests").symlink_to(ROOT / "tests")
    (here / "tmp").mkdir()
    return here


def pictures_of(here: Path) -> str:
    """Return what changes the recipe of easy-VQA to small pictures and a small tower."""
    task = task_of(here / "pictures" / "rows.jsonl", name="easy-vqa", kind="text", test=str(here / "pictures" / "rows.jsonl"), labels=None)
    changed = {f"task.{key}": value for key, value in task.items() if key in ("train", "validation", "test")}
    changed |= {f"vision.{key}": value for key, value in vision_of(here / "tower", image_size=32).items()}
    return " ".join(shlex.quote(f"{key}={value}") for key, value in changed.items())


@pytest.fixture(scope="module")
def carried_out(here: Path) -> Callable[[str], str]:
    """A function that carries out one of the table, once, and what it needs first; it returns what was printed."""
    printed: dict[str, str] = {}

    def carry_out(name: str) -> str:
        short = TABLE[name]
        if short.after:
            carry_out(short.after)
        if name not in printed:
            words = shlex.split(short.words.format(here=here, t5=here / "t5", llama=here / "llama", pictures=pictures_of(here)))
            own = {"OMP_NUM_THREADS": "1", "TMPDIR": str(here / "tmp"), "XDG_CACHE_HOME": str(here / "cache")}
            done = subprocess.run(
                [sys.executable, *words], cwd=ROOT, env=fresh() | own, capture_output=True, text=True, timeout=600, check=False
            )
            assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
            printed[name] = done.stdout
        return printed[name]

    return carry_out


@pytest.mark.parametrize("name", TABLE)
def test_a_script_does_in_short_what_pages_show_of_it(name: str, here: Path, carried_out: Callable[[str], str]) -> None:
    short, printed = TABLE[name], carried_out(name)
    assert re.search(short.says, printed), printed
    assert not short.makes or (here / short.makes).stat().st_size > 100


@pytest.mark.parametrize("page", ["recipe.md", "support.md"])
def test_a_page_that_its_script_makes_is_the_one_that_is_kept(page: str, here: Path, carried_out: Callable[[str], str]) -> None:
    carried_out("what a recipe can say" if page == "recipe.md" else "what works with what")
    assert (here / "docs" / page).read_text() == (ROOT / "docs" / page).read_text()


def shown_lines() -> list[str]:
    """Return lines of pages that run a script of these folders."""
    each = (shown.words for shown in commands())
    return [shlex.join(words) for words in each if words[0] in ("python", "bash") and words[1].startswith(SCRIPTS)]


def test_every_line_that_pages_show_is_carried_out_or_excused() -> None:
    starts, lines = [*(short.shown for short in TABLE.values() if short.shown), *EXCUSED], shown_lines()
    assert len(lines) > 40 and [line for line in lines if not line.startswith(tuple(starts))] == []
    assert [start for start in starts if not any(line.startswith(start) for line in lines)] == [], "no page shows it any more"
    assert all(not short.shown or short.shown.split()[1] == short.script for short in TABLE.values())


def test_every_script_is_carried_out_or_excused() -> None:
    scripts = {path.relative_to(ROOT).as_posix() for name in SCRIPTS for path in (ROOT / name).iterdir() if path.suffix in (".py", ".sh")}
    programs = {script for script in scripts if script.endswith(".sh") or '__name__ == "__main__"' in (ROOT / script).read_text()}
    assert programs == {short.script for short in TABLE.values()} | {start.split()[1] for start in EXCUSED}
