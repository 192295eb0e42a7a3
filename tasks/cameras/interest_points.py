"""Points of interest of a picture with their descriptors, invariant to scale and rotation. `features` calls it.

SIFT: Lowe, Distinctive image features from scale-invariant keypoints (IJCV 2004); names and constants as in Rey Otero
and Delbracio, Anatomy of the SIFT method (IPOL 2014). All points of a layer are worked on at once, and their
surroundings are sampled on grids that turn and grow with them: a picture of 512 pixels takes a quarter of a second.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

Map = NDArray[np.float32]
Floats = NDArray[np.float64]
Indices = NDArray[np.intp]

UPSAMPLING = 2
OCTAVES = 4
SCALES = 3  # of an octave
SMALLEST_PX = 12  # side of an octave
SIGMA, SIGMA_BEFORE = 1.6, 1.0  # blur of the first layer, and of the enlarged picture, pixels of it
TRUNCATED = 3.0  # sigmas
CONTRAST, EDGE = 0.002, 20.0  # far below the usual thresholds: objects are plainer than streets
MOVES, FARTHEST = 3, 0.6  # an extremum moves to the next pixel if it lies further away from its own than this
BINS, SMOOTHINGS, SECOND_PEAK = 36, 6, 0.8  # of the histogram of directions
# Grids around a point, in sigmas: half their side, the samples along it, and the sigma of their weights
TURN_REACH, TURN_SAMPLES, TURN_SIGMA = 4.5, 17, 1.5
REACH, SAMPLES, WEIGHT_SIGMA = 7.5, 20, 6.0
CELLS, DIRECTIONS, CELL = 4, 8, 3.0  # of a descriptor: cells along a side, directions, and a cell's side in sigmas
MOST_OF_A_BIN = 0.2
DESCRIPTOR = CELLS * CELLS * DIRECTIONS


@dataclass(frozen=True, eq=False)
class InterestPoints:
    """Points of interest of a picture."""

    position: Floats
    """(k, 2) x and y, pixels; pixel centres lie at half-integers"""
    descriptors: Map
    """(k, 128) square roots of histograms, of unit length"""


@dataclass(frozen=True, eq=False)
class _Extrema:
    """Extrema of one layer of differences."""

    place: Floats
    """(k, 2) row and column in the octave"""
    sigma: Floats
    """(k,) scale, pixels of the octave"""
    contrast: Floats
    """(k,)"""


def interest_points(grey: Map, allowed: NDArray[np.bool_], most: int) -> InterestPoints:
    """The points of most contrast in a picture (h, w) in 0..1, where they are allowed (h, w).

    A point with several directions counts once for each. Square roots of descriptors: Arandjelovic and Zisserman,
    Three things everyone should know to improve object retrieval (CVPR 2012).
    """
    layers: list[tuple[float, Map, _Extrema]] = []
    for octave, blurred in enumerate(_octaves(grey)):
        pixel = 2**octave / UPSAMPLING
        differences = np.diff(blurred, axis=0)
        for layer in range(1, SCALES + 1):
            found = _extrema(differences, layer)
            row, column = _in_picture(found.place, pixel).astype(np.intp).T
            inside = allowed[row.clip(0, grey.shape[0] - 1), column.clip(0, grey.shape[1] - 1)]
            layers.append((pixel, blurred[layer], _chosen(found, inside)))
    contrasts = np.concatenate([np.zeros(0), *(found.contrast for *_, found in layers)])
    least = np.partition(contrasts, -most)[-most] if len(contrasts) > most else 0.0
    positions, descriptors = [np.zeros((0, 2))], [np.zeros((0, DESCRIPTOR), np.float32)]
    for pixel, picture, found in layers:
        found = _chosen(found, found.contrast >= least)
        if len(found.sigma):
            point, direction = _directions(picture, found)
            descriptors.append(_descriptors(picture, found.place[point], found.sigma[point], direction))
            positions.append(_in_picture(found.place[point], pixel)[:, ::-1])
    return InterestPoints(np.concatenate(positions), np.concatenate(descriptors))


def _octaves(grey: Map) -> list[Map]:
    """Blurred pictures (scales + 3, h, w) of each octave, each octave of half the size."""
    picture = ndimage.zoom(grey, UPSAMPLING, order=1, mode="nearest", grid_mode=True)
    picture = ndimage.gaussian_filter(picture, np.sqrt(SIGMA**2 - SIGMA_BEFORE**2), truncate=TRUNCATED)
    sigmas = SIGMA * 2 ** (np.arange(SCALES + 3) / SCALES)
    found = list[Map]()
    while len(found) < OCTAVES and min(picture.shape) >= SMALLEST_PX:
        layers = np.empty((SCALES + 3, *picture.shape), np.float32)
        layers[0] = picture
        for k, sigma in enumerate(np.sqrt(np.diff(sigmas**2))):
            ndimage.gaussian_filter(layers[k], sigma, truncate=TRUNCATED, output=layers[k + 1])
        found.append(layers)
        picture = layers[SCALES][::2, ::2]
    return found


def _extrema(differences: Map, layer: int) -> _Extrema:
    """Extrema in space and scale of one layer, to a part of a pixel, without weak ones and edges."""
    here = differences[layer]
    inner, (height, width) = here[1:-1, 1:-1], here.shape
    beside = [here[1:-1, 2:], here[1:-1, :-2], here[2:, 1:-1], here[:-2, 1:-1]]
    above, below = inner > 0.8 * CONTRAST, inner < -0.8 * CONTRAST
    for each in beside:
        above &= inner > each
        below &= inner < each
    row, column = np.nonzero(above | below)
    flat, at = differences.reshape(-1), (layer * height + row + 1) * width + column + 1
    steps = [(s * height + y) * width + x for s in (-1, 0, 1) for y in (-1, 0, 1) for x in (-1, 0, 1) if s or (x and y)]
    value = flat.take(at)
    for step in steps:
        kept = np.abs(value) > np.where(value > 0, 1, -1) * flat.take(at + step)
        at, value = at[kept], value[kept]
    row, column = np.divmod(at - layer * height * width, width)
    centre = np.column_stack([np.full(len(row), layer), row, column])
    return _localised(differences, centre)


def _localised(differences: Map, centre: Indices) -> _Extrema:
    """The extrema of parabolas through pixels (k, 3: layer, row, column) and their neighbours."""
    count, height, width = differences.shape
    flat, stride = differences.reshape(-1), np.array([height * width, width, 1])
    offset = np.zeros(centre.shape)
    for _ in range(MOVES):
        centre = centre + np.rint(offset).astype(np.intp)
        inside = ((centre > 0) & (centre < np.array([count, height, width]) - 1)).all(axis=1)
        centre = centre[inside]
        at = centre @ stride
        value = flat.take(at).astype(np.float64)
        ahead, back = (flat.take(at[:, None] + sign * stride).astype(np.float64) for sign in (1, -1))
        slope, hessian = (ahead - back) / 2, np.empty((len(at), 3, 3))
        for i in range(3):
            hessian[:, i, i] = ahead[:, i] + back[:, i] - 2 * value
            for j in range(i):
                corners = [flat.take(at + a * stride[i] + b * stride[j]) * (a * b) for a in (1, -1) for b in (1, -1)]
                hessian[:, i, j] = hessian[:, j, i] = sum(corners) / 4
        hessian += 1e-12 * np.eye(3)
        offset = -np.linalg.solve(hessian, slope[..., None])[..., 0].clip(-1, 1)
        if (np.abs(offset) < FARTHEST).all():
            break
    contrast = np.abs(value + (slope * offset).sum(axis=1) / 2)
    trace = hessian[:, 1, 1] + hessian[:, 2, 2]
    determinant = hessian[:, 1, 1] * hessian[:, 2, 2] - hessian[:, 1, 2] ** 2
    good = (np.abs(offset) < FARTHEST).all(axis=1) & (contrast > CONTRAST)
    good &= EDGE * trace**2 < (EDGE + 1) ** 2 * determinant
    place = (centre + offset)[good]
    return _Extrema(place[:, 1:], SIGMA * 2 ** (place[:, 0] / SCALES), contrast[good])


def _chosen(found: _Extrema, which: NDArray[np.bool_]) -> _Extrema:
    return _Extrema(found.place[which], found.sigma[which], found.contrast[which])


def _in_picture(place: Floats, pixel: float) -> Floats:
    """Rows and columns (k, 2) of an octave as positions in the picture; every octave begins with the same pixel."""
    return place * pixel + 0.5 / UPSAMPLING


def _directions(picture: Map, found: _Extrema) -> tuple[Indices, Floats]:
    """The directions that most gradients around each point have: indices of the points, and radians."""
    grid = _grid(TURN_REACH, TURN_SAMPLES)
    across, down = _gradients(picture, found.place[:, None] + found.sigma[:, None, None] * grid)
    weight = np.hypot(across, down) * np.exp(-(grid**2).sum(axis=1) / (2 * TURN_SIGMA**2))
    bins = np.rint(np.arctan2(down, across) * (BINS / (2 * np.pi))).astype(np.intp) % BINS
    count = len(found.sigma)
    at = (np.arange(count)[:, None] * BINS + bins).reshape(-1)
    histogram: Floats = np.bincount(at, weight.reshape(-1), count * BINS).reshape(count, BINS).astype(np.float64)
    for _ in range(SMOOTHINGS):
        histogram = (np.roll(histogram, 1, axis=1) + histogram + np.roll(histogram, -1, axis=1)) / 3
    before, after = np.roll(histogram, 1, axis=1), np.roll(histogram, -1, axis=1)
    highest = histogram.max(axis=1, keepdims=True)
    point, peak = np.nonzero((histogram > before) & (histogram >= after) & (histogram >= SECOND_PEAK * highest))
    left, middle, right = (values[point, peak] for values in (before, histogram, after))
    direction: Floats = (peak + (left - right) / (2 * (left + right - 2 * middle))) * (2 * np.pi / BINS)
    return point, direction


def _descriptors(picture: Map, place: Floats, sigma: Floats, direction: Floats) -> Map:
    """Histograms (k, 128) of gradients in cells around each point, in its direction."""
    grid = _grid(REACH, SAMPLES)
    cosine, sine = np.cos(direction)[:, None], np.sin(direction)[:, None]
    turned = np.stack([grid[:, 1] * sine + grid[:, 0] * cosine, grid[:, 1] * cosine - grid[:, 0] * sine], axis=-1)
    across, down = _gradients(picture, place[:, None] + sigma[:, None, None] * turned)
    strength = np.hypot(across, down)
    angle = (np.arctan2(down, across) - direction[:, None]) * (DIRECTIONS / (2 * np.pi))
    low = np.floor(angle).astype(np.intp)
    share = (angle - low).astype(np.float32)
    parts = np.zeros((len(place), len(grid), DIRECTIONS), np.float32)
    for way, part in ((low, strength * (1 - share)), (low + 1, strength * share)):
        np.put_along_axis(parts, (way % DIRECTIONS)[..., None], part[..., None], axis=2)
    # each sample counts for the cells around it, the less the further away they are
    middles = (np.arange(CELLS) - (CELLS - 1) / 2) * CELL
    near = np.maximum(1 - np.abs(grid[:, :, None] - middles) / CELL, 0)
    cells = (near[:, 0, :, None] * near[:, 1, None, :]).reshape(len(grid), -1)
    cells *= np.exp(-(grid**2).sum(axis=1, keepdims=True) / (2 * WEIGHT_SIGMA**2))
    found = (cells.T.astype(np.float32) @ parts).reshape(len(place), -1)
    found /= np.maximum(np.linalg.norm(found, axis=1, keepdims=True), 1e-9)
    found = np.minimum(found, MOST_OF_A_BIN)
    rooted: Map = np.sqrt(found / np.maximum(found.sum(axis=1, keepdims=True), 1e-9))
    return rooted


def _grid(reach: float, samples: int) -> Floats:
    """(samples^2, 2) rows and columns of a square grid around 0."""
    along = (np.arange(samples) + 0.5) * (2 * reach / samples) - reach
    return np.stack(np.meshgrid(along, along, indexing="ij"), axis=-1).reshape(-1, 2)


def _gradients(picture: Map, place: Floats) -> tuple[Map, Map]:
    """Slopes along columns and rows at the pixels nearest to places (..., 2: row, column); 0 outside."""
    height, width = picture.shape
    row, column = np.moveaxis(np.rint(place).astype(np.intp), -1, 0)
    inside = (row > 0) & (row < height - 1) & (column > 0) & (column < width - 1)
    flat, at = picture.reshape(-1), np.where(inside, row * width + column, width + 1)
    across, down = (flat.take(at + step) - flat.take(at - step) for step in (1, width))
    return across * inside, down * inside
