"""Taps on disk: nothing is run twice, nothing wrong is used, and training is what it is without."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from helpers import programs, ranks
from helpers.models import make_t5
from helpers.ranks import Finished
from helpers.recipes import recipe_writer
from helpers.runs import final_weights, losses
from helpers.training import train
from helpers.writers import KEY, digest_of, states, write_for_ever
from lst_scale.backbone.cache.key import CacheKey
from lst_scale.backbone.cache.store import RECORD, TapCache
from lst_scale.errors import BackboneError
from lst_scale.inputs.keys import source_digest, target_digest
from lst_scale.recipe.schema import load_recipe
from lst_scale.training.shared import build_cache


def key(**changes: Any) -> CacheKey:
    return CacheKey(**{**KEY.__dict__, **changes})


@pytest.mark.parametrize(("dtype", "allowed"), [("fp32", 0.0), ("bf16", 2**-8), ("int8", 1 / 100)])
def test_what_is_written_is_read_by_any_process(dtype: str, allowed: float, tmp_path: Path) -> None:
    writer = TapCache(tmp_path, key(dtype=dtype))
    for row in range(5):
        writer.write(source_digest(torch.tensor([row])), states(3 + row, row))
    reader = TapCache(tmp_path, key(dtype=dtype))
    assert len(reader) == 5
    for row in range(5):
        found = reader.read(source_digest(torch.tensor([row])), 2)
        assert found is not None
        for mine, theirs in zip(found, states(3 + row, row), strict=True):
            assert (mine.float() - theirs).abs().max() <= allowed * theirs.abs().max()
    assert reader.read(source_digest(torch.tensor([9])), 2) is None


def test_anything_that_taps_depend_on_finds_another_place(tmp_path: Path) -> None:
    folders = {key(**c).folder for c in ({}, {"fingerprint": "g"}, {"precision": "int8"}, {"layers": (0,)}, {"decoder_final": True})}
    assert len(folders) == 5
    ids, other = torch.tensor([5, 6, 7]), torch.tensor([5, 6])
    assert len({source_digest(ids), source_digest(other), target_digest(ids, other), target_digest(other, ids)}) == 4


@pytest.mark.parametrize("damage", ["flip", "truncate data", "truncate index", "delete data"])
def test_damage_is_found_and_named_and_the_rest_is_used(damage: str, tmp_path: Path) -> None:
    writer = TapCache(tmp_path, KEY)
    for row in range(4):
        writer.write(source_digest(torch.tensor([row])), states(6, row))
    (data,) = writer.folder.glob("*.taps")
    if damage == "flip":
        raw = bytearray(data.read_bytes())
        raw[6 * 8 * 4 * 2 + 17] ^= 1  # in the second payload
        data.write_bytes(raw)
    elif damage == "truncate data":
        data.write_bytes(data.read_bytes()[:-5])
    elif damage == "truncate index":
        index = data.with_suffix(".index")
        index.write_bytes(index.read_bytes()[: -RECORD.size + 3])
    else:
        data.unlink()
    reader = TapCache(tmp_path, KEY)
    found = [reader.read(source_digest(torch.tensor([row])), 2) for row in range(4)]
    lost = {"flip": [1], "truncate data": [3], "truncate index": [3], "delete data": [0, 1, 2, 3]}[damage]
    assert [row for row in range(4) if found[row] is None] == lost
    for row in set(range(4)) - set(lost):
        assert torch.equal(found[row][0], states(6, row)[0])  # type: ignore[index]
    assert bool(reader.damaged) == (damage == "flip")
    for row in lost:
        reader.write(source_digest(torch.tensor([row])), states(6, row))
    again = TapCache(tmp_path, KEY)
    readable = [again.read(source_digest(torch.tensor([row])), 2) for row in range(4)]
    assert all(r is not None for r in readable), "what was made again is found"


@pytest.mark.parametrize("dtype", ["fp32", "int8"])
@pytest.mark.parametrize("most", [7, 6 * 8 * 4, 6 * 8 * 4 + 1], ids=["within a state", "one state", "into the next"])
def test_a_payload_that_the_system_reads_in_parts_is_whole(most: int, dtype: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Linux reads 2,147,479,552 bytes a call at most."""
    cache = TapCache(tmp_path, key(dtype=dtype))
    cache.write(source_digest(torch.tensor([0])), states(6, 0))
    expected = cache.read(source_digest(torch.tensor([0])), 2)
    preadv = os.preadv

    def short(descriptor: int, places: list[memoryview], offset: int) -> int:
        parts, left = [], most
        for place in places:
            parts.append(place.cast("B")[:left])
            left -= len(parts[-1])
        return preadv(descriptor, parts, offset)

    monkeypatch.setattr(os, "preadv", short)
    found = cache.read(source_digest(torch.tensor([0])), 2)
    assert expected is not None and found is not None
    assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True)) and not cache.damaged


def test_a_disk_that_is_too_small_is_refused_before_the_first_payload(tmp_path: Path) -> None:
    with pytest.raises(BackboneError, match=r"taps need \d+\.\d\d GB in .* GB are free: .*cache.dtype=int8"):
        TapCache(tmp_path, KEY).refuse_if_too_large(10**13, 0)


def test_room_is_asked_for_what_is_written_then(write_recipe: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each source once, however many rows have it, and none that is there already."""
    asked: list[int] = []
    monkeypatch.setattr(TapCache, "refuse_if_too_large", lambda cache, *tokens: asked.append(cache.key.bytes_of(*tokens)))
    rows = [("a long deed", "act"), ("a long deed", "food"), ("a long deed", "act"), ("soup", "food")]
    written = 0
    for more in ([], [("a long deed", "state")], [("bread", "food")], []):
        rows += more
        data = tmp_path / "rows.jsonl"
        data.write_text("".join(json.dumps({"word": word, "kind": kind}) + "\n" for word, kind in rows))
        task = {"task__train": str(data), "task__validation": str(data), "task__source": ["word"]}
        build_cache(load_recipe(str(cached(write_recipe, tmp_path / "taps", "asking", **task))))
        size = sum(file.stat().st_size for file in (tmp_path / "taps").rglob("*.taps"))
        assert asked.pop() == size - written
        written = size


@pytest.mark.slow
def test_a_full_disk_stops_with_one_line(tmp_path: Path) -> None:
    small = tmp_path / "small"
    small.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(small)], capture_output=True, text=True, check=False)
    if mounted.returncode:
        pytest.skip(f"a disk of 64 kB needs the right to mount: {mounted.stderr.strip()}")
    try:
        cache = TapCache(small, KEY)
        with pytest.raises(BackboneError, match=r"could not write taps to .*: No space left on device; free space"):
            for row in range(2000):
                cache.write(source_digest(torch.tensor([row])), states(20, row))
        cache.close()
        whole = TapCache(small, KEY)
        assert len(whole) > 0 and whole.read(source_digest(torch.tensor([0])), 2) is not None
        del whole
    finally:
        subprocess.run(["umount", str(small)], check=True)


# Training


def cached(write: Callable[..., Path], folder: Path, name: str, **changes: Any) -> Path:
    common = {"cache__enabled": True, "cache__dtype": "fp32", "cache__folder": str(folder), "evaluation__method": "likelihood"}
    return write(name, **(common | changes))


def result(folder: Path, name: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "runs" / f"{name}-kind-seed0" / "result.json").read_text())
    return found


@pytest.mark.slow
def test_training_from_disk_is_live_training_bit_for_bit_and_loads_no_backbone(write_recipe: Callable[..., Path], tmp_path: Path) -> None:
    runs = tmp_path / "runs"
    once = {"training__epochs": 1}  # the same batches in all three
    plain = write_recipe("live", evaluation__method="likelihood", **once)
    train(plain, cached(write_recipe, tmp_path / "taps", "first", **once), cached(write_recipe, tmp_path / "taps", "second", **once))
    assert result(tmp_path, "first")["cache"]["backbone_loaded"] is True
    assert result(tmp_path, "second")["cache"] == {"rows_read": 22 + 3 * 8 * 7, "rows_run": 0, "backbone_loaded": False, "damaged": []} | {
        "rows_read": result(tmp_path, "second")["cache"]["rows_read"]
    }
    expected = final_weights(runs / "live-kind-seed0")
    for name in ("first", "second"):
        found = final_weights(runs / f"{name}-kind-seed0")
        assert all(torch.equal(found[n], expected[n]) for n in expected), name
        assert losses(runs / f"{name}-kind-seed0") == losses(runs / "live-kind-seed0")
        assert result(tmp_path, name)["scores"] == result(tmp_path, "live")["scores"]


@pytest.mark.slow
def test_a_cache_of_two_ranks_serves_one_and_later_epochs_differ_by_rounding_alone(
    write_recipe: Callable[..., Path], tmp_path: Path
) -> None:
    train(cached(write_recipe, tmp_path / "taps", "two"), processes=2)
    train(cached(write_recipe, tmp_path / "taps", "one"), write_recipe("live", evaluation__method="likelihood"))
    assert result(tmp_path, "one")["cache"]["backbone_loaded"] is False
    expected = final_weights(tmp_path / "runs" / "live-kind-seed0")
    for name in ("one", "two"):
        for parameter, weight in final_weights(tmp_path / "runs" / f"{name}-kind-seed0").items():
            torch.testing.assert_close(weight, expected[parameter], rtol=1e-3, atol=2e-4)  # as two processes against one


@pytest.mark.slow
def test_the_commands_build_list_verify_and_remove(write_recipe: Callable[..., Path], tmp_path: Path) -> None:
    path = cached(write_recipe, tmp_path / "taps", "built")
    folder = ["--folder", str(tmp_path / "taps")]

    def command(*arguments: str) -> Finished:
        return ranks.run(programs.command, "cache", *arguments)

    assert "22 rows are in" in command("build", "--recipe", str(path)).stdout
    assert "22 of 22 training rows are there" in train(path)
    listed = command("list", *folder).stdout
    assert "layers 0,2  fp32" in listed and command("verify", *folder).returncode == 0
    data = max((tmp_path / "taps").rglob("*.taps"), key=lambda file: file.stat().st_size)
    raw = bytearray(data.read_bytes())
    raw[100] ^= 1
    data.write_bytes(raw)
    verified = command("verify", *folder)
    assert verified.returncode == 1 and "1 damaged payloads" in verified.stdout
    assert "is the beginning of 0 caches" in command("remove", "nothing", *folder).stderr
    assert "removed" in command("remove", listed.split()[0], *folder).stdout and not command("list", *folder).stdout


@pytest.mark.slow
def test_bf16_and_int8_taps_train_to_nearly_the_same_losses(write_recipe: Callable[..., Path], tmp_path: Path) -> None:
    train(
        write_recipe("live", evaluation__method="likelihood"),
        *(cached(write_recipe, tmp_path / "taps", dtype, cache__dtype=dtype) for dtype in ("bf16", "int8")),
    )
    expected = torch.tensor(losses(tmp_path / "runs" / "live-kind-seed0"))
    for dtype, allowed in (("bf16", 0.01), ("int8", 0.03)):  # relative: 8 bits of mantissa, and 8 bits in all
        torch.testing.assert_close(torch.tensor(losses(tmp_path / "runs" / f"{dtype}-kind-seed0")), expected, rtol=allowed, atol=0)


@pytest.mark.slow
def test_other_weights_and_another_tokenizer_find_nothing(tmp_path: Path) -> None:
    folder = make_t5(tmp_path / "t5", dropout_rate=0.0)
    make = recipe_writer(tmp_path, folder)
    train(cached(make, tmp_path / "taps", "first"))
    weights = load_file(folder / "model.safetensors")
    weights["encoder.block.0.layer.1.DenseReluDense.wo.weight"][0, 0] += 0.5
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    assert "0 of 22 training rows are there" in train(cached(make, tmp_path / "taps", "weights"))
    tokenizer = json.loads((folder / "tokenizer.json").read_text())
    vocabulary = tokenizer["model"]["vocab"]
    vocabulary[300:4000] = [*vocabulary[301:4000], vocabulary[300]]
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    seen = train(cached(make, tmp_path / "taps", "tokenizer"))
    assert "22 of 22" not in seen


@pytest.mark.slow
def test_a_writer_killed_twenty_times_leaves_only_whole_payloads(tmp_path: Path) -> None:
    draw, sizes = random.Random(0), [0]
    for _ in range(20):
        (writer,) = ranks.start(write_for_ever, [tmp_path / "taps", str(sizes[-1] + 1000 * len(sizes))])
        with ranks.ended([writer]):
            goal = sizes[-1] + draw.randint(1, 60)
            ranks.wait_for(lambda goal=goal: entries(tmp_path) >= goal, [writer])
            writer.kill()
            assert writer.wait() == -signal.SIGKILL
        sizes.append(entries(tmp_path))
    assert sizes == sorted(set(sizes))
    reader, found = TapCache(tmp_path / "taps", KEY), 0
    for row in range(30_000):
        read = reader.read(digest_of(row), 2)
        found += read is not None
        assert read is None or all(torch.equal(one, other) for one, other in zip(read, states(20, row), strict=True))
    assert found == len(reader) == sizes[-1] and reader.damaged == []


@pytest.mark.slow
def test_a_run_killed_three_times_while_it_writes_leaves_a_usable_part(write_recipe: Callable[..., Path], tmp_path: Path) -> None:
    changes = {"training__epochs": 2, "data__max_train_rows": 200, "training__global_batch_size": 4}
    path = cached(write_recipe, tmp_path / "taps", "killed", **changes)
    for _ in range(3):
        (run,) = ranks.start(programs.train, ["--recipe", path, "--overwrite"])
        with ranks.ended([run]):
            goal = entries(tmp_path) + 20
            ranks.wait_for(lambda goal=goal: entries(tmp_path) >= goal, [run])
    shutil.rmtree(tmp_path / "runs", ignore_errors=True)
    train(path, write_recipe("live", evaluation__method="likelihood", **changes))
    live = torch.tensor(losses(tmp_path / "runs" / "live-kind-seed0"))
    torch.testing.assert_close(torch.tensor(losses(tmp_path / "runs" / "killed-kind-seed0")), live, rtol=1e-3, atol=1e-4)
    assert result(tmp_path, "killed")["cache"]["damaged"] == []


@pytest.mark.slow
def test_runs_on_the_same_rows_at_once_write_them_once(write_recipe: Callable[..., Path], tmp_path: Path) -> None:
    changes = {"training__epochs": 1, "data__max_train_rows": 200, "training__global_batch_size": 4}
    paths = [cached(write_recipe, tmp_path / "taps", name, **changes) for name in ("one", "two", "three")]
    started = [rank for path in paths for rank in ranks.start(programs.train, ["--recipe", path])]
    done = ranks.finish(started)
    assert done.returncode == 0, done.stderr
    digests = [digest for index in (tmp_path / "taps").rglob("*.index") for digest in digests_in(index)]
    assert len(digests) == len(set(digests)) > 200, "no payload is there twice"
    assert sum("another run writes the others" in rank.stderr for rank in started) == 2
    train(write_recipe("live", evaluation__method="likelihood", **changes))
    live = torch.tensor(losses(tmp_path / "runs" / "live-kind-seed0"))
    for name in ("one", "two", "three"):
        torch.testing.assert_close(torch.tensor(losses(tmp_path / "runs" / f"{name}-kind-seed0")), live, rtol=0, atol=0)


@pytest.mark.slow
def test_when_the_run_that_writes_is_killed_another_goes_on_writing(write_recipe: Callable[..., Path], tmp_path: Path) -> None:
    changes = {"training__epochs": 2, "data__max_train_rows": 200, "training__global_batch_size": 4}
    paths = [cached(write_recipe, tmp_path / "taps", name, **changes) for name in ("first", "second", "third")]
    (writer,) = ranks.start(programs.train, ["--recipe", paths[0]])
    ranks.wait_for(lambda: entries(tmp_path) > 8, [writer])
    writer.send_signal(signal.SIGSTOP)  # it has the claim, and gets no further
    (folder,) = (path.parent for path in (tmp_path / "taps").rglob("key.json"))
    removal = ranks.run(programs.command, "cache", "remove", folder.name, "--folder", tmp_path / "taps")
    assert removal.returncode == 1 and "is being written" in removal.stderr
    building = ranks.run(programs.command, "cache", "build", "--recipe", paths[1])
    assert building.returncode == 1 and "error: another run is writing these rows to " in building.stderr
    left = entries(tmp_path)
    (other,) = ranks.start(programs.train, ["--recipe", paths[1]])
    metrics = tmp_path / "runs" / "second-kind-seed0" / "metrics.jsonl"
    ranks.wait_for(lambda: metrics.exists() and metrics.read_text().count('"train"') > 3, [other])
    assert entries(tmp_path) == left
    writer.kill()
    writer.wait()
    assert other.wait() == 0
    train(paths[2])
    assert result(tmp_path, "third")["cache"]["rows_run"] == 0


def digests_in(index: Path) -> list[bytes]:
    raw = index.read_bytes()
    return [RECORD.unpack_from(raw, start)[0] for start in range(0, len(raw) - RECORD.size + 1, RECORD.size)]


def entries(tmp_path: Path) -> int:
    return sum(index.stat().st_size // RECORD.size for index in (tmp_path / "taps").rglob("*.index"))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"backbone__placement": "zero3"}, "a tap cache needs a backbone that each rank runs by itself, which placement zero3 is not"),
        ({"method": {"name": "lora"}}, "method lora changes the backbone, so its states can't be remembered: write cache.enabled=false"),
    ],
)
def test_what_can_not_be_remembered_is_refused(
    changes: dict[str, Any], message: str, write_recipe: Callable[..., Path], tmp_path: Path
) -> None:
    path = cached(write_recipe, tmp_path / "taps", "refused", **changes)
    done = ranks.run(programs.train, "--recipe", path)
    assert done.returncode == 1 and message in done.stderr and "Traceback" not in done.stderr
