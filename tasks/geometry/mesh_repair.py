"""Triangle meshes as arrays: welded, taken apart into pieces and sheets, measured; nothing loose.

Vertices are (n, 3) floats, faces (m, 3) int32, counter-clockwise seen from outside.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from scipy.sparse import coo_array, coo_matrix, csr_array
from scipy.sparse.csgraph import connected_components

Vertices = NDArray[np.float32]
Faces = NDArray[np.int32]

# Faces less high than this share of the bounding box's diagonal count as degenerate: single precision has a tenth of it
DEGENERATE_HEIGHT = 1e-6


def without_crumbs(
    vertices: NDArray[np.floating], faces: NDArray[np.integer], crumb_fraction: float, closed: bool = True
) -> tuple[Vertices, Faces]:
    """The pieces but those with less than `crumb_fraction` of the largest one's area, and, if closed, cavities.

    Raises ValueError if nothing is left.
    """
    piece = connected_pieces(faces, len(vertices))
    normals = face_normals(vertices, faces)
    area = np.bincount(piece, np.linalg.norm(normals, axis=1))
    solid = np.bincount(piece, (vertices[faces[:, 0]] * normals).sum(axis=1)) > 0 if closed else area > 0
    keep = ((area >= crumb_fraction * area[solid].max(initial=0)) & solid)[piece]
    if not keep.any():
        raise ValueError("nothing of the mesh encloses a volume")
    return compact(vertices, faces[keep])


def weld(vertices: NDArray[np.floating], faces: NDArray[np.integer]) -> tuple[Vertices, Faces]:
    """Vertices at the same place become one; faces that collapse and vertices without a face are removed."""
    places, renumbered = np.unique(vertices.astype(np.float32), axis=0, return_inverse=True)
    faces = renumbered.reshape(-1)[faces]
    a, b, c = faces.T
    return compact(places, faces[(a != b) & (b != c) & (c != a)])


def is_closed(faces: NDArray[np.integer]) -> bool:
    """True if every edge belongs to exactly two faces, which run along it in opposite directions."""
    if not len(faces):
        return False
    size = int(faces.max()) + 1
    start, end = faces.reshape(-1).astype(np.int64), np.roll(faces, -1, axis=1).reshape(-1).astype(np.int64)
    forth, back = np.sort(start * size + end), np.sort(end * size + start)
    return bool((forth == back).all() and (forth[1:] != forth[:-1]).all())


def connected_pieces(faces: NDArray[np.integer], vertex_count: int) -> NDArray[np.int32]:
    """Number of the connected piece that each face belongs to, (m,); pieces share no vertex."""
    ends = np.concatenate([faces[:, [0, 1]], faces[:, [1, 2]]])
    links = coo_matrix((np.ones(len(ends), bool), (ends[:, 0], ends[:, 1])), shape=(vertex_count, vertex_count))
    _, labels = connected_components(links, directed=False)
    return np.asarray(labels[faces[:, 0]], np.int32)


def vertex_links(faces: NDArray[np.integer], count: int) -> csr_array:
    """Matrix (count, count) with 1 for vertices that share an edge, else 0."""
    start, end = faces.reshape(-1), np.roll(faces, -1, axis=1).reshape(-1)
    both = (np.concatenate([start, end]), np.concatenate([end, start]))
    links = csr_array(coo_array((np.ones(2 * faces.size), both), shape=(count, count)))
    links.data[:] = 1
    return links


def sheets(faces: NDArray[np.integer]) -> NDArray[np.int32]:
    """Number of the sheet that each face belongs to, (m,): two faces are joined by an edge that only they share."""
    size = int(faces.max(initial=0)) + 1
    ends = np.sort(np.stack([faces, np.roll(faces, -1, axis=1)], axis=-1).reshape(-1, 2).astype(np.int64), axis=1)
    edges = ends[:, 0] * size + ends[:, 1]
    order = np.argsort(edges)
    first = np.flatnonzero(np.diff(edges[order], prepend=-1))
    simple = first[np.diff(first, append=len(edges)) == 2]
    links = coo_matrix(
        (np.ones(len(simple), bool), (order[simple] // 3, order[simple + 1] // 3)), shape=(len(faces), len(faces))
    )
    return np.asarray(connected_components(links, directed=False)[1], np.int32)


def face_normals(vertices: NDArray[np.floating], faces: NDArray[np.integer]) -> NDArray[np.float64]:
    """Normals of the faces, (m, 3), as long as twice their area."""
    a, b, c = (vertices[faces[:, corner]].astype(np.float64) for corner in range(3))
    return np.cross(b - a, c - a)


def unit_sums(normals: NDArray[np.float64], corners: NDArray[np.integer], count: int) -> NDArray[np.float64]:
    """Unit normals of vertices, (count, 3): the sums of the faces' normals (m, 3) at their corners (m, 3)."""
    sums = np.zeros((count, 3))
    for corner in corners.T:
        for axis in range(3):
            sums[:, axis] += np.bincount(corner, normals[:, axis], count)
    return np.asarray(sums / np.maximum(np.linalg.norm(sums, axis=1, keepdims=True), np.finfo(float).tiny))


def volume(vertices: NDArray[np.floating], faces: NDArray[np.integer]) -> float:
    """Enclosed volume of a closed mesh; negative if it is inside out."""
    return float((vertices[faces[:, 0]] * face_normals(vertices, faces)).sum() / 6)


def winding_number(point: NDArray[np.floating], vertices: NDArray[np.floating], faces: NDArray[np.integer]) -> float:
    """Number of times that a mesh encloses a point (3,): 1 inside of a closed, outward oriented mesh, 0 outside.

    van Oosterom and Strackee, The solid angle of a plane triangle (1983).
    """
    towards = (vertices - point).astype(np.float32)
    a, b, c = (towards[faces[:, corner]] for corner in range(3))
    lengths = np.linalg.norm(towards, axis=1)
    x, y, z = (lengths[faces[:, corner]] for corner in range(3))
    dots = [np.einsum("md,md->m", *pair) for pair in ((a, b), (b, c), (c, a))]
    above = np.einsum("md,md->m", a, np.cross(b, c))
    angles = np.arctan2(above, x * y * z + dots[0] * z + dots[1] * x + dots[2] * y)
    return float(angles.sum(dtype=np.float64) / (2 * np.pi))


def compact(vertices: NDArray[np.floating], faces: NDArray[np.integer]) -> tuple[Vertices, Faces]:
    """Without vertices that belong to no face."""
    used = np.zeros(len(vertices), bool)
    used[faces] = True
    return vertices[used].astype(np.float32), (np.cumsum(used) - 1)[faces].astype(np.int32)


def degenerate(vertices: NDArray[np.floating], faces: NDArray[np.integer]) -> NDArray[np.bool_]:
    """Faces without a reliable normal, (m,)."""
    diagonal = float(np.linalg.norm(np.ptp(vertices, axis=0)))
    longest = np.linalg.norm(vertices[faces] - vertices[np.roll(faces, -1, axis=1)], axis=2).max(axis=1, initial=0)
    double_area = np.linalg.norm(face_normals(vertices, faces), axis=1)
    return np.asarray(double_area <= DEGENERATE_HEIGHT * diagonal * longest)
