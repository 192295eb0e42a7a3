"""The mesh of cubes with signed distances at their corners: FlexiCubes, on the sparse cubes only.

Source: Shen et al. 2023, "Flexible Isosurface Extraction for Gradient-Based Mesh Optimization".
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from .cube_tables import CASES, CORNER_OFFSETS, EDGES, tables

# Ranges of the learned weights: tanh and sigmoid of them, kept off their ends
FLEXIBILITY = 0.99
GAMMA_FLOOR = 0.005
DEFORMATION = 1 - 1e-8
DISTANCE, DEFORM, WEIGHTS, COLOUR = slice(0, 8), slice(8, 32), slice(32, 53), slice(53, 101)
COLOUR_VALUES = 6
BETA, ALPHA, GAMMA = slice(0, 12), slice(12, 20), 20


@dataclass(frozen=True)
class CubeMesh:
    """Triangles with a colour and a normal of each vertex."""

    vertices: Tensor
    """(n, 3) fp32 in [-0.5, 0.5]^3, z-up."""
    faces: Tensor
    """(m, 3) int64."""
    attributes: Tensor
    """(n, 6) fp32: RGB, about 0..1, and normal; (n, 0) without colours."""


@dataclass(frozen=True)
class _Surface:
    """The M cubes that the surface passes, in x-major order."""

    cube: Tensor  # (M, 3)
    corner: Tensor  # (M, 8), codes of the corners
    distance: Tensor  # (M, 8)
    position: Tensor  # (M, 8, 3)
    colour: Tensor  # (M, 8, 6 or 0)
    weights: Tensor  # (M, 21)
    code: Tensor  # (M), ascending


@contextmanager
def _in_fixed_order() -> Iterator[None]:
    """Make sums on a GPU in a fixed order, for the same bytes at each run. All other operations do so by themselves."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before)


@_in_fixed_order()
def mesh_of(coords: Tensor, features: Tensor, resolution: int) -> CubeMesh:
    """The mesh of cubes (n, 3) with features (n, 101 or 53) fp32. Without any surface it is empty."""
    surface = _surface(coords.long(), features, resolution)
    device = features.device
    table = tables(device)
    case = _case(surface, resolution)
    group, number = table.vertex_of[case], table.vertices[case]
    first = torch.cumsum(number, 0) - number
    cube, edge = (group >= 0).nonzero(as_tuple=True)  # each crossed edge of each cube
    vertex = first[cube] + group[cube, edge]
    ends = torch.tensor(EDGES, device=device)[edge]
    alpha = surface.weights[:, ALPHA].tanh() * FLEXIBILITY + 1
    beta = (surface.weights[:, BETA].tanh() * FLEXIBILITY + 1)[cube, edge][:, None]
    weighted = torch.gather(surface.distance[cube] * alpha[cube], 1, ends)
    attributes = torch.cat([surface.position, surface.colour], -1)
    crossing = _crossing(weighted, attributes[cube[:, None], ends])
    total = int(number.sum())
    shares = torch.zeros(total, 1, device=device).index_add_(0, vertex, beta)
    made = torch.zeros(total, crossing.shape[1], device=device).index_add_(0, vertex, crossing * beta) / shares
    gamma = torch.zeros(total, device=device)
    gamma[vertex] = (surface.weights[:, GAMMA].sigmoid() * FLEXIBILITY + GAMMA_FLOOR)[cube]
    edge_corners = torch.gather(surface.corner[cube], 1, ends)
    outward = torch.gather(surface.distance[cube], 1, ends)[:, 0] > 0
    faces = _faces(edge_corners, vertex, outward, gamma, resolution)
    return CubeMesh(made[:, :3], faces, made[:, 3:])


def _crossing(distance: Tensor, values: Tensor) -> Tensor:
    """Values (k, 2, c) of an edge's ends, at the point where its distance (k, 2) is zero."""
    a, b = distance[:, 0, None], distance[:, 1, None]
    return (values[:, 0] * b - values[:, 1] * a) / (b - a)


def _codes(cells: Tensor, side: int) -> Tensor:
    return (cells[..., 0] * side + cells[..., 1]) * side + cells[..., 2]


def _cells(codes: Tensor, side: int) -> Tensor:
    return torch.stack([codes // (side * side), codes // side % side, codes % side], -1)


def _within(cells: Tensor, side: int) -> Tensor:
    """The codes of those cells (n, 3) that lie in the grid."""
    return _codes(cells[((cells >= 0) & (cells < side)).all(-1)], side)


def _found(sorted_codes: Tensor, wanted: Tensor) -> tuple[Tensor, Tensor]:
    """The row of each wanted code, and whether it is there."""
    row = torch.searchsorted(sorted_codes, wanted).clamp(max=len(sorted_codes) - 1)
    return row, sorted_codes[row] == wanted


def _surface(coords: Tensor, features: Tensor, resolution: int) -> _Surface:
    """The cubes that the surface passes. A corner's values are the mean of those of the cubes that share it.

    FlexiCubes looks at every cube of the grid, and corners of no cube are outside. So an unoccupied cube beside an
    inside corner is passed too: the candidates are all cubes that touch a corner of an occupied one.
    """
    corners = torch.tensor(CORNER_OFFSETS, device=coords.device)
    points = resolution + 1
    to_corner = _codes(corners, points)  # codes add up like the cells that they stand for
    colour = features[:, COLOUR]
    values = torch.cat(
        [
            features[:, DISTANCE, None] - 1 / resolution,
            features[:, DEFORM].unflatten(1, (8, 3)),
            colour.unflatten(1, (8, COLOUR_VALUES)) if colour.shape[1] else features.new_zeros(len(features), 8, 0),
        ],
        -1,
    )
    known, row = (_codes(coords, points)[:, None] + to_corner).flatten().unique(return_inverse=True)
    count = torch.zeros(len(known), device=coords.device).index_add_(0, row, torch.ones_like(row, dtype=torch.float32))
    mean = values.new_zeros(len(known), values.shape[2]).index_add_(0, row, values.flatten(0, 1)) / count[:, None]
    del values, row, count  # among the largest tensors of an inference
    code = torch.cat([_within(_cells(known, points) - corner, resolution) for corner in corners]).unique()
    cube = _cells(code, resolution)
    corner = _codes(cube, points)[:, None] + to_corner
    row, here = _found(known, corner)
    distance = torch.where(here, mean[row, 0], torch.ones((), device=coords.device))
    inside = (distance < 0).sum(-1)
    passed = (inside > 0) & (inside < 8)
    cube, corner, distance, code, row, here = (x[passed] for x in (cube, corner, distance, code, row, here))
    at_corner = torch.where(here[..., None], mean[row, 1:], torch.zeros((), device=coords.device))
    moved = DEFORMATION / (resolution * 2) * at_corner[..., :3].tanh()
    position = (cube[:, None] + corners) / resolution - 0.5 + moved
    occupied, order = _codes(coords, resolution).sort()
    row, here = _found(occupied, code)
    weights = torch.where(here[:, None], features[order[row], WEIGHTS], torch.zeros((), device=coords.device))
    return _Surface(cube, corner, distance, position, at_corner[..., 3:].sigmoid(), weights, code)


def _case(surface: _Surface, resolution: int) -> Tensor:
    """The case of each cube (M). Two cubes that would pinch at the face between them both take the inverse case."""
    bits = torch.arange(8, device=surface.cube.device)
    case = ((surface.distance < 0).long() << bits).sum(-1)
    pinch = tables(case.device).pinch
    asks = (pinch != 0).any(-1)[case]
    neighbour = surface.cube + pinch[case]
    inside = ((neighbour >= 0) & (neighbour < resolution)).all(-1)
    if not len(case):
        return case
    row, here = _found(surface.code, _codes(neighbour, resolution))
    return torch.where(asks & inside & here & asks[row], CASES - 1 - case, case)


def _faces(edge_corners: Tensor, vertex: Tensor, outward: Tensor, gamma: Tensor, resolution: int) -> Tensor:
    """Two triangles for each crossed edge that four cubes share: (m, 3).

    edge_corners: (k, 2) codes of the ends of each cube's crossed edges; vertex: (k) theirs in that cube; outward: (k)
    whether the first end is outside. gamma decides along which diagonal a quad is split.
    """
    key = edge_corners[:, 0] * (resolution + 1) ** 3 + edge_corners[:, 1]
    _, edge, cubes = key.unique(return_inverse=True, return_counts=True)
    shared = cubes[edge] == 4
    order = torch.argsort(edge[shared], stable=True)
    quad = vertex[shared][order].view(-1, 4)
    turned = outward[shared][order].view(-1, 4)[:, 0]
    quad = torch.cat([quad[turned][:, [0, 1, 3, 2]], quad[~turned][:, [2, 3, 1, 0]]])
    of = gamma[quad]
    along = (of[:, 0] * of[:, 2] > of[:, 1] * of[:, 3])[:, None]
    return torch.where(along, quad[:, [0, 1, 2, 0, 2, 3]], quad[:, [0, 1, 3, 3, 1, 2]]).reshape(-1, 3)
