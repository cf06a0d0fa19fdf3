"""The tap cache's index with many records: looked up without a loop over them, where it is."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

import numpy as np
import pytest
import torch

from lst_scale.backbone.cache import store
from lst_scale.backbone.cache.claim import name_of
from lst_scale.backbone.cache.key import CacheKey
from lst_scale.backbone.cache.segment import RECORD
from lst_scale.backbone.cache.store import TapCache

KEY = CacheKey(fingerprint="f", precision="fp32", layers=(0,), decoder_final=False, d_model=4, dtype="fp32")


def digests(count: int) -> list[bytes]:
    draw = np.random.default_rng(0)
    made = [draw.bytes(16) for _ in range(count)]
    return [*made, made[0][:8] + made[1][8:]]  # two with one beginning


def taps(number: int) -> list[torch.Tensor]:
    return [torch.full((1 + number % 3, 4), float(number))]


def filled(folder: Path, names: list[bytes]) -> TapCache:
    cache = TapCache(folder, KEY)
    for number, name in enumerate(names):
        cache.write(name, taps(number))
    return cache


@pytest.mark.parametrize("many", [1, 10_000], ids=["mapped", "read"])
def test_what_is_there_is_found_one_by_one_and_all_at_once(many: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(store, "MANY", many)
    names = digests(60)
    filled(tmp_path, names[::2])
    cache = TapCache(tmp_path, KEY)
    assert len(cache._segments) == (many == 1)
    other = filled(tmp_path, names[1:10:2])
    cache.refresh()
    there = {*names[::2], *names[1:10:2]}
    array = np.frombuffer(b"".join(names), np.uint8).reshape(-1, 16)
    assert cache.has_each(array).tolist() == [name in there for name in names] == [name in cache for name in names]
    for number, name in enumerate(names[::2]):
        (found,) = cache.read(name, 1) or [None]
        assert found is not None and found.equal(taps(number)[0])
    assert names[1] in other and cache.read(names[11], 1) is None


@pytest.fixture
def mapped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[bytes]:
    """What a cache holds whose index will be mapped."""
    monkeypatch.setattr(store, "MANY", 1)
    names = digests(5)
    filled(tmp_path, names)
    return names


def test_a_damaged_payload_of_a_mapped_index_counts_as_missing_until_it_is_made_again(mapped: list[bytes], tmp_path: Path) -> None:
    names = mapped
    (data,) = (tmp_path / KEY.folder).glob("*.taps")
    data.write_bytes(b"\xff" + data.read_bytes()[1:])
    cache = TapCache(tmp_path, KEY)
    array = np.frombuffer(b"".join(names), np.uint8).reshape(-1, 16)
    assert cache.read(names[0], 1) is None and len(cache.damaged) == 1
    assert cache.has_each(array).tolist() == [False, True, True, True, True, True] and names[0] not in cache
    cache.write(names[0], taps(0))
    assert cache.has_each(array).all() and cache.read(names[0], 1) is not None
    assert TapCache(tmp_path, KEY).read(names[0], 1) is not None  # what was made again comes later


def test_a_mapped_record_with_a_damaged_offset_is_left_out(mapped: list[bytes], tmp_path: Path) -> None:
    (index,) = (tmp_path / KEY.folder).glob("*.index")
    raw = bytearray(index.read_bytes())
    raw[16:24] = b"\xff" * 8  # with the payload's length it wraps round to a small number
    index.write_bytes(raw)
    cache = TapCache(tmp_path, KEY)
    assert [name in cache for name in mapped] == [False, *[True] * 5] and cache.read(mapped[0], 1) is None


def test_a_mapped_record_is_left_out_whose_payload_was_cut_off_and_so_is_half_a_record(mapped: list[bytes], tmp_path: Path) -> None:
    names = mapped
    (data,), (index,) = ((tmp_path / KEY.folder).glob(ending) for ending in ("*.taps", "*.index"))
    data.write_bytes(data.read_bytes()[:-1])
    index.write_bytes(index.read_bytes() + b"half")
    assert RECORD.itemsize == store.RECORD.size
    cache = TapCache(tmp_path, KEY)
    assert [name in cache for name in names] == [True] * 5 + [False]


def test_an_index_that_is_cut_short_behind_our_back_lacks_records_and_ends_nothing(mapped: list[bytes], tmp_path: Path) -> None:
    cache = TapCache(tmp_path, KEY)
    (index,) = tmp_path.rglob("*.index")
    os.truncate(index, 2 * RECORD.itemsize + 7)  # two whole records are left
    array = np.frombuffer(b"".join(mapped), np.uint8).reshape(-1, 16)
    assert cache.has_each(array).tolist() == [name in cache for name in mapped] == [True, True, *[False] * (len(mapped) - 2)]
    assert cache.read(mapped[-1], 1) is None
    os.truncate(index, 0)
    assert not cache.has_each(array).any() and cache.read(mapped[0], 1) is None


def test_a_claim_has_the_same_name_as_ever_whatever_the_order_of_its_rows() -> None:
    names = digests(300)
    array = np.frombuffer(b"".join(names), np.uint8).reshape(-1, 16)
    as_ever = hashlib.blake2b(b"".join(sorted(names)), digest_size=10).hexdigest()
    assert name_of(array) == name_of(array[::-1]) == as_ever
