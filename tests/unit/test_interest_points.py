"""Points of interest are found again in a turned and in a smaller picture, where they are allowed."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from tasks.cameras.interest_points import InterestPoints, interest_points

SIDE = 160


def blobs(side: int = SIDE) -> NDArray[np.float32]:
    """Blobs of several sizes, grey values in 0..1."""
    rng = np.random.default_rng(0)
    picture = sum(scale * ndimage.gaussian_filter(rng.normal(size=(side, side)), scale) for scale in (2.0, 4.0, 8.0))
    return ((picture - picture.min()) / np.ptp(picture)).astype(np.float32)


def found(picture: NDArray[np.float32], most: int = 400) -> InterestPoints:
    return interest_points(picture, np.ones(picture.shape, bool), most)


def matched(one: InterestPoints, other: InterestPoints) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Positions of mutual best matches."""
    alike = one.descriptors @ other.descriptors.T
    best = alike.argmax(axis=1)
    mutual = np.flatnonzero(alike.argmax(axis=0)[best] == np.arange(len(best)))
    return one.position[mutual], other.position[best[mutual]]


def test_points_are_found_again_in_a_turned_picture() -> None:
    picture = blobs()
    here, there = matched(found(picture), found(np.ascontiguousarray(np.rot90(picture))))
    expected = np.column_stack([here[:, 1], SIDE - here[:, 0]])
    assert len(here) > 50
    assert (np.linalg.norm(there - expected, axis=1) < 0.5).mean() > 0.9


def test_points_are_found_again_in_a_picture_of_half_the_size() -> None:
    picture = blobs()
    half = picture.reshape(SIDE // 2, 2, SIDE // 2, 2).mean(axis=(1, 3))
    here, there = matched(found(picture), found(half))
    assert (np.linalg.norm(2 * there - here, axis=1) < 1.5).sum() > 30


def test_only_the_strongest_points_where_they_are_allowed() -> None:
    picture = blobs()
    allowed = np.zeros(picture.shape, bool)
    allowed[:, : SIDE // 2] = True
    points = interest_points(picture, allowed, 20)
    assert 20 <= len(np.unique(points.position, axis=0)) <= 21  # a place may have several directions
    assert points.position[:, 0].max() <= SIDE / 2 + 1
    np.testing.assert_allclose(np.linalg.norm(points.descriptors, axis=1), 1, atol=1e-5)


def test_a_plain_picture_has_none() -> None:
    assert found(np.full((40, 40), 0.5, np.float32)).descriptors.shape == (0, 128)
    assert found(np.full((3, 3), 0.5, np.float32)).descriptors.shape == (0, 128)
