"""Triangle meshes as arrays: fewer faces; closed, consistently oriented ones.

Vertices are (n, 3) floats, faces (m, 3) int32, counter-clockwise seen from outside.
"""

from __future__ import annotations

import fast_simplification
import numpy as np
from numpy.typing import NDArray
from pymeshfix import PyTMesh
from scipy.sparse import coo_matrix
from scipy.sparse.csgraph import connected_components

Vertices = NDArray[np.float32]
Faces = NDArray[np.int32]

# Quality over speed: the default of 7 doubles the largest error and leaves open edges
SIMPLIFY_AGGRESSION = 3
# Faces of less area than this share of the bounding box's diagonal squared count as degenerate
DEGENERATE_AREA = 1e-12
# Vertices at the same place that belong to different sheets are moved apart by this share of the diagonal
SHEET_GAP = 1e-5


def simplify(vertices: NDArray[np.floating], faces: NDArray[np.integer], budget: int) -> tuple[Vertices, Faces]:
    """About `budget` faces at most, by quadric error (Garland and Heckbert 1997); a smaller mesh comes back as is."""
    points, triangles = vertices.astype(np.float32), faces.astype(np.int32)
    if len(triangles) <= budget:
        return points, triangles
    fewer = fast_simplification.simplify(points, triangles, target_count=budget, agg=SIMPLIFY_AGGRESSION)
    return fewer[0].astype(np.float32), fewer[1].astype(np.int32)


def repair(vertices: NDArray[np.floating], faces: NDArray[np.integer]) -> tuple[Vertices, Faces]:
    """The mesh welded by position, closed, manifold and outward oriented, without degenerate faces.

    Pieces that are so already stay untouched; others go through MeshFix (Attene 2010, A lightweight approach to
    repairing digitized polygon meshes). A piece of which nothing remains is left out. Raises ValueError if all are.
    """
    vertices, faces = weld(vertices, faces)
    piece = connected_pieces(faces, len(vertices))
    pieces = [_repaired_piece(vertices, faces[piece == label]) for label in np.unique(piece)]
    pieces = [(points, triangles) for points, triangles in pieces if len(triangles)]
    if not pieces:
        raise ValueError("nothing of the mesh encloses a volume")
    offsets = np.cumsum([0, *(len(points) for points, _ in pieces[:-1])])
    joined = np.concatenate([triangles + offset for (_, triangles), offset in zip(pieces, offsets, strict=True)])
    return np.concatenate([points for points, _ in pieces]).astype(np.float32), joined.astype(np.int32)


def weld(vertices: NDArray[np.floating], faces: NDArray[np.integer]) -> tuple[Vertices, Faces]:
    """Vertices at the same place become one; faces that collapse and vertices without a face go."""
    places, renumbered = np.unique(vertices.astype(np.float32), axis=0, return_inverse=True)
    faces = renumbered.reshape(-1)[faces]
    a, b, c = faces.T
    return _compact(places, faces[(a != b) & (b != c) & (c != a)])


def is_closed(faces: NDArray[np.integer]) -> bool:
    """Every edge belongs to exactly two faces, which run along it in opposite directions."""
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


def face_normals(vertices: NDArray[np.floating], faces: NDArray[np.integer]) -> NDArray[np.float64]:
    """Normals of the faces, (m, 3), as long as twice their area."""
    a, b, c = (vertices[faces[:, corner]].astype(np.float64) for corner in range(3))
    return np.cross(b - a, c - a)


def volume(vertices: NDArray[np.floating], faces: NDArray[np.integer]) -> float:
    """Enclosed volume of a closed mesh; negative if it is inside out."""
    return float((vertices[faces[:, 0]] * face_normals(vertices, faces)).sum() / 6)


def _repaired_piece(vertices: Vertices, faces: Faces) -> tuple[Vertices, Faces]:
    vertices, faces = _compact(vertices, faces)
    if not is_closed(faces) or _degenerate(vertices, faces).any():
        fixer = PyTMesh()
        fixer.set_quiet(1)
        fixer.load_array(vertices.astype(np.float64), faces)
        fixer.fill_small_boundaries()
        fixer.clean()
        fixed_vertices, fixed_faces = fixer.return_arrays()
        vertices, faces = fixed_vertices.astype(np.float32), fixed_faces.astype(np.int32)
    if len(faces):
        vertices, faces = _sheets_apart(*_fans_apart(vertices, faces))
        if volume(vertices, faces) < 0:
            faces = np.ascontiguousarray(faces[:, ::-1])
    return vertices, faces


def _compact(vertices: NDArray[np.floating], faces: NDArray[np.integer]) -> tuple[Vertices, Faces]:
    used, renumbered = np.unique(faces, return_inverse=True)
    return vertices[used].astype(np.float32), renumbered.reshape(-1, 3).astype(np.int32)


def _degenerate(vertices: Vertices, faces: Faces) -> NDArray[np.bool_]:
    diagonal = float(np.linalg.norm(np.ptp(vertices, axis=0)))
    area = np.linalg.norm(face_normals(vertices, faces), axis=1) / 2
    return np.asarray(area <= DEGENERATE_AREA * diagonal**2)


def _fans_apart(vertices: Vertices, faces: Faces) -> tuple[Vertices, Faces]:
    """A vertex of a closed mesh that joins several fans of faces becomes one vertex for each of them."""
    start, end = faces.reshape(-1).astype(np.int64), np.roll(faces, -1, axis=1).reshape(-1).astype(np.int64)
    size = len(vertices)
    half_edges, twins = np.argsort(start * size + end), np.argsort(end * size + start)
    # around a half-edge's start, the next corner is the one where its twin ends
    following = twins - twins % 3 + (twins + 1) % 3
    rings = coo_matrix((np.ones(faces.size, bool), (half_edges, following)), shape=(faces.size, faces.size))
    count, ring = connected_components(rings, directed=False)
    if count == size:
        return vertices, faces
    _, first = np.unique(ring, return_index=True)
    return vertices[start[first]], ring.reshape(-1, 3).astype(np.int32)


def _sheets_apart(vertices: Vertices, faces: Faces) -> tuple[Vertices, Faces]:
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
