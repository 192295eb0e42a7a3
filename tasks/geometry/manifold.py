"""Edges and vertices of a triangle mesh made manifold by parting what only touches; degenerate faces mended in place.

Simplification by edge collapses maps a closed mesh to a closed chain of faces: along each edge as many faces run one
way as the other way. Such a chain needs no new surface: it is parted along edges and vertices where sheets touch.
Called by `closing` and `solids`. Vertices are (n, 3) float32, faces (m, 3) int32.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from scipy.sparse import coo_matrix
from scipy.sparse.csgraph import connected_components

from tasks.geometry.mesh_repair import DEGENERATE_HEIGHT, Faces, Vertices, compact, degenerate, face_normals

# Vertices at the same place that belong to different sheets are moved apart by this share of the diagonal
SHEET_GAP = 1e-5
PARTING_ROUNDS = 20
MEND_RINGS = 3  # of faces around those to mend that may change
MEND_ROUNDS = 10  # mending a face may flatten the one beside it
NEEDLE = 0.01  # a degenerate face with an edge shorter than this share of its longest one is a needle, else a cap


def parted(vertices: Vertices, faces: Faces) -> tuple[Vertices, Faces]:
    """The same surface, but an edge has at most two faces, which run along it in opposite directions, and a vertex
    one fan of faces. A closed chain of faces becomes closed pieces.

    A mesh that is so already comes back as it is. Vertices are doubled in place: see `sheets_apart`.
    """
    faces = without_opposites(faces)
    twins = twins_of(vertices, faces)
    for _ in range(PARTING_ROUNDS):
        points, triangles = fans_apart(vertices, faces, twins)
        if not _crossed(triangles, twins):
            break
    return points, triangles


def _crossed(faces: Faces, twins: NDArray[np.int64]) -> bool:
    """Finds edges that two pairs of faces still share, because the two meet again around both ends of the edge, and
    exchanges the partners in `twins`: that cuts such a loop open at both ends. False if there are none.

    Of edges with a common end one is left for the next round.
    """
    start, end = faces.reshape(-1).astype(np.int64), np.roll(faces, -1, axis=1).reshape(-1).astype(np.int64)
    key = start * (int(faces.max(initial=0)) + 1) + end
    order = np.argsort(key, kind="stable")
    again = np.flatnonzero(key[order[1:]] == key[order[:-1]])
    if not len(again):
        return False
    one, other = order[again], order[again + 1]
    taken: set[int] = set()
    for here, there in zip(one.tolist(), other.tolist(), strict=True):
        ends = {int(start[here]), int(end[here])}
        if taken.isdisjoint(ends):
            taken |= ends
            beyond_here, beyond_there = twins[here], twins[there]
            for half, beyond in ((here, beyond_there), (there, beyond_here)):
                twins[half] = beyond
                if beyond >= 0:
                    twins[beyond] = half
    return True


def without_opposites(faces: Faces) -> Faces:
    """Without pairs of faces with the same corners that look in opposite directions: they enclose nothing."""
    smallest = faces.argmin(axis=1)
    turned = np.take_along_axis(faces, (smallest[:, None] + np.arange(3)) % 3, axis=1)
    mirrored = turned[:, 1] > turned[:, 2]
    corners = np.where(mirrored[:, None], turned[:, [0, 2, 1]], turned)
    order = np.lexsort((mirrored, *corners.T[::-1]))
    new = np.r_[True, (corners[order[1:]] != corners[order[:-1]]).any(axis=1)] if len(faces) else np.zeros(0, bool)
    if new.all():
        return faces
    group = np.cumsum(new) - 1
    place = np.arange(len(order)) - np.flatnonzero(new)[group]
    backs = np.bincount(group, mirrored[order]).astype(int)
    fronts = np.bincount(group) - backs
    pairs = np.minimum(fronts, backs)[group]
    rank = np.where(mirrored[order], place - fronts[group], place)
    return faces[np.sort(order[rank >= pairs])]


def twins_of(vertices: Vertices, faces: Faces) -> NDArray[np.int64]:
    """The half-edge beyond each half-edge, (3 m,), -1 at a border. Half-edge 3 f + c starts at corner c of face f.

    Where more than two faces meet, those become neighbours that have the enclosed solid between them.
    """
    start, end = faces.reshape(-1).astype(np.int64), np.roll(faces, -1, axis=1).reshape(-1).astype(np.int64)
    low, high = np.minimum(start, end), np.maximum(start, end)
    key = low * (int(faces.max(initial=0)) + 1) + high
    order = np.argsort(key)
    first = np.flatnonzero(np.diff(key[order], prepend=-1))
    count = np.diff(first, append=len(key))
    twins = np.full(len(key), -1, np.int64)
    one, other = order[first[count == 2]], order[first[count == 2] + 1]
    opposite = start[one] != start[other]
    one, other = one[opposite], other[opposite]
    twins[one], twins[other] = other, one
    crowded = order[np.repeat(count > 2, count)]
    if len(crowded):
        backs, forths = _wedges(vertices, faces, crowded, key, low, high, start == low)
        twins[backs], twins[forths] = forths, backs
    return twins


def _wedges(
    vertices: Vertices,
    faces: Faces,
    crowded: NDArray[np.int64],
    key: NDArray[np.int64],
    low: NDArray[np.int64],
    high: NDArray[np.int64],
    forth: NDArray[np.bool_],
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Pairs of half-edges of crowded edges with solid between them: around an edge from its lower to its higher vertex,
    the solid lies after a face that runs back along it, and ahead of one that runs forth: brackets that match."""
    origin, points = vertices[low[crowded]].astype(np.float64), vertices.astype(np.float64)
    axis = points[high[crowded]] - origin
    axis /= np.maximum(np.linalg.norm(axis, axis=1, keepdims=True), np.finfo(float).tiny)
    aside = np.cross(axis, np.eye(3)[np.abs(axis).argmin(axis=1)])
    spoke = points[faces[crowded // 3, (crowded + 2) % 3]] - origin
    angle = np.arctan2((spoke * np.cross(axis, aside)).sum(axis=1), (spoke * aside).sum(axis=1))

    _, edge = np.unique(key[crowded], return_inverse=True)
    order = np.lexsort((angle, edge))
    half_edges, edge = crowded[order], edge[order]
    opens = ~forth[half_edges]
    size = np.bincount(edge)
    begin = (np.cumsum(size) - size)[edge]
    place = np.arange(len(edge)) - begin
    # a circle of brackets is read from where least are open
    depth = _depth(opens, begin)
    lowest = np.lexsort((place, -depth, edge))[np.cumsum(size) - 1]
    turned = (place - place[lowest][edge] - 1) % size[edge]
    order = np.lexsort((turned, edge))
    half_edges, opens, turned = half_edges[order], opens[order], turned[order]
    depth = _depth(opens, begin) + ~opens
    order = np.lexsort((turned, depth, edge))
    here, there = order[:-1], order[1:]
    match = (edge[here] == edge[there]) & (depth[here] == depth[there]) & opens[here] & ~opens[there]
    return half_edges[here[match]], half_edges[there[match]]


def _depth(opens: NDArray[np.bool_], begin: NDArray[np.int64]) -> NDArray[np.int64]:
    """How many brackets are open after each, counted from the first of its edge."""
    total = np.cumsum(np.where(opens, 1, -1))
    return np.asarray(total - np.r_[0, total][begin])


def fans_apart(vertices: Vertices, faces: Faces, twins: NDArray[np.int64]) -> tuple[Vertices, Faces]:
    """A vertex that joins several fans of faces becomes one vertex for each of them; `twins` as of `twins_of`."""
    half_edges = np.flatnonzero(twins >= 0)
    beyond = twins[half_edges]
    # around a half-edge's start, the next corner is the one where its twin ends
    following = beyond - beyond % 3 + (beyond + 1) % 3
    links = coo_matrix((np.ones(len(beyond), bool), (half_edges, following)), shape=(faces.size, faces.size))
    count, fan = connected_components(links, directed=False)
    start = faces.reshape(-1)
    if count == len(np.unique(start)):
        return compact(vertices, faces)
    _, first = np.unique(fan, return_index=True)
    return vertices[start[first]], fan.reshape(-1, 3).astype(np.int32)


def sheets_apart(vertices: Vertices, faces: Faces) -> tuple[Vertices, Faces]:
    """Moves vertices at the same place towards their own faces, so that welding by position joins no two sheets."""
    _, place, count = np.unique(vertices, axis=0, return_inverse=True, return_counts=True)
    shared = np.flatnonzero(count[place.reshape(-1)] > 1)
    if len(shared):
        sums, corners = np.zeros((len(vertices), 3)), np.zeros(len(vertices))
        np.add.at(sums, faces, vertices[faces].mean(axis=1)[:, None])
        np.add.at(corners, faces, 1)
        towards = sums[shared] / corners[shared, None] - vertices[shared]
        towards /= np.maximum(np.linalg.norm(towards, axis=1, keepdims=True), np.finfo(np.float32).tiny)
        vertices = vertices.copy()
        vertices[shared] += (towards * SHEET_GAP * np.linalg.norm(np.ptp(vertices, axis=0))).astype(np.float32)
    return vertices, faces


def without_short_edges(vertices: Vertices, faces: Faces) -> tuple[Vertices, Faces]:
    """Edges too short for a face beside them to have a normal become one vertex. A closed chain of faces stays one."""
    diagonal = np.linalg.norm(np.ptp(vertices, axis=0)) if len(vertices) else 0
    start, end = faces.reshape(-1), np.roll(faces, -1, axis=1).reshape(-1)
    short = np.linalg.norm(vertices[start] - vertices[end], axis=1) <= DEGENERATE_HEIGHT * diagonal
    if not short.any():
        return vertices, faces
    links = coo_matrix((np.ones(short.sum(), bool), (start[short], end[short])), shape=(len(vertices),) * 2)
    _, group = connected_components(links, directed=False)
    _, first = np.unique(group, return_index=True)
    faces = first[group[faces]].astype(np.int32)
    a, b, c = faces.T
    return compact(vertices, faces[(a != b) & (b != c) & (c != a)])


def without_degenerate(vertices: Vertices, faces: Faces) -> tuple[Vertices, Faces]:
    """Degenerate faces of a manifold mesh mended where they are: needles lose their short edge, of caps the longest
    edge is flipped. What neither can mend without joining sheets stays."""
    for _ in range(MEND_ROUNDS):
        near = flat = degenerate(vertices, faces)
        if not flat.any():
            break
        for _ in range(MEND_RINGS):
            near = np.asarray(np.isin(faces, faces[near]).any(axis=1))
        local, fixed = faces[near], np.unique(faces[~near])
        before = local
        for index in np.flatnonzero(flat[near]).tolist():
            local = _mended(vertices, local, index, fixed)
        if local is before:
            break
        faces = faces.copy()
        faces[near] = local
        faces = faces[faces[:, 0] != faces[:, 1]]  # collapsed ones
    return compact(vertices, faces)


def _mended(vertices: Vertices, faces: Faces, index: int, fixed: NDArray[np.integer]) -> Faces:
    """One degenerate face collapsed or flipped; faces that collapse get equal corners, so that the others keep their
    numbers. `fixed`: vertices whose faces are not all here."""
    face = faces[index]
    if face[0] == face[1] or np.isin(face, fixed).any():
        return faces
    lengths = np.linalg.norm(vertices[np.roll(face, -1)] - vertices[face], axis=1)
    by_length = np.argsort(lengths)
    needle = lengths[by_length[0]] <= NEEDLE * lengths[by_length[2]]
    ways = (_collapsed, _flipped) if needle else (_flipped, _collapsed)
    for way in ways:
        corner = int(by_length[0] if way is _collapsed else by_length[2])
        result = way(vertices, faces, index, corner)
        if result is not None:
            return result
    return faces


def _collapsed(vertices: Vertices, faces: Faces, index: int, corner: int) -> Faces | None:
    """The edge at a corner becomes one vertex; None if its ends have other common neighbours than its two faces give
    (the link condition: Dey et al. 1999, Topology preserving edge contraction)."""
    keep, gone = int(faces[index, corner]), int(faces[index, (corner + 1) % 3])
    at_keep, at_gone = (faces == keep).any(axis=1), (faces == gone).any(axis=1)
    common = np.intersect1d(faces[at_keep], faces[at_gone])
    if len(common) != 4 or (at_keep & at_gone).sum() != 2:  # the two ends and the two apexes
        return None
    around = at_gone & ~at_keep
    moved = np.where(faces[around] == gone, keep, faces[around])
    was, now = face_normals(vertices, faces[around]), face_normals(vertices, moved)
    flat = degenerate(vertices, faces)[around]
    if ((was * now).sum(axis=1)[~flat] < 0).any():
        return None
    result = faces.copy()
    result[around] = moved
    result[at_keep & at_gone] = keep
    return result


def _flipped(vertices: Vertices, faces: Faces, index: int, corner: int) -> Faces | None:
    """The edge at a corner joins the two apexes instead of its ends; None if these are joined already."""
    a, b, apex = (int(faces[index, (corner + step) % 3]) for step in range(3))
    beside = np.flatnonzero(((faces == a).any(axis=1)) & ((faces == b).any(axis=1)))
    beside = beside[beside != index]
    if len(beside) != 1:
        return None
    other = int(faces[beside[0]].sum() - a - b)
    if other == apex or ((faces == apex).any(axis=1) & (faces == other).any(axis=1)).any():
        return None
    result = faces.copy()
    result[index], result[beside[0]] = (a, other, apex), (other, b, apex)
    return result
