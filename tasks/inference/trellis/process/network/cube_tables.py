"""The tables of dual marching cubes, made by rule: which crossed edges of a cube share a vertex of the mesh.

Source: Nielson 2004 (dual marching cubes), Shen et al. 2023 (FlexiCubes). `cubes.py` uses them.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import numpy as np
import torch
from torch import Tensor

CASES = 256
# Corners of a cube, x fastest
CORNER_OFFSETS = tuple((i & 1, i >> 1 & 1, i >> 2 & 1) for i in range(8))
# Edges in FlexiCubes' order and direction
EDGES = ((0, 1), (1, 5), (4, 5), (0, 4), (2, 3), (3, 7), (6, 7), (2, 6), (2, 0), (3, 1), (7, 5), (6, 4))


@dataclass(frozen=True)
class CubeTables:
    """The tables by case: bit k is set if corner k is inside."""

    vertex_of: Tensor
    """(256, 12) int64: number of the vertex that an edge belongs to; -1 if the edge is not crossed."""
    vertices: Tensor
    """(256) int64: number of vertices."""
    pinch: Tensor
    """(256, 3) int64: direction of the one ambiguous face whose two cuts belong to one vertex; 0 0 0 if none."""


@cache
def tables(device: torch.device) -> CubeTables:
    """The tables on a device."""
    vertex_of = np.full((CASES, len(EDGES)), -1)
    vertices, pinch = np.zeros(CASES, np.int64), np.zeros((CASES, 3), np.int64)
    for case in range(CASES):
        inside = [bool(case >> corner & 1) for corner in range(8)]
        groups, ambiguous = _groups(inside)
        for number, group in enumerate(groups):
            vertex_of[case, sorted(group)] = number
        vertices[case] = len(groups)
        for axis, side, first, second in ambiguous:
            if vertex_of[case, first] == vertex_of[case, second]:
                pinch[case, axis] = 2 * side - 1
    return CubeTables(*(torch.from_numpy(each).to(device) for each in (vertex_of, vertices, pinch)))


def _groups(inside: list[bool]) -> tuple[list[set[int]], list[tuple[int, int, int, int]]]:
    """Sets of crossed edges that faces connect, and the ambiguous faces: axis, side, an edge of each of its two cuts.

    A face with two crossed edges connects them. One with four is ambiguous: it connects those at each inside corner.
    """
    crossed = [edge for edge, (a, b) in enumerate(EDGES) if inside[a] != inside[b]]
    group_of = {edge: {edge} for edge in crossed}
    ambiguous = []
    for axis in range(3):
        for side in (0, 1):
            face = {corner for corner, offset in enumerate(CORNER_OFFSETS) if offset[axis] == side}
            cut = [edge for edge in crossed if set(EDGES[edge]) <= face]
            if len(cut) == 4:
                pairs = [[edge for edge in cut if corner in EDGES[edge]] for corner in sorted(face) if inside[corner]]
                ambiguous.append((axis, side, pairs[0][0], pairs[1][0]))
            else:
                pairs = [cut] if cut else []
            for first, second in pairs:
                joined = group_of[first] | group_of[second]
                group_of.update(dict.fromkeys(joined, joined))
    groups: list[set[int]] = []
    for edge in crossed:
        if group_of[edge] not in groups:
            groups.append(group_of[edge])
    return groups, ambiguous
