"""Fills the surface that no view saw: a smooth continuation of the measured surface around it; fusion calls it.

Deep in a hollow, the volume of signed distances ends at the shadow of the hollow's rim, which is not a surface of the
object. There the mesh is bent like a thin plate that is clamped to the measured surface: Liepa, Filling holes in meshes
(SGP 2003), with the umbrella operator of Kobbelt et al., Interactive multi-resolution modeling on arbitrary meshes
(SIGGRAPH 1998).
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage
from scipy.sparse import coo_array, csr_array, diags_array
from scipy.sparse.csgraph import connected_components
from scipy.sparse.linalg import cg, splu

# From voxel to voxel, distances to measured surfaces and to silhouettes change by about one voxel. From space that a
# view sees as free into its shadow they jump by the truncation
JUMP_VOXELS = 2.0
# The edge of a shadow falsifies this many rings of vertices around it. A shadow less than twice as wide is not filled:
# there, readings contradict each other
RIM_RINGS = 3
CLEARANCE_VOXELS = 1.0  # thickness of solid that stays in front of a vertex that moves into it
# Larger patches are bent by so many steps of conjugate gradients from where they are: factorised, a room's unseen
# surface took 8 GB
MOST_FACTORISED = 50_000
STEPS = 400
WAY_STEPS = 16  # places along a vertex's way that are checked


def continued(
    vertices: NDArray[np.floating], faces: NDArray[np.integer], volume: NDArray[np.float32], voxel: float
) -> NDArray[np.floating]:
    """The vertices (n, 3) of a volume's zero level, in voxels, with shadows bent into a continuation of the rest.

    volume: signed distances in the unit of `voxel`, positive in free space, which no vertex enters.
    """
    shadow = _on_jumps(vertices, volume, JUMP_VOXELS * voxel)
    if not shadow.any():
        return vertices
    links = _links(faces, len(vertices))
    wide = ~_grown(~shadow, links, RIM_RINGS)
    patch = _anchored(_grown(wide, links, 2 * RIM_RINGS), links)
    if not patch.any():
        return vertices
    result = vertices.astype(np.float64)
    result[patch] = _as_far_as_unseen(result[patch], _thin_plate(result, links, patch), volume)
    return result


def _on_jumps(vertices: NDArray[np.floating], volume: NDArray[np.float32], jump: float) -> NDArray[np.bool_]:
    """True, (n,), for vertices on a grid edge along which the distance changes by more than `jump`.

    Edges across the volume's border count as smooth: it lies around what was measured.
    """
    ends = [np.clip(end(vertices), 0, np.array(volume.shape) - 1).astype(np.intp) for end in (np.floor, np.ceil)]
    lower, upper = (volume[tuple(end.T)] for end in ends)
    return np.asarray(np.abs(upper - lower) > jump)


def _links(faces: NDArray[np.integer], count: int) -> csr_array:
    """Matrix (count, count) with 1 for vertices that share an edge, else 0."""
    start, end = faces.reshape(-1), np.roll(faces, -1, axis=1).reshape(-1)
    both = (np.concatenate([start, end]), np.concatenate([end, start]))
    links = csr_array(coo_array((np.ones(2 * faces.size), both), shape=(count, count)))
    links.data[:] = 1
    return links


def _grown(selected: NDArray[np.bool_], links: csr_array, rings: int) -> NDArray[np.bool_]:
    for _ in range(rings):
        selected = selected | (links @ selected.astype(np.float64) > 0)
    return selected


def _anchored(patch: NDArray[np.bool_], links: csr_array) -> NDArray[np.bool_]:
    """The patch without pieces of the mesh that lie in it wholly: no measured surface holds those in place."""
    count, piece = connected_components(links, directed=False)
    return patch & (np.bincount(piece, ~patch, minlength=count) > 0)[piece]


def _thin_plate(vertices: NDArray[np.float64], links: csr_array, patch: NDArray[np.bool_]) -> NDArray[np.float64]:
    """Positions (k, 3) of the patch's vertices with the least squared umbrella vectors in and next to it.

    An umbrella vector leads from a vertex to the mean of its neighbours; its square is the energy of a bent plate, if
    all edges are equally long. All other vertices stay, and those next to the patch hold its slope.
    """
    rows = np.flatnonzero(_grown(patch, links, 1))
    near = links[rows]
    umbrella = diags_array(1 / near.sum(axis=1)) @ near - csr_array(
        (np.ones(len(rows)), (np.arange(len(rows)), rows)), shape=near.shape
    )
    free = umbrella[:, np.flatnonzero(patch)]
    held = umbrella @ np.where(patch[:, None], 0, vertices)
    if patch.sum() > MOST_FACTORISED:
        return _relaxed(free, held, vertices[patch])
    # a symmetric ordering: several times faster here than the default, and with less fill
    factors = splu(
        (free.T @ free).tocsc(),
        permc_spec="MMD_AT_PLUS_A",
        diag_pivot_thresh=0.0,
        options={"SymmetricMode": True},
    )
    return np.asarray(factors.solve(-(free.T @ held)))


def _relaxed(free: csr_array, held: NDArray[np.float64], start: NDArray[np.float64]) -> NDArray[np.float64]:
    """Positions (k, 3) on the way from `start` to the least squares of free @ positions + held, in bounded work."""
    normal = (free.T @ free).tocsr()
    goal = -(free.T @ held)
    preconditioner = diags_array(1 / normal.diagonal())
    return np.column_stack(
        [cg(normal, goal[:, axis], x0=start[:, axis], maxiter=STEPS, M=preconditioner)[0] for axis in range(3)]
    )


def _as_far_as_unseen(
    start: NDArray[np.float64], goal: NDArray[np.float64], volume: NDArray[np.float32]
) -> NDArray[np.float64]:
    """The last places (k, 3) on the ways from `start` to `goal`, in voxels, that are not free."""
    way = goal - start
    ahead = CLEARANCE_VOXELS * way / np.maximum(np.linalg.norm(way, axis=1, keepdims=True), np.finfo(np.float64).tiny)
    last = np.zeros((len(way), 1))
    for share in np.arange(1, WAY_STEPS + 1) / WAY_STEPS:
        place = start + share * way
        last[_inside(place, volume) & _inside(place + ahead, volume)] = share
    return start + last * way


def _inside(points: NDArray[np.float64], volume: NDArray[np.float32]) -> NDArray[np.bool_]:
    return np.asarray(ndimage.map_coordinates(volume, points.T, order=1, mode="constant", cval=np.inf) <= 0)
