"""Open meshes with defects become closed, consistently oriented, manifold ones: faces turned to agree with their
neighbours, sheets parted where they only touch, holes closed by smooth patches.

Called by `solids`. Vertices are (n, 3) float32, faces (m, 3) int32.
"""

from __future__ import annotations

from functools import lru_cache

import numpy as np
from numpy.typing import NDArray
from scipy.sparse import coo_array, csr_array, diags_array
from scipy.sparse.csgraph import breadth_first_order, connected_components
from scipy.sparse.linalg import splu

from tasks.geometry.manifold import parted, twins_of
from tasks.geometry.mesh_repair import Faces, Vertices

FAN = 7  # holes of up to this many edges get one vertex in their middle, larger ones rings of vertices as well


def closed(vertices: Vertices, faces: Faces) -> tuple[Vertices, Faces]:
    """The mesh without borders, consistently oriented and manifold; it may pass through itself.

    A hole's patch continues the surface around it (as in Liepa 2003, Filling holes in meshes) and shares no edge with
    any other face than the hole's own.
    """
    vertices, faces = parted(vertices, oriented(faces))
    return _filled(vertices, faces)


def oriented(faces: Faces) -> Faces:
    """Faces turned so that neighbours across edges of just two faces agree, as far as the surface is orientable."""
    one, other, agree = _neighbours(faces)
    if agree.all():
        return faces
    count = len(faces)
    # every face twice, as it is and turned: one orientable sheet becomes two, each of them consistent
    shift = np.where(agree, 0, count)
    ends = (np.concatenate([one, one + count]), np.concatenate([other + shift, (other + count + shift) % (2 * count)]))
    links = coo_array((np.ones(len(ends[0]), bool), ends), shape=(2 * count, 2 * count))
    _, label = connected_components(links, directed=False)
    here, turned = label[:count], label[count:]
    turn = here > turned
    for sheet in np.unique(here[here == turned]):
        _orient_by_tree(turn, np.flatnonzero(here == sheet), one, other, agree)
    result = faces.copy()
    result[turn] = result[turn][:, ::-1]
    return result


def _neighbours(faces: Faces) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.bool_]]:
    """Pairs of faces with an edge that no third one has, and which of them run along it in opposite directions."""
    start, end = faces.reshape(-1).astype(np.int64), np.roll(faces, -1, axis=1).reshape(-1).astype(np.int64)
    key = np.minimum(start, end) * (int(faces.max(initial=0)) + 1) + np.maximum(start, end)
    order = np.argsort(key)
    first = np.flatnonzero(np.diff(key[order], prepend=-1))
    first = first[np.diff(first, append=len(key)) == 2]
    one, other = order[first], order[first + 1]
    return one // 3, other // 3, start[one] != start[other]


def _orient_by_tree(
    turn: NDArray[np.bool_],
    sheet: NDArray[np.int64],
    one: NDArray[np.int64],
    other: NDArray[np.int64],
    agree: NDArray[np.bool_],
) -> None:
    """A sheet with one side only is oriented outward from one face; where it meets itself the wrong way, it parts."""
    local = np.full(len(turn), -1, np.int64)
    local[sheet] = np.arange(len(sheet))
    inside = local[one] >= 0
    a, b, flip = local[one[inside]], local[other[inside]], ~agree[inside]
    links = csr_array((np.ones(len(a)), (a, b)), shape=(len(sheet), len(sheet)))
    _, before = breadth_first_order(links, 0, directed=False)
    flips = coo_array((np.r_[flip, flip] + 1, (np.r_[a, b], np.r_[b, a])), shape=links.shape).tocsr()
    before[0] = 0
    parity = np.asarray(flips[np.arange(len(sheet)), before]).reshape(-1) == 2
    parity[0] = False
    while (before != 0).any():  # every step looks twice as far back
        parity, before = parity ^ parity[before], before[before]
    turn[sheet] = parity


def _filled(vertices: Vertices, faces: Faces) -> tuple[Vertices, Faces]:
    """Every border loop of a manifold mesh closed by a patch."""
    loops = _border_loops(vertices, faces)
    if not loops:
        return vertices, faces
    patches, count = [], len(vertices)
    for loop in loops:
        patch, fresh = _disc(len(loop))
        numbers = np.concatenate([loop, np.arange(count, count + fresh)])
        patches.append(numbers[patch])
        count += fresh
    patch_faces = np.concatenate(patches).astype(np.int32)
    all_faces = np.concatenate([faces, patch_faces])
    middles = np.repeat(
        [vertices[loop].mean(axis=0) for loop in loops], [_disc(len(loop))[1] for loop in loops], axis=0
    )
    points = np.concatenate([vertices, middles.astype(np.float32)])
    return _smooth(points, all_faces, len(vertices), patch_faces), all_faces


def _border_loops(vertices: Vertices, faces: Faces) -> list[NDArray[np.int64]]:
    """Vertices around each hole, in the direction of the faces that are missing."""
    border = np.flatnonzero(twins_of(vertices, faces) < 0)
    start, end = faces.reshape(-1)[border], np.roll(faces, -1, axis=1).reshape(-1)[border]
    following = dict(zip(end.tolist(), start.tolist(), strict=True))
    loops = []
    while following:
        vertex, after = following.popitem()
        loop = [vertex]
        while after != vertex:
            loop.append(after)
            after = following.pop(after)
        loops.append(np.array(loop))
    return loops[::-1]


@lru_cache(maxsize=256)
def _disc(edges: int) -> tuple[NDArray[np.int64], int]:
    """Faces (m, 3) of a disc with corners 0, 1, ... `edges` - 1 along its border, and how many vertices follow inside:
    rings of half as many each, and one in the middle."""
    if edges == 3:
        return np.array([[0, 1, 2]]), 0
    faces: list[tuple[int, int, int]] = []
    outer, count = list(range(edges)), edges
    while len(outer) > FAN:
        inner = list(range(count, count + len(outer) // 2))
        count += len(inner)
        for index, vertex in enumerate(inner):
            left, right = 2 * index, 2 * index + 1
            last = index == len(inner) - 1
            onward = list(range(right, len(outer))) if last else [right, right + 1]
            if last:
                onward.append(0)
            for a, b in zip([left, *onward], onward, strict=False):
                faces.append((outer[a], outer[b], vertex))
            faces.append((outer[onward[-1]], inner[(index + 1) % len(inner)], vertex))
        outer = inner
    faces += [(vertex, outer[(index + 1) % len(outer)], count) for index, vertex in enumerate(outer)]
    return np.array(faces), count + 1 - edges


def _smooth(points: Vertices, faces: Faces, first: int, patches: Faces) -> Vertices:
    """Vertices from number `first` on, where the surface bends least, with all others fixed: least squares of the
    umbrella operator (Kobbelt et al. 1998, Interactive multi-resolution modeling) on the patches and their border."""
    if first == len(points):
        return points
    bent = np.unique(patches)
    near = faces[np.isin(faces, bent).any(axis=1)]
    used, local = np.unique(near, return_inverse=True)
    local = local.reshape(-1, 3)
    start, end = local.reshape(-1), np.roll(local, -1, axis=1).reshape(-1)
    size = len(used)
    links = csr_array((np.ones(2 * len(start)), (np.r_[start, end], np.r_[end, start])), shape=(size, size))
    links.data[:] = 1
    umbrella = diags_array(1 / links.sum(axis=1)) @ links - diags_array(np.ones(size))
    rows = csr_array(umbrella)[np.searchsorted(used, bent)]
    free = used >= first
    inner, outer = rows[:, free], rows[:, ~free]
    target = -(outer @ points[used[~free]].astype(np.float64))
    solution = splu((inner.T @ inner).tocsc(), permc_spec="MMD_AT_PLUS_A").solve(inner.T @ target)
    result = points.copy()
    result[used[free]] = solution.astype(np.float32)
    return result
