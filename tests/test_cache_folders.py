"""Folders of tap caches in a place that others write to as well: what is not ours is named, left alone and never followed."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from lst_scale.backbone.cache.claim import Claim
from lst_scale.backbone.cache.key import CacheKey
from lst_scale.backbone.cache.store import TapCache
from lst_scale.cli.main import app
from lst_scale.errors import BackboneError, LstScaleError
from lst_scale.inputs.keys import source_digest

KEY = CacheKey(fingerprint="f", precision="fp32", layers=(0, 2), decoder_final=False, d_model=8, dtype="fp32")


def lst_scale(*arguments: str | Path) -> tuple[int, str, str]:
    """Run the command line in this process; return its exit status, its output, and its error line with what else it told there."""
    found = CliRunner().invoke(app, [str(argument) for argument in arguments])
    if isinstance(found.exception, LstScaleError):
        return 1, found.stdout, f"{found.stderr}error: {found.exception}"
    assert found.exception is None or isinstance(found.exception, SystemExit), found.exception
    return found.exit_code, found.stdout, found.stderr


def fill(root: Path, key: CacheKey = KEY, rows: int = 3) -> Path:
    cache = TapCache(root, key)
    for row in range(rows):
        cache.write(source_digest(torch.tensor([row])), [torch.ones(4, 8), torch.ones(4, 8)])
    cache.close()
    return cache.folder


@pytest.fixture
def shared() -> Iterator[Path]:
    """A folder that another user may reach."""
    folder = Path(tempfile.mkdtemp(dir="/tmp"))
    folder.chmod(0o755)
    yield folder
    shutil.rmtree(folder)


@pytest.fixture
def as_nobody() -> Iterator[None]:
    """Root may write anywhere: become somebody who may not."""
    if os.geteuid() != 0:
        yield
        return
    os.seteuid(65534)
    try:
        yield
    finally:
        os.seteuid(0)


def test_removing_a_cache_says_what_went_and_leaves_no_folder(tmp_path: Path) -> None:
    folder = fill(tmp_path)
    Claim(folder, "a" * 20).take()
    status, out, _ = lst_scale("cache", "remove", folder.name[:6], "--folder", tmp_path)
    assert status == 0 and out.startswith(f"removed {folder}: 4 files, 0.00") and not folder.exists()


def test_what_is_not_ours_stays_and_is_named(tmp_path: Path) -> None:
    folder = fill(tmp_path)
    (folder / "thesis.doc").write_text("years")
    (folder / "more.taps").mkdir()
    (folder / "more.taps" / "deep.doc").write_text("years")
    status, out, _ = lst_scale("cache", "remove", folder.name, "--folder", tmp_path)
    assert status == 0 and "'more.taps', 'thesis.doc'" in out
    assert sorted(str(path.relative_to(folder)) for path in folder.rglob("*")) == ["more.taps", "more.taps/deep.doc", "thesis.doc"]


@pytest.mark.parametrize(
    "mark",
    [
        "{}",
        "[]",
        "null",
        "",
        '{"fingerprint": "f", "precis',
        "\0\xff",
        "[" * 100_000,
        json.dumps(KEY.as_json() | {"format": 2}),
        json.dumps(KEY.as_json() | {"fingerprint": "another"}),
        json.dumps(KEY.as_json() | {"dtype": ["bf16"]}),
        json.dumps(KEY.as_json() | {"layers": 3}),
        json.dumps(KEY.as_json() | {"more": 1}),
    ],
    ids=lambda text: text[:24],
)
@pytest.mark.parametrize("name", ["precious", KEY.folder])
def test_a_folder_whose_mark_is_not_ours_is_named_skipped_and_never_removed(mark: str, name: str, tmp_path: Path) -> None:
    ours = fill(tmp_path, CacheKey(**KEY.__dict__ | {"fingerprint": "g"}))
    precious = tmp_path / name
    precious.mkdir()
    (precious / "key.json").write_text(mark, encoding="latin-1")
    (precious / "data.taps").write_text("years")
    status, out, err = lst_scale("cache", "list", "--folder", tmp_path)
    assert status == 0 and out.startswith(ours.name) and out.count("\n") == 1
    assert err.startswith(f"skipped {precious / 'key.json'}: ") and err.count("\n") == 1
    status, out, err = lst_scale("cache", "verify", "--folder", tmp_path)
    assert status == 0 and out == "0 damaged payloads\n" and str(precious) in err
    status, _, err = lst_scale("cache", "remove", name, "--folder", tmp_path)
    assert status == 1 and f"{name!r} is the beginning of 0 caches: {ours.name}" in err
    assert (precious / "data.taps").read_text() == "years" and (precious / "key.json").exists()


def test_a_mark_that_is_a_folder_or_leads_nowhere_is_skipped(tmp_path: Path) -> None:
    (tmp_path / "a" / "key.json").mkdir(parents=True)
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "key.json").symlink_to(tmp_path / "nowhere")
    status, out, err = lst_scale("cache", "list", "--folder", tmp_path)
    assert status == 0 and out == "" and f"skipped {tmp_path / 'a' / 'key.json'}: Is a directory" in err
    assert f"no tap caches in {tmp_path}" in err


def test_an_empty_name_removes_nothing(tmp_path: Path) -> None:
    folder = fill(tmp_path)
    status, _, err = lst_scale("cache", "remove", "", "--folder", tmp_path)
    assert status == 1 and f"'' is the beginning of 0 caches: {folder.name}" in err and (folder / "key.json").exists()


def test_a_link_to_a_cache_is_not_removed(tmp_path: Path) -> None:
    target = fill(tmp_path / "far")
    (tmp_path / "near").mkdir()
    (tmp_path / "near" / target.name).symlink_to(target)
    status, _, err = lst_scale("cache", "remove", target.name, "--folder", tmp_path / "near")
    assert status == 1 and f"is a link to {target}: remove the link with rm" in err and len(list(target.iterdir())) == 3


def test_a_cache_where_none_is_says_where_it_looked(tmp_path: Path) -> None:
    for command in (["list"], ["verify"]):
        status, _, err = lst_scale("cache", *command, "--folder", tmp_path / "nowhere")
        assert status == 0 and f"no tap caches in {tmp_path / 'nowhere'}" in err


@pytest.mark.parametrize("kind", ["link", "folder", "link to nowhere", "fifo"])
def test_a_claim_follows_no_link_and_empties_nothing(kind: str, tmp_path: Path) -> None:
    victim = tmp_path / "victim.txt"
    victim.write_text("precious")
    path = tmp_path / "cache" / "name.claim"
    path.parent.mkdir()
    if kind == "folder":
        path.mkdir()
    elif kind == "fifo":
        os.mkfifo(path)
    else:
        path.symlink_to(victim if kind == "link" else tmp_path / "new.txt")
    claim = Claim(path.parent, "name")
    assert claim.take() is (kind == "fifo")
    assert (claim.refused or "").startswith("" if kind == "fifo" else str(path))
    assert victim.read_text() == "precious" and not (tmp_path / "new.txt").exists()
    claim.release()


def test_a_claim_keeps_what_a_file_of_its_name_holds(tmp_path: Path) -> None:
    (tmp_path / "name.claim").write_text("precious")
    first, second = Claim(tmp_path, "name"), Claim(tmp_path, "name")
    assert first.take() and not second.take() and second.refused is None
    assert (tmp_path / "name.claim").read_text() == "precious"
    first.release()
    assert second.take()
    second.release()


def test_a_read_only_cache_is_read_and_gives_no_claim(shared: Path, as_nobody: None) -> None:
    os.seteuid(0) if os.getuid() == 0 else None
    folder = fill(shared / "taps")
    os.seteuid(65534) if os.getuid() == 0 else folder.chmod(0o555)
    cache = TapCache(shared / "taps", KEY)
    assert len(cache) == 3 and cache.read(source_digest(torch.tensor([1])), 2) is not None
    claim = Claim(cache.folder, "name")
    assert not claim.take() and claim.refused == f"{cache.folder} is read-only"
    cache.close()
    folder.chmod(0o755) if os.getuid() != 0 else None


def test_another_users_claim_that_is_free_can_be_taken(shared: Path, as_nobody: None) -> None:
    if os.getuid() != 0:
        pytest.skip("needs a second user")
    os.seteuid(0)
    (shared / "name.claim").write_text("")
    shared.chmod(0o777)
    os.seteuid(65534)
    claim = Claim(shared, "name")
    assert claim.take()
    claim.release()


def test_a_cache_folder_that_can_not_be_made_is_told_in_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(BackboneError, match=r"cache\.folder: .*file.* can't be made \(Not a directory\): write another folder"):
        TapCache(tmp_path / "file" / "taps", KEY)
    with pytest.raises(BackboneError, match=r"cache\.folder: .* can't be made \(File exists\)|Not a directory"):
        TapCache(tmp_path / "file", KEY)


def test_foreign_files_in_a_cache_do_not_stop_reading(tmp_path: Path) -> None:
    folder = fill(tmp_path)
    (folder / "a.index").mkdir()
    (folder / "b.index").symlink_to(folder / "nowhere")
    (folder / "c.index").write_bytes(os.urandom(320))
    (folder / "c.taps").mkdir()
    cache = TapCache(tmp_path, KEY)
    assert all(cache.read(source_digest(torch.tensor([row])), 2) is not None for row in range(3))
    status, out, err = lst_scale("cache", "verify", "--folder", tmp_path)
    assert status == 0 or "damaged" in out or "skipped" in err
