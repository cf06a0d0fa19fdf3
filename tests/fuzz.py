"""Random damage to everything that a user or an earlier run wrote, and the commands that read it.

    python tests/fuzz.py --minutes 10 [--seed 0]

A case copies a small world (checkpoint, data, recipe, two finished runs, a tap cache), damages one of its files, and runs one command in
a process forked from this one. It must end, with status 0 and a right result, or with status 1 and one line on standard error that
begins with "error:"; never with a traceback, and never with a change outside the folders that the command may write. What is right is
known: damage that a resume, a cache or a prediction gets over gives bit for bit what no damage gives. Each failure is printed with the
number that repeats it.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import json
import math
import os
import random
import re
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

LIMIT_S = 120  # of one case; most take two seconds, and what does not end takes for ever
ODD: list[Any] = [None, -1, 0, 1, 3, 2**70, 1e308, float("nan"), float("inf"), "", "x", "a\nb", "[/red]", "../../x", "\ud800", "{x!r:>9}"]
ODD += [[], {}, [[1]], {"a": {"b": None}}, True, "9" * 5000, "0.5", "ä日", " ", "\x00"]

Outcome = tuple[int | None, str, str]  # exit status, or None past the limit; standard output; standard error


@dataclass(frozen=True)
class Command:
    """A command, the files whose damage it may meet, where it may write, and what it must leave when it ends well."""

    name: str
    arguments: tuple[str, ...]
    meets: tuple[str, ...]  # globs
    writes: tuple[str, ...]  # folders and files, as prefixes
    right: Callable[[Path, Path], str | None]  # (world, undamaged world) -> what is wrong


# ---------------------------------------------------------------------------------------------------------------- running


def forked(arguments: tuple[str, ...], folder: Path) -> Outcome:
    """Run `lst-scale` in a process forked from this one, in `folder`, and return how it ended."""
    out, err = folder.with_suffix(".out"), folder.with_suffix(".err")
    child = os.fork()
    if child == 0:
        status = 70
        try:
            os.setsid()
            os.chdir(folder)
            os.dup2(os.open(out, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), 1)
            os.dup2(os.open(err, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), 2)
            sys.argv = ["lst-scale", *arguments]
            from lst_scale.cli.main import main

            main()
            status = 0
        except SystemExit as end:
            status = end.code if isinstance(end.code, int) else 1 if end.code else 0
        except BaseException:
            traceback.print_exc()
        finally:
            with contextlib.suppress(Exception):
                sys.stdout.flush()
                sys.stderr.flush()
            os._exit(status)
    deadline = time.monotonic() + LIMIT_S
    pause = 0.01
    while time.monotonic() < deadline:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status), out.read_text(errors="replace"), err.read_text(errors="replace")
        time.sleep(pause)
        pause = min(0.2, pause * 1.5)
    os.killpg(child, signal.SIGKILL)
    os.waitpid(child, 0)
    return None, out.read_text(errors="replace"), err.read_text(errors="replace")


def snapshot(folder: Path) -> dict[str, str]:
    """Return the digest of every file below `folder`; of links and folders what they are."""
    found = {}
    for path in sorted(folder.rglob("*")):
        name = str(path.relative_to(folder))
        found[name] = f"-> {os.readlink(path)}" if path.is_symlink() else "folder" if path.is_dir() else _digest(path)
    return found


def _digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


# ---------------------------------------------------------------------------------------------------------------- damage


def damage(path: Path, chance: random.Random) -> str:
    """Damage one file in a way that fits it, or in a blunt one, and return what was done."""
    ways: list[Callable[[Path, random.Random], str | None]] = [_truncate, _flip, _blunt]
    if path.suffix in (".json", ".jsonl"):
        ways += [_mutate_json] * 6
    if path.suffix in (".yaml", ".yml"):
        ways += [_mutate_yaml] * 6
    if path.suffix == ".csv":
        ways += [_mutate_csv] * 6
    for _ in range(5):
        done = chance.choice(ways)(path, chance)
        if done:
            return done
    return _blunt(path, chance)


def _truncate(path: Path, chance: random.Random) -> str:
    size = chance.randrange(path.stat().st_size + 1)
    with path.open("r+b") as file:
        file.truncate(size)
    return f"cut at {size}"


def _flip(path: Path, chance: random.Random) -> str | None:
    content = bytearray(path.read_bytes())
    if not content:
        return None
    for _ in range(chance.choice((1, 4, 64))):
        content[chance.randrange(len(content))] = chance.randrange(256)
    path.write_bytes(content)
    return "bytes changed"


def _blunt(path: Path, chance: random.Random) -> str:
    way = chance.choice(("removed", "emptied", "a folder", "noise", "utf-16", "a loop", "nested", "zeros"))
    content = path.read_bytes()
    path.unlink()
    match way:
        case "a folder":
            path.mkdir()
        case "a loop":
            path.symlink_to(path.name)
        case "emptied":
            path.touch()
        case "noise":
            path.write_bytes(chance.randbytes(300))
        case "utf-16":
            path.write_bytes(content[:200_000].decode("utf-8", "replace").encode("utf-16"))
        case "nested":
            path.write_text("[" * 100_000)
        case "zeros":
            path.write_bytes(bytes(len(content)))
    return way


def _mutate_json(path: Path, chance: random.Random) -> str | None:
    text = path.read_text(errors="replace")
    lines = text.splitlines() if path.suffix == ".jsonl" else [text]
    if not lines:
        return None
    number = chance.randrange(len(lines))
    try:
        tree, done = _mutated(json.loads(lines[number]), chance)
    except ValueError:
        return None
    lines[number] = json.dumps(tree, ensure_ascii=chance.random() < 0.7)
    path.write_text("\n".join(lines) + "\n", errors="surrogatepass")
    return f"line {number + 1}: {done}"


def _mutate_yaml(path: Path, chance: random.Random) -> str | None:
    tree, done = _mutated(yaml.safe_load(path.read_text()), chance)
    try:
        path.write_text(yaml.safe_dump(tree))
    except UnicodeEncodeError:
        return None
    return done


def _mutate_csv(path: Path, chance: random.Random) -> str:
    lines = path.read_text().splitlines()
    number = chance.randrange(len(lines))
    cells = lines[number].split(",")
    odd = chance.choice(("", '"', "x" * 200_000, "\x00", ",", "nan", "{a}", "\r", "ä", " ", "1e999"))
    cells[chance.randrange(len(cells))] = odd
    lines[number] = ",".join(cells)
    path.write_text("\n".join(lines) + "\n")
    return f"line {number + 1}: a cell is {odd[:12]!r}"


def _mutated(tree: Any, chance: random.Random) -> tuple[Any, str]:
    """Return the tree with one node replaced, removed or added, and what was done."""
    places = list(_places(tree))
    if not places:
        return chance.choice(ODD), "all of it replaced"
    holder, key, where = chance.choice(places)
    way = chance.choice(("replace", "replace", "replace", "remove", "add"))
    odd = chance.choice(ODD)
    if way == "remove":
        del holder[key]
    elif way == "add" and isinstance(holder, dict):
        holder[chance.choice(("zzz", "", "name", "0"))] = odd
    else:
        holder[key] = odd
    return tree, f"{where}: {way} {str(odd)[:20]!r}"


def _places(tree: Any, where: str = "") -> Iterator[tuple[Any, Any, str]]:
    items = tree.items() if isinstance(tree, dict) else enumerate(tree[:50]) if isinstance(tree, list) else ()
    for key, value in items:
        yield tree, key, f"{where}.{key}"
        yield from _places(value, f"{where}.{key}")


# ---------------------------------------------------------------------------------------------------------------- worlds

RUN = "runs/a-kind-seed0"
PREDICT = ("predict", RUN, "data/new.jsonl", "--output", "told.jsonl")
DEVICE_FREE = {"CUDA_VISIBLE_DEVICES": "", "HF_HUB_OFFLINE": "1", "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"}


def make_world(folder: Path) -> None:
    """Write a checkpoint, data and a recipe, and carry out two small runs that fill a tap cache."""
    from helpers.models import make_t5

    make_t5(folder / "model", dropout_rate=0.0)
    source = Path(__file__).parent.parent / "lst_scale/embedded/wordnet/train.jsonl"
    rows = [json.loads(line) for line in source.read_text().splitlines()[:32]]
    (folder / "data").mkdir()
    for name, part in (("train", rows[:16]), ("validation", rows[16:24]), ("test", rows[24:])):
        lines = ["word,kind", *(f"{row['word']},{row['kind']}" for row in part)]
        (folder / f"data/{name}.csv").write_text("\n".join(lines) + "\n")
    (folder / "data/new.jsonl").write_text("".join(json.dumps({"word": row["word"], "id": i}) + "\n" for i, row in enumerate(rows[:6])))
    recipe = {
        "name": "a",
        "task": {
            "name": "kind",
            "kind": "classification",
            "train": "data/train.csv",
            "validation": "data/validation.csv",
            "test": "data/test.csv",
            "source": ["word"],
            "target": "kind",
            "labels": sorted({row["kind"] for row in rows}),
        },
        "backbone": {"checkpoint": "model", "precision": "fp32"},
        "method": {"name": "lst", "reduction_factor": 4, "side_layers": [0, 2]},
        "training": {"max_steps": 4, "global_batch_size": 4, "evaluate_every": 2, "deepspeed": "zero0"},
        # One order of batches and taps in full: then what is read, and what is run again, are the same bits.
        "data": {"max_source_length": 16, "shuffle_seed": 0},
        "evaluation": {"method": "likelihood"},
        "cache": {"enabled": True, "folder": "taps", "dtype": "fp32"},
    }
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    for arguments in (
        ("train", "recipe.yaml"),
        ("train", "recipe.yaml", "seed=1"),
        ("predict", RUN, "data/new.jsonl", "--output", "told.jsonl"),
    ):
        status, out, err = forked(arguments, folder)
        assert status == 0, (arguments, out, err)


def _weights(world: Path) -> dict[str, bytes]:
    """Return what the run trained, bit for bit; a file's own bytes also hold metadata in no fixed order."""
    from safetensors.numpy import load_file

    return {name: weight.tobytes() for name, weight in load_file(world / RUN / "side_network/side_network.safetensors").items()}


def _trained(world: Path, whole: Path) -> str | None:
    """A run that ended well holds a result with a finite score."""
    result = json.loads((world / RUN / "result.json").read_text())
    return None if math.isfinite(result["scores"]["score"]) else f"score {result['scores']}"


def _trained_alike(world: Path, whole: Path) -> str | None:
    return _trained(world, whole) or (None if _weights(world) == _weights(whole) else "other weights than without damage")


def _answered(world: Path, whole: Path) -> str | None:
    """Every row of the input has its answer, in valid JSON."""
    rows = len((world / "data/new.jsonl").read_text().split())
    lines = (world / "told.jsonl").read_text().splitlines()
    for line in lines:
        json.loads(line, parse_constant=lambda name: (_ for _ in ()).throw(ValueError(f"{name} is no JSON")))
    return None if rows and lines else "no answers"


def _answered_alike(world: Path, whole: Path) -> str | None:
    return None if (world / "told.jsonl").read_text() == (whole / "told.jsonl").read_text() else "other answers than without damage"


def _nothing(world: Path, whole: Path) -> str | None:
    return None


CHECKPOINTS, MODEL = (f"{RUN}/checkpoints/*/*",), ("model/*",)
SAVED = (f"{RUN}/side_network/*", f"{RUN}/result.json", f"{RUN}/recipe.yaml")
DATA = ("data/train.csv", "data/test.csv", "data/validation.csv")
COMMANDS = (
    Command("check a recipe", ("train", "recipe.yaml", "--print-recipe"), (*["recipe.yaml"] * 8, "model/config.json"), (), _nothing),
    Command("train", ("train", "recipe.yaml", "name=new"), ("recipe.yaml", *DATA, *MODEL), ("runs/", "taps"), _nothing),
    Command("train on taps", ("train", "recipe.yaml", "--overwrite"), ("taps/*/*",), ("runs/", "taps"), _trained_alike),
    Command("resume", ("train", "recipe.yaml", "--resume"), CHECKPOINTS, (RUN, "taps"), _trained_alike),
    Command("resume a run", ("train", "recipe.yaml", "--resume"), (f"{RUN}/*.json*", f"{RUN}/recipe.yaml"), (RUN, "taps"), _trained_alike),
    Command("predict", PREDICT, ("data/new.jsonl",), ("told.jsonl",), _answered),
    Command("predict with a damaged run", PREDICT, (*SAVED, *MODEL), ("told.jsonl",), _answered),
    Command("predict beside damage", PREDICT, (*CHECKPOINTS, *DATA, f"{RUN}/*.jsonl"), ("told.jsonl",), _answered_alike),
    Command("ensemble", ("ensemble", RUN, "runs/a-kind-seed1"), SAVED, ("runs/ensemble", "taps"), _nothing),
    Command("compare", ("compare", "runs"), ("runs/*/result.json",) * 3 + ("runs/*/metrics.jsonl",), (), _nothing),
    Command("list caches", ("cache", "list", "--folder", "taps"), ("taps/*/*",), (), _nothing),
    Command("verify caches", ("cache", "verify", "--folder", "taps"), ("taps/*/*",), (), _nothing),
    Command("status", ("slurm", "status", "runs"), ("runs/*/*.json*", "runs/*/recipe.yaml"), (), _nothing),
)


# ---------------------------------------------------------------------------------------------------------------- cases


def judge(command: Command, outcome: Outcome, before: dict[str, str], world: Path, whole: Path) -> str | None:
    """Return what is wrong with how a case ended; None: nothing."""
    status, out, err = outcome
    if status is None:
        return f"did not end in {LIMIT_S} s"
    if "Traceback" in err or "Traceback" in out:
        return "traceback: " + err.strip().splitlines()[-1][:200]
    if status not in (0, 1):
        return f"exit status {status}"
    found = command.name == "verify caches" and "damaged" in out  # which is what it was asked
    if status == 1 and not found and not re.search(r"^error: \S", err, flags=re.MULTILINE):
        return "exit status 1 without a line that begins with 'error:'"
    after = snapshot(world)
    changed = {name for name in before.keys() | after.keys() if before.get(name) != after.get(name)}
    allowed = tuple(place.rstrip("/") for place in command.writes)
    strayed = sorted(name for name in changed if not allowed or not name.startswith(allowed))
    if strayed:
        return f"changed {strayed[:3]}"
    if status == 0:
        try:
            return command.right(world, whole)
        except (OSError, ValueError, KeyError, TypeError) as error:
            return f"ended well without a right result: {type(error).__name__}: {error}"
    return None


def run_case(number: int, whole: Path, folder: Path) -> tuple[str, str | None, int | None]:
    """Carry out case `number`, which is always the same; return what it was, what is wrong, and the exit status."""
    chance = random.Random(number)
    command = chance.choice(COMMANDS)
    world = folder / f"case-{number}"
    shutil.copytree(whole, world, symlinks=True)
    files = sorted({path for glob in [chance.choice(command.meets)] for path in world.glob(glob) if path.is_file()})
    file = chance.choice(files)
    done = damage(file, chance)
    before = snapshot(world)
    outcome = forked(command.arguments, world)
    wrong = judge(command, outcome, before, world, whole)
    told = f"case {number}: {command.name}; {file.relative_to(world)}: {done}; status {outcome[0]}: {outcome[2].strip()[-300:]}"
    for path in (world.with_suffix(".out"), world.with_suffix(".err")):
        path.unlink(missing_ok=True)
    if wrong is None:
        shutil.rmtree(world, ignore_errors=True)
    return told, wrong, outcome[0]


def warm_up() -> None:
    """Import what commands need, once, before anything forks. No threads: they would not survive a fork."""
    os.environ.update(DEVICE_FREE)
    import deepspeed  # noqa: F401
    import torch
    import transformers  # noqa: F401

    import lst_scale.cli.main
    import lst_scale.inference.ensemble
    import lst_scale.inference.predict
    import lst_scale.training.run  # noqa: F401

    torch.set_num_threads(1)


def fuzz(numbers: Iterator[int], *, until: float = math.inf, verbose: bool = False) -> tuple[Counter[str], list[str]]:
    """Carry out cases until there are no more or `until` (monotonic seconds) has come; return counts, and what went wrong."""
    warm_up()
    counts: Counter[str] = Counter()
    wrongs: list[str] = []
    with tempfile.TemporaryDirectory(prefix="fuzz-") as name:
        whole = Path(name) / "whole"
        whole.mkdir()
        make_world(whole)
        for number in numbers:
            if time.monotonic() > until:
                break
            told, wrong, status = run_case(number, whole, Path(name))
            counts["wrong" if wrong else "right result" if status == 0 else "one line"] += 1
            if verbose:
                print(told, flush=True)
            if wrong:
                wrongs.append(f"{wrong}\n    {told}")
                print(f"WRONG: {wrongs[-1]}", flush=True)
    return counts, wrongs


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=10)
    parser.add_argument(
        "--seed", type=int, default=int(time.time()), help="the first case's number; cases are the same for the same number"
    )
    parser.add_argument("--cases", type=int, default=10**9)
    parser.add_argument("--verbose", action="store_true")
    options = parser.parse_args()
    numbers = iter(range(options.seed, options.seed + options.cases))
    counts, wrongs = fuzz(numbers, until=time.monotonic() + 60 * options.minutes, verbose=options.verbose)
    print(f"{sum(counts.values())} cases from {options.seed} on: {dict(counts)}")
    return 1 if wrongs else 0


if __name__ == "__main__":
    sys.exit(main())
