"""05, killed at twenty random moments, ends each time with the bytes that it would have had without."""

import random

import pytest

from bench import kill
from tests.runner import Run


@pytest.mark.parametrize("ranks, times", [(1, 12), (2, 8)])
def test_kills_at_random_moments_change_nothing(ranks, times, tmp_path, monkeypatch, zoo):
    run = Run(tmp_path, monkeypatch, zoo("llava"), **kill.KNOBS | kill.CUT[ranks]).upto("04_lora")
    kills = kill.endure(run, ranks, times, random.Random(ranks))
    assert set(kills.by_kind.values()) == {times // 2}             # by the clock, and before an operation
    assert len(kills.left_behind) > 2                              # they fell at different places
    assert kills.ends >= 1 and not kills.differing
