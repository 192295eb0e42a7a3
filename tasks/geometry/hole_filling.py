"""Fills the surface that no view saw: a smooth continuation of the measured surface around it; fusion calls it.

Deep in a hollow, the volume of signed distances ends at the shadow of the hollow's rim, and below an object that bulges
it ends at the space that the object hides; neither is a surface of the object. There the mesh is bent like a thin plate
that is clamped to the measured surface: Liepa, Filling holes in meshes (SGP 2003), with the umbrella operator of
Kobbelt et al., Interactive multi-resolution modeling on arbitrary meshes (SIGGRAPH 1998).
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage
from scipy.sparse import csr_array, diags_array
from scipy.sparse.csgraph import connected_components
from scipy.sparse.linalg import cg, splu

from tasks.geometry.mesh_repair import vertex_links

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
# Single views graze an underside and put spots on it, which contradict each other: where this share of the vertices
# within so many rings is unseen, all of them count as unseen
SPOT_RINGS = 6
SPOT_SHARE = 1 / 3
SOFTEST = 0.9  # of the largest give: places that are as soft as this come to rest on the plane


def continued(
    vertices: NDArray[np.floating], faces: NDArray[np.integer], volume: NDArray[np.float32], voxel: float
) -> NDArray[np.floating]:
    """The vertices (n, 3) of a volume's zero level, in voxels, with shadows bent into a continuation of the rest.

    volume: signed distances in the unit of `voxel`, positive in free space, which no vertex enters.
    """
    shadow = on_jumps(vertices, volume, voxel)
    if not shadow.any():
        return vertices
    links = vertex_links(faces, len(vertices))
    wide = ~_grown(~shadow, links, RIM_RINGS)
    patch = _anchored(_grown(wide, links, 2 * RIM_RINGS), links)
    if not patch.any():
        return vertices
    result = vertices.astype(np.float64)
    goal, _ = _thin_plate(result, links, patch)
    result[patch] = _as_far_as_unseen(result[patch], goal, volume)
    return result


def rested(
    vertices: NDArray[np.floating],
    faces: NDArray[np.integer],
    volume: NDArray[np.float32],
    unseen: NDArray[np.bool_],
    plane: NDArray[np.float64],
    contact: float,
) -> NDArray[np.floating]:
    """Vertices (n, 3) of an object on a plane, in voxels, with what is unseen, (n,), as a continuation of the rest.

    A foot, lower than `contact` (voxels) above the plane, is an unseen underside if what is around it is unseen, else
    it is flat and stays. An underside that ends above the plane is loaded until it rests on it.
    volume: as in `continued`. plane: (4,), unit normal upwards and offset, in voxels.
    """
    links = vertex_links(faces, len(vertices))
    foot = vertices @ plane[:3] + plane[3] < contact
    foot = _below_unseen(foot, unseen, links)
    share = (unseen | foot).astype(np.float64)
    for _ in range(SPOT_RINGS):
        share = (links @ share) / np.maximum(links.sum(axis=1), 1)
    patch = _anchored(_grown(share > SPOT_SHARE, links, RIM_RINGS), links)
    if not patch.any():
        return vertices
    result = vertices.astype(np.float64)
    goal, give = _thin_plate(result, links, patch)
    underside = _pieces_with(foot, patch, links)[patch]
    if underside.any():
        give = np.where(underside, give, 0)
        soft = give > SOFTEST * give.max()
        load = float(np.median((goal[soft] @ plane[:3] + plane[3]) / give[soft]))
        goal -= max(load, 0.0) * give[:, None] * plane[:3]
    result[patch] = _as_far_as_unseen(result[patch], goal, volume)
    return result


def on_jumps(vertices: NDArray[np.floating], volume: NDArray[np.float32], voxel: float) -> NDArray[np.bool_]:
    """True, (n,), for vertices of the volume's zero level, in voxels, where it is the edge of a shadow.

    There the distance jumps along the grid's edge. Edges across the volume's border count as smooth: it lies around
    what was measured.
    """
    ends = [np.clip(end(vertices), 0, np.array(volume.shape) - 1).astype(np.intp) for end in (np.floor, np.ceil)]
    lower, upper = (volume[tuple(end.T)] for end in ends)
    return np.asarray(np.abs(upper - lower) > JUMP_VOXELS * voxel)


def _grown(selected: NDArray[np.bool_], links: csr_array, rings: int) -> NDArray[np.bool_]:
    for _ in range(rings):
        selected = selected | (links @ selected.astype(np.float64) > 0)
    return selected


def _anchored(patch: NDArray[np.bool_], links: csr_array) -> NDArray[np.bool_]:
    """The patch without pieces of the mesh that lie in it wholly: no measured surface holds those in place."""
    count, piece = connected_components(links, directed=False)
    return patch & (np.bincount(piece, ~patch, minlength=count) > 0)[piece]


def _below_unseen(foot: NDArray[np.bool_], unseen: NDArray[np.bool_], links: csr_array) -> NDArray[np.bool_]:
    """The pieces of the foot around which `SPOT_SHARE` of the vertices is unseen."""
    region = _grown(foot, links, SPOT_RINGS)
    piece, count = _pieces(region, links)
    around = region & ~foot
    hidden, ring = (np.bincount(piece[chosen], minlength=count) for chosen in (around & unseen, around))
    below = np.append(hidden > SPOT_SHARE * np.maximum(ring, 1), False)
    return foot & below[piece]


def _pieces_with(some: NDArray[np.bool_], region: NDArray[np.bool_], links: csr_array) -> NDArray[np.bool_]:
    """The pieces of a region that hold one of some vertices."""
    piece, count = _pieces(region, links)
    held = np.append(np.bincount(piece[region & some], minlength=count) > 0, False)
    return np.asarray(held[piece])


def _pieces(region: NDArray[np.bool_], links: csr_array) -> tuple[NDArray[np.intp], int]:
    """The connected piece of the region that each vertex belongs to, -1 = none, and their number."""
    inside = np.flatnonzero(region)
    count, piece = connected_components(links[inside][:, inside], directed=False)
    result = np.full(len(region), -1, np.intp)
    result[inside] = piece
    return result, int(count)


def _thin_plate(
    vertices: NDArray[np.float64], links: csr_array, patch: NDArray[np.bool_]
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Positions (k, 3) of the patch's vertices with the least squared umbrella vectors in and next to it, and how far
    each of them gives way, (k,), if a load of 1 pushes on all.

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
    forces = np.column_stack([-(free.T @ held), np.ones(free.shape[1])])
    if patch.sum() > MOST_FACTORISED:
        bent = _relaxed(free, forces, np.column_stack([vertices[patch], np.zeros(free.shape[1])]))
        return bent[:, :3], bent[:, 3]
    # a symmetric ordering: several times faster here than the default, and with less fill
    factors = splu(
        (free.T @ free).tocsc(),
        permc_spec="MMD_AT_PLUS_A",
        diag_pivot_thresh=0.0,
        options={"SymmetricMode": True},
    )
    bent = factors.solve(forces)
    return bent[:, :3], bent[:, 3]


def _relaxed(free: csr_array, forces: NDArray[np.float64], start: NDArray[np.float64]) -> NDArray[np.float64]:
    """Columns (k, c) on the way from `start` to the solution of free.T @ free @ columns = forces, in bounded work."""
    normal = (free.T @ free).tocsr()
    preconditioner = diags_array(1 / normal.diagonal())
    return np.column_stack(
        [
            cg(normal, force, x0=begin, maxiter=STEPS, M=preconditioner)[0]
            for force, begin in zip(forces.T, start.T, strict=True)
        ]
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
