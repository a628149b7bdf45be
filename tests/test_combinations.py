"""Random combinations of family, plan, cache, padding and lengths; `make fuzz` goes through 2,000 of them."""

from __future__ import annotations

import pytest

from combinations import CACHES, MOST, combination, difference


@pytest.mark.parametrize("seed", range(40))
def test_combination_equals_the_oracle(seed: int) -> None:
    assert difference(seed) <= MOST, combination(seed)


def test_every_kind_of_case_is_drawn() -> None:
    cases = [combination(seed) for seed in range(200)]
    assert {case.cache for case in cases} == set(CACHES)
    assert {case.padding for case in cases} == {"none", "left", "right"}
    assert len({case.family for case in cases}) > 25
