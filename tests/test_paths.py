"""Targets that begin alike are run once: which of them, and what is read off."""

from __future__ import annotations

import random

import pytest
import torch

from lst_scale.training.paths import TargetPath, paths_of, scores_along, without_needless_end

END = 1


def drawn(seed: int) -> list[tuple[int, ...]]:
    draw = random.Random(seed)
    return [tuple(draw.choices((2, 3, 4), k=draw.randint(1, 4))) for _ in range(draw.randint(1, 12))]


@pytest.mark.parametrize("seed", range(200))
def test_every_target_is_scored_once_after_its_own_tokens_by_as_few_as_there_can_be(seed: int) -> None:
    targets = drawn(seed)
    paths = paths_of(targets)
    assert sorted(number for path in paths for number in path.along) == list(range(len(targets)))
    for path in paths:
        assert path.ids in targets
        for number in path.along:
            read = targets[number][:-1]
            assert path.ids[: len(read)] == read and len(path.ids) >= len(targets[number])
    # Fewer can't do: what is read before the last token of each path that is run begins no other's.
    read = [path.ids[:-1] for path in paths]
    assert not any(one == other[: len(one)] for number, one in enumerate(read) for other in read[:number] + read[number + 1 :])


def test_what_is_read_off_is_each_target_s_own_likelihood() -> None:
    targets = [(5, 6, 7), (5, 6, 8), (5, 9), (4,)]
    (path,) = paths_of(targets)
    assert path == TargetPath((5, 6, 7), (0, 1, 2, 3)), "the first of the longest; a last token is read by none"
    logits_BTV = torch.randn(2, 3, 10, generator=torch.Generator().manual_seed(0))
    likely_BTV = logits_BTV.log_softmax(-1)
    found_BL = scores_along(path, targets, logits_BTV)
    for number, ids in enumerate(targets):
        torch.testing.assert_close(found_BL[:, number], sum(likely_BTV[:, place, token] for place, token in enumerate(ids)))


def test_an_end_counts_where_a_number_may_go_on() -> None:
    whole = [(2, 3, END), (2, 4, END)]
    assert without_needless_end(whole) == ((2, 3), (2, 4)) and len(paths_of(without_needless_end(whole))) == 1
    for begun in ([(2, END), (2, 4, END)], [(END,), (2, END)], [(2, END), (2, END)]):
        assert without_needless_end(begun) == tuple(begun)
    assert paths_of([]) == () == without_needless_end([])
