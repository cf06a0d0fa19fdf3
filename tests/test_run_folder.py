"""A run's folder: what is removed from it and what stays, who may work in it, and what happens when the disk refuses."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import resource
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from safetensors.torch import save_file
from torch import zeros

from helpers.launchers import fresh
from helpers.paths import ROOT
from lst_scale.errors import ArgumentError, RecipeError, StorageError
from lst_scale.recipe.schema import Recipe, load_recipe, parse_recipe
from lst_scale.runs import lock
from lst_scale.runs.folder import check_folder, prepare_folder
from lst_scale.runs.lock import locked
from lst_scale.runs.overwrite import remove_run
from lst_scale.system import durable
from lst_scale.system.durable import append_line, write_directory, write_file
from lst_scale.training.run import run

RECIPE = "{name: t, task: rte, backbone: {checkpoint: x}, method: {name: lst}}"
OF_A_RUN = [
    "recipe.yaml",
    "log.txt",
    "metrics.jsonl",
    "result.json",
    ".result.json.0123abcd.partial",
    "checkpoints/step-00000004/weights.safetensors",
    "checkpoints/step-00000004/state.json",
    "checkpoints/.step-00000008.partial/moments.safetensors",
    "best/step-00000004/weights.safetensors",
    "side_network/config.json",
    "side_network/side_network.safetensors",
    "side_network/README.md",
    ".side_network.replaced/ladder_config.json",
    "trained/adapter_model.safetensors",
    "probe/probe.safetensors",
    ".probe.partial/probe.json",
    "tensorboard/events.out.tfevents.1.host.2.0",
    "slurm/jobs.jsonl",
    "slurm/local/12_0_log.out",
]
OF_OTHERS = [
    "thesis.doc",
    "notes/recipe.yaml",
    "checkpoints/notes.txt",
    "checkpoints/backup/weights.safetensors",
    "checkpoints/step-00000004/notes.txt",
    "best/step-best/weights.safetensors",
    "side_network/mine.txt",
    "slurm/plan.md",
    "recipe.yaml.bak",
    ".git/config",
]


@contextlib.contextmanager
def no_room(size: int = 1000) -> Iterator[None]:
    """Let no file grow beyond `size` bytes: what a full disk is, without one."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.fixture
def recipe(tmp_path: Path) -> Recipe:
    return parse_recipe(RECIPE, "t.yaml", [f"output_dir={tmp_path}"])


def fill(folder: Path, names: list[str]) -> None:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(RECIPE if name == "recipe.yaml" else name)


def files(folder: Path) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if not path.is_dir()}


def test_an_overwrite_removes_all_that_a_run_writes(tmp_path: Path, recipe: Recipe) -> None:
    fill(tmp_path / "run", OF_A_RUN)
    said = prepare_folder(tmp_path / "run", recipe, resume=False, overwrite=True)
    assert said == f"removed {len(OF_A_RUN)} files of an earlier run from {tmp_path / 'run'}"
    assert [path.name for path in (tmp_path / "run").rglob("*")] == ["recipe.yaml"]


def test_an_overwrite_leaves_and_names_what_others_put_into_the_folder(tmp_path: Path, recipe: Recipe) -> None:
    fill(tmp_path / "run", OF_A_RUN + OF_OTHERS)
    removed = remove_run(tmp_path / "run")
    assert removed.files == len(OF_A_RUN) and files(tmp_path / "run") == set(OF_OTHERS)
    assert set(removed.left) == {name.replace("notes/recipe.yaml", "notes") for name in OF_OTHERS} - {
        "checkpoints/backup/weights.safetensors",
        "best/step-best/weights.safetensors",
        ".git/config",
    } | {"checkpoints/backup", "best/step-best", ".git"}
    assert "left as they are: .git, " in (removed.sentence(tmp_path) or "")


@pytest.mark.parametrize("mark", [None, "", "a: 1", "not yaml: [", "\x00", "x" * 10_000])
def test_an_overwrite_removes_nothing_where_there_is_no_recipe_of_a_run(mark: str | None, tmp_path: Path) -> None:
    fill(tmp_path, ["log.txt", "checkpoints/step-00000001/state.json"])
    if mark is not None:
        (tmp_path / "recipe.yaml").write_text(mark)
    before = files(tmp_path)
    with pytest.raises(ArgumentError, match=r"but no recipe.yaml of a run, and --overwrite removes nothing but runs"):
        remove_run(tmp_path)
    assert files(tmp_path) == before


def test_a_folder_without_a_run_is_used_as_it_is(tmp_path: Path, recipe: Recipe) -> None:
    fill(tmp_path / "run", ["thesis.doc"])
    assert prepare_folder(tmp_path / "run", recipe, resume=False, overwrite=True) == (
        f"{tmp_path / 'run'} held no run; left as they are: thesis.doc"
    )
    assert prepare_folder(tmp_path / "new", recipe, resume=False, overwrite=True) is None


@pytest.mark.parametrize("link", [".", "checkpoints", "best", "log.txt", "checkpoints/step-00000004", "recipe.yaml"])
def test_an_overwrite_follows_no_link_and_removes_nothing_then(link: str, tmp_path: Path) -> None:
    precious, folder = tmp_path / "precious", tmp_path / "run"
    fill(precious, OF_A_RUN)
    if link == ".":
        folder.symlink_to(precious)
    else:
        fill(folder, [name for name in OF_A_RUN if not name.startswith(link)])
        (folder / link).symlink_to(precious / link)
    before = files(folder)
    with pytest.raises(ArgumentError, match=r"is a link to .*, and --overwrite follows none: remove the link"):
        remove_run(folder)
    assert files(folder) == before and files(precious) == set(OF_A_RUN)


def test_a_foreign_link_stays(tmp_path: Path) -> None:
    fill(tmp_path / "run", OF_A_RUN)
    (tmp_path / "run" / "data").symlink_to(tmp_path)
    assert remove_run(tmp_path / "run").left == ("data",)


def test_an_overwrite_that_was_killed_can_be_repeated(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fill(tmp_path, OF_A_RUN)
    unlink, left = Path.unlink, iter(range(5))

    def dying(path: Path, missing_ok: bool = False) -> None:
        next(left)
        unlink(path, missing_ok)

    monkeypatch.setattr(Path, "unlink", dying)
    with pytest.raises(StopIteration):
        remove_run(tmp_path)
    monkeypatch.undo()
    assert remove_run(tmp_path).files == len(OF_A_RUN) - 5 and not files(tmp_path)


def test_what_others_put_beside_written_files_outlives_the_next_writing(tmp_path: Path) -> None:
    for text in ("old", "new"):
        write_directory(tmp_path / "side_network", lambda partial, text=text: (partial / "a").write_text(text), lambda whole: None)  # type: ignore[misc]
        (tmp_path / "side_network" / "mine.txt").touch()
    assert files(tmp_path) == {"side_network/a", "side_network/mine.txt"}
    assert (tmp_path / "side_network" / "a").read_text() == "new"


@pytest.mark.parametrize("method", ["lst", "lora", "full"])
def test_nothing_that_a_run_writes_is_taken_for_somebody_else_s(method: str, write_recipe: Callable[..., Path], tmp_path: Path) -> None:
    path = write_recipe("own", training__max_steps=1, logging__tensorboard=True, method={"name": method})
    run(load_recipe(str(path)))
    folder = tmp_path / "runs" / "own-kind-seed0"
    assert (folder / "result.json").exists()
    assert remove_run(folder).left == () and files(folder) == {".lock"}


@contextlib.contextmanager
def holder(folder: Path) -> Iterator[subprocess.Popen[str]]:
    """Another process that works in a folder."""
    lines = (
        "from lst_scale.runs.lock import locked",
        "from pathlib import Path",
        f"with locked(Path({str(folder)!r})): print(1, flush=True); input()",
    )
    script = "\n".join(lines)
    process = subprocess.Popen(
        [sys.executable, "-c", script], cwd=ROOT, env=fresh(), stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    try:
        assert process.stdout is not None and process.stdout.readline() == "1\n"
        yield process
    finally:
        process.kill()
        process.communicate()


def test_a_folder_is_held_by_one_process_until_that_ends_however_it_ends(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lock, "PATIENCE", 0.0)
    with holder(tmp_path) as process:
        with (
            pytest.raises(ArgumentError, match=rf"is in use by process {process.pid} on \S+: wait for its end") as caught,
            locked(tmp_path),
        ):
            pass
        assert "\n" not in str(caught.value)
        process.kill()
        process.wait()
        with locked(tmp_path):
            assert json.loads((tmp_path / ".lock").read_text())["pid"] == os.getpid()
    with locked(tmp_path):
        pass


def test_a_folder_is_free_again_when_its_holder_failed(tmp_path: Path) -> None:
    with pytest.raises(ZeroDivisionError), locked(tmp_path):
        _ = 1 / 0
    with locked(tmp_path):
        pass


def test_a_lock_follows_no_link_and_empties_nothing(tmp_path: Path) -> None:
    victim = tmp_path / "victim.txt"
    victim.write_text("precious")
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / ".lock").symlink_to(victim)
    with pytest.raises(StorageError, match=r"could not write .*/.lock: Too many levels of symbolic links"), locked(tmp_path / "a"):
        pass
    (tmp_path / "b").mkdir()
    os.link(victim, tmp_path / "b" / ".lock")
    with locked(tmp_path / "b"):
        pass
    (tmp_path / "c").mkdir()
    (tmp_path / "c" / ".lock").write_text("precious")
    with locked(tmp_path / "c"):
        pass
    assert victim.read_text() == (tmp_path / "c" / ".lock").read_text() == "precious"


@pytest.mark.parametrize("content", ["", "{", "[1]", "\xff\xfe", '{"lst_scale": "lock", "pid": "x"}', "[" * 900])
def test_whatever_stands_in_a_lock_a_second_process_is_refused(content: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lock, "PATIENCE", 0.0)
    with locked(tmp_path):
        (tmp_path / ".lock").write_text(content)
        with pytest.raises(ArgumentError, match="is in use by another process: wait for its end"), locked(tmp_path):
            pass


def test_the_lock_of_another_machine_is_waited_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(lock, "PATIENCE_ELSEWHERE", 0.15)
    with locked(tmp_path):
        (tmp_path / ".lock").write_text('{"lst_scale": "lock", "pid": 7, "host": "elsewhere"}')
        with pytest.raises(ArgumentError, match="is in use by process 7 on elsewhere"), locked(tmp_path):
            pass
    assert "is in use on elsewhere: waiting, in case that machine is gone" in capsys.readouterr().err


@pytest.mark.parametrize("flag", ["--resume", "--overwrite"])
def test_a_second_start_in_a_folder_in_use_is_refused_and_changes_nothing(
    flag: str, write_recipe: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lock, "PATIENCE", 0.0)
    folder = tmp_path / "runs" / "second-kind-seed0"
    fill(folder, OF_A_RUN)
    before = files(folder)
    with locked(folder), pytest.raises(ArgumentError, match=rf"{folder} is in use by process {os.getpid()} on "):
        run(load_recipe(str(write_recipe("second"))), resume=flag == "--resume", overwrite=flag == "--overwrite")
    assert files(folder) == before | {".lock"} and (folder / "log.txt").read_text() == "log.txt"


@pytest.mark.parametrize(
    ("zero", "message"),
    [
        ('{"stage": 2, "reduce_bucket_size": "banana"}', "reduce_bucket_size is 'banana': Input should be a valid integer"),
        ('{"stage": 2, "reduce_bucket_size": -1}', "reduce_bucket_size is -1: Input should be greater than 0"),
        ('{"stage": 3, "offload_optimizer": {"device": "moon"}}', "offload_optimizer.device is 'moon': Input should be"),
        ('{"stage": 2, "offload_param": 7}', "offload_param is 7: Input should be"),
        ('{"stage": 2, "no_such_key": 7}', "no_such_key"),
    ],
)
def test_what_deepspeed_says_against_its_file_is_one_line_and_leaves_no_folder(
    zero: str, message: str, write_recipe: Callable[..., Path], tmp_path: Path
) -> None:
    (tmp_path / "ds.json").write_text(f'{{"zero_optimization": {zero}}}')
    with pytest.raises(RecipeError) as caught:
        run(load_recipe(str(write_recipe("ds", training__deepspeed=str(tmp_path / "ds.json")))))
    assert str(caught.value).startswith(f"training.deepspeed: {tmp_path / 'ds.json'}: ") and "\n" not in str(caught.value)
    assert message in str(caught.value) and not (tmp_path / "runs").exists()


WRITERS = {
    "directory": lambda path: write_directory(
        path, lambda partial: save_file({"w": zeros(9)}, partial / "w.safetensors"), lambda whole: None
    ),
    "file": lambda path: write_file(path, "text"),
    "line": lambda path: append_line(path, "text", flushed=True),
}


@pytest.mark.parametrize("writer", WRITERS)
@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EROFS, errno.EDQUOT, errno.EIO])
def test_a_disk_that_refuses_is_one_line_and_leaves_nothing(
    writer: str, number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(durable.os, "fsync", refuse)
    with pytest.raises(StorageError, match=rf"could not write {tmp_path}/x: {os.strerror(number)}; free space, mend that path, or choose"):
        WRITERS[writer](tmp_path / "x")
    assert not files(tmp_path) - ({"x"} if writer == "line" else set())


@pytest.mark.parametrize("writer", WRITERS)
@pytest.mark.parametrize("way", ["file for a folder", "folder for a file", "a folder that is not there", "/proc"])
def test_something_in_the_way_of_what_is_written_is_one_line(writer: str, way: str, tmp_path: Path) -> None:
    path = {"/proc": Path("/proc/self/x")}.get(way, tmp_path / "below" / "x")
    if way == "file for a folder":
        (tmp_path / "below").touch()
    elif way == "folder for a file":
        path.mkdir(parents=True)
    if writer == "directory" and way in ("folder for a file", "a folder that is not there"):
        WRITERS[writer](path)  # makes the folders above it
        return
    with pytest.raises(StorageError, match=rf"could not write {path}: [A-Z][a-z ]+; free space, mend that path") as caught:
        WRITERS[writer](path)
    assert "\n" not in str(caught.value)


def test_what_stood_there_before_outlives_a_disk_that_refuses(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_file(tmp_path / "x", "before")
    monkeypatch.setattr(durable.os, "fsync", lambda _: (_ for _ in ()).throw(OSError(errno.ENOSPC, "No space left on device")))
    with pytest.raises(StorageError):
        write_file(tmp_path / "x", "after")
    assert (tmp_path / "x").read_text() == "before" and files(tmp_path) == {"x"}


def test_a_full_disk_is_told_as_such_by_safetensors_too(tmp_path: Path) -> None:
    def save(partial: Path) -> None:
        save_file({"w": zeros(100_000)}, partial / "w.safetensors")

    with no_room(), pytest.raises(StorageError, match=r"could not write .*/x: File too large; free space, mend that path"):
        write_directory(tmp_path / "x", save, lambda whole: None)
    assert not files(tmp_path)


@pytest.mark.parametrize("overwrite", [False, True])
@pytest.mark.parametrize("resume", [False, True])
def test_looking_at_a_folder_changes_nothing(resume: bool, overwrite: bool, tmp_path: Path) -> None:
    fill(tmp_path, OF_A_RUN + OF_OTHERS)
    before = files(tmp_path)
    with contextlib.suppress(ArgumentError):
        check_folder(tmp_path, resume=resume, overwrite=overwrite)
    check_folder(tmp_path / "new", resume=False, overwrite=overwrite)
    assert files(tmp_path) == before
