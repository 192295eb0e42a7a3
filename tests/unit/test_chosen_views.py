"""The choice of views if a capture has more than are used: the sharpest of each part."""

from __future__ import annotations

import pytest

from tasks.inference.reconstruction import chosen

NAMES = [f"view_{index:03d}" for index in range(10)]
SHARPNESS = dict(zip(NAMES, [1, 5, 2, 9, 3, 3, 8, 0, 7, 4], strict=True))


@pytest.mark.parametrize(
    ("limit", "expected"),
    [
        (1, [3]),
        (2, [3, 6]),
        (3, [3, 6, 8]),  # of 4, 3 and 3 views
        (5, [1, 3, 4, 6, 8]),  # the first of two that are equally sharp
        (9, [1, 2, 3, 4, 5, 6, 7, 8, 9]),
    ],
)
def test_the_sharpest_of_each_part_is_chosen(limit: int, expected: list[int]) -> None:
    assert chosen(NAMES, limit, SHARPNESS.__getitem__) == tuple(NAMES[index] for index in expected)


@pytest.mark.parametrize("limit", [None, 10, 11])
def test_all_are_chosen_if_there_are_not_more(limit: int | None) -> None:
    assert chosen(NAMES, limit, lambda name: pytest.fail(f"{name} was looked at")) == tuple(NAMES)
