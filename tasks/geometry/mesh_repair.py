"""Repair of triangle meshes: fewer faces, closed, consistently oriented, nothing loose; the engines and export call it.

Vertices are (n, 3) floats, faces (m, 3) int32, counter-clockwise seen from outside.
"""

from __future__ import annotations

from collections.abc import Sequence

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
# Pieces with less area than this share of the largest one's are crumbs
CRUMB_FRACTION = 0.02
# A dense mesh is simplified in two passes, first to this many times its budget. In one pass, the errors that defects
# cause add up to the end; the second pass begins without them, and its mesh is nearer to the dense one (0.6 times)
FIRST_PASS = 5
REPAIR_ROUNDS = 3  # the faces of filled holes may exceed the budget; in the second round there are no holes left
INSIDE_SAMPLES = 5  # vertices of a piece that decide if it lies inside of another


def simplify(vertices: NDArray[np.floating], faces: NDArray[np.integer], budget: int) -> tuple[Vertices, Faces]:
    """About `budget` faces at most, by quadric error (Garland and Heckbert 1997); a smaller mesh is not changed."""
    points, triangles = vertices.astype(np.float32), faces.astype(np.int32)
    if len(triangles) <= budget:
        return points, triangles
    # its threshold for small errors is absolute: a large object would keep too many faces, a small one lose detail
    middle, size = (points.min(axis=0) + points.max(axis=0)) / 2, np.ptp(points, axis=0).max()
    scaled = (points - middle) / size
    fewer, triangles = fast_simplification.simplify(scaled, triangles, target_count=budget, agg=SIMPLIFY_AGGRESSION)
    return (fewer * size + middle).astype(np.float32), triangles.astype(np.int32)


def repair(vertices: NDArray[np.floating], faces: NDArray[np.integer]) -> tuple[Vertices, Faces]:
    """The mesh welded by position, closed, manifold and outward oriented, without degenerate faces.

    Pieces that need no repair are not changed; others go through MeshFix (Attene 2010, A lightweight approach to
    repairing digitized polygon meshes). A piece of which nothing remains is left out. Raises ValueError if all are.
    """
    vertices, faces = weld(vertices, faces)
    piece = connected_pieces(faces, len(vertices))
    pieces = [_repaired_piece(vertices, faces[piece == label]) for label in np.unique(piece)]
    pieces = [(points, triangles) for points, triangles in pieces if len(triangles)]
    if not pieces:
        raise ValueError("nothing of the mesh encloses a volume")
    return _joined(pieces)


def solidify(vertices: NDArray[np.floating], faces: NDArray[np.integer], budget: int) -> tuple[Vertices, Faces]:
    """A dense mesh with defects becomes a closed, manifold and outward oriented one of about `budget` faces at most.

    For meshes that a model made: holes, doubled faces, fins, crumbs and sheets inside of solids are all removed.
    (`repair` after `simplify` would close such a sheet with a lid.) Raises ValueError if nothing encloses a volume.
    """
    vertices, faces = _without_loose_sheets(*_without_doubles(*weld(vertices, faces)))
    vertices, faces = _without_enclosed_sheets(vertices, faces)
    if not len(faces):
        raise ValueError("nothing of the mesh encloses a volume")
    vertices, faces = simplify(vertices, faces, FIRST_PASS * budget)
    for _ in range(REPAIR_ROUNDS):
        vertices, faces = _solids(*simplify(vertices, faces, budget))
        if len(faces) <= budget:
            break
    return vertices, faces


def without_crumbs(
    vertices: NDArray[np.floating], faces: NDArray[np.integer], crumb_fraction: float
) -> tuple[Vertices, Faces]:
    """Closed pieces, except cavities and pieces with less than `crumb_fraction` of the largest one's area.

    Raises ValueError if nothing encloses a volume.
    """
    piece = connected_pieces(faces, len(vertices))
    normals = face_normals(vertices, faces)
    area = np.bincount(piece, np.linalg.norm(normals, axis=1))
    volume = np.bincount(piece, (vertices[faces[:, 0]] * normals).sum(axis=1))
    keep = ((area >= crumb_fraction * area[volume > 0].max(initial=0)) & (volume > 0))[piece]
    if not keep.any():
        raise ValueError("nothing of the mesh encloses a volume")
    return _compact(vertices, faces[keep])


def weld(vertices: NDArray[np.floating], faces: NDArray[np.integer]) -> tuple[Vertices, Faces]:
    """Vertices at the same place become one; faces that collapse and vertices without a face are removed."""
    places, renumbered = np.unique(vertices.astype(np.float32), axis=0, return_inverse=True)
    faces = renumbered.reshape(-1)[faces]
    a, b, c = faces.T
    return _compact(places, faces[(a != b) & (b != c) & (c != a)])


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


def _without_doubles(vertices: Vertices, faces: Faces) -> tuple[Vertices, Faces]:
    """Of faces with the same corners, in any order, only the first stays."""
    corners = np.sort(faces, axis=1)
    order = np.lexsort(corners.T)  # stable; five times as fast as np.unique of rows
    repeated = (corners[order[1:]] == corners[order[:-1]]).all(axis=1)
    return vertices, np.delete(faces, order[1:][repeated], axis=0)


def _without_loose_sheets(vertices: Vertices, faces: Faces) -> tuple[Vertices, Faces]:
    """Without the sheets, closed or not, that are crumbs; fins on an edge are crumbs as well."""
    sheet = sheets(faces)
    area = np.bincount(sheet, np.linalg.norm(face_normals(vertices, faces), axis=1))
    return _compact(vertices, faces[(area >= CRUMB_FRACTION * area.max(initial=0))[sheet]])


def _without_enclosed_sheets(vertices: Vertices, faces: Faces) -> tuple[Vertices, Faces]:
    """Without the sheets inside of a larger one.

    A model that knows space near the surface only, like TRELLIS, gives a solid an inner side as well, which is often
    rougher and has more faces than the outer side.
    """
    sheet = sheets(faces)
    parts = [_compact(vertices, faces[sheet == label]) for label in range(int(sheet.max(initial=-1)) + 1)]
    extents = [float(np.linalg.norm(np.ptp(points, axis=0))) for points, _ in parts]
    outer: list[int] = []
    for label in np.argsort(-np.array(extents), kind="stable"):
        if not any(_mostly_inside(parts[label][0], *parts[other]) for other in outer):
            outer.append(int(label))
    return _compact(vertices, faces[np.isin(sheet, outer)])


def _solids(vertices: Vertices, faces: Faces) -> tuple[Vertices, Faces]:
    """The sheets repaired, without crumbs."""
    sheet = sheets(faces)
    area = np.bincount(sheet, np.linalg.norm(face_normals(vertices, faces), axis=1))
    solids: list[tuple[Vertices, Faces]] = []
    largest_first = np.argsort(-area, kind="stable")
    for label in largest_first[area[largest_first] >= CRUMB_FRACTION * area.max(initial=0)]:
        solid = _repaired_piece(*_compact(vertices, faces[sheet == label]))
        if len(solid[1]):
            solids.append(solid)
    if not solids:
        raise ValueError("nothing of the mesh encloses a volume")
    return _sheets_apart(*without_crumbs(*_joined(solids), CRUMB_FRACTION))


def _mostly_inside(points: Vertices, vertices: Vertices, faces: Faces) -> bool:
    """True if most of the points (n, 3) lie inside of a closed mesh."""
    some = points[np.linspace(0, len(points) - 1, INSIDE_SAMPLES).astype(int)]
    return abs(float(np.median([winding_number(point, vertices, faces) for point in some]))) > 0.5


def _joined(pieces: Sequence[tuple[Vertices, Faces]]) -> tuple[Vertices, Faces]:
    """Several meshes as one."""
    offsets = np.cumsum([0, *(len(points) for points, _ in pieces[:-1])])
    joined = np.concatenate([triangles + offset for (_, triangles), offset in zip(pieces, offsets, strict=True)])
    return np.concatenate([points for points, _ in pieces]).astype(np.float32), joined.astype(np.int32)


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
    used = np.zeros(len(vertices), bool)
    used[faces] = True
    return vertices[used].astype(np.float32), (np.cumsum(used) - 1)[faces].astype(np.int32)


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
