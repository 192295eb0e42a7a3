"""Texture of a mesh: its surface unwrapped into charts, their texels painted from views, gaussians or vertex colours.

tasks.mesh.export calls `unwrap` and `bake`.
"""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace

import numpy as np
import trimesh
import xatlas
from numpy.typing import NDArray
from scipy import ndimage
from scipy.spatial import cKDTree

from tasks.capture.camera import Camera
from tasks.capture.views import View
from tasks.geometry.exposure import solved_gains, to_linear, to_srgb
from tasks.geometry.gaussians import Gaussians, SplatCompositor
from tasks.geometry.mesh_repair import face_normals, unit_sums
from tasks.geometry.render import RayScene, depth_map

THREADS = 2
# xatlas splits meshes of a small area (below about 1) into very many charts: they are scaled to this area for it
UNWRAP_AREA = 1000.0
# Charts grow to this share of the surface: larger ones cost seconds to flatten and gain nothing
CHART_SHARE = 0.1
CHART_COST = 1.0  # limit for the growth of charts; xatlas' default of 2 takes twice as long for no gain
CHART_PADDING = 2  # texels between charts: bilinear sampling of one never reaches another
# Texels painted at once: bounds memory, and is too few for OpenBLAS to start threads of its own in each of ours
CHUNK_TEXELS = 25_600

MIN_COSINE = 0.1  # views flatter than this on the surface do not paint it
ANGLE_POWER = 8  # weight of a view: its cosine to this power; sharper keeps detail, softer hides seams
EDGE_PIXELS = 5.0  # within this distance of a silhouette a view's weight falls to 0
DEPTH_TOLERANCE = 2.0  # pixel footprints along the ray that a surface may lie behind the depth buffer and be seen
STRAY_COLOUR = 40.0  # grey levels that a view may differ by from the others on one place
GAIN_SAMPLES = 4000  # places that the exposures are compared at
SAME_EXPOSURE = 0.005  # logarithm of gains below which nothing is changed
NEAREST_SEEN = 8  # seen texels that give an unseen one its colour
OPAQUE = 0.5  # of a texel's opacity; gaussians that let more than this through do not show the surface there
# Vertices of the dense mesh that give a texel its colour, by the inverse distance to this power: as near to its
# interpolated colours as an exact search is, in a third of the time
NEAREST_VERTICES = 4
VERTEX_SHARPNESS = 2


@dataclass(frozen=True)
class Unwrapped:
    """A mesh cut along the seams of its charts."""

    vertices: NDArray[np.float32]
    """(n, 3), in the frame and unit of the mesh that was unwrapped"""
    faces: NDArray[np.int32]
    """(m, 3), in the order of the mesh that was unwrapped"""
    uv: NDArray[np.float32]
    """(n, 2) in 0..1, v upwards as trimesh keeps it: v = 1 is the texture's first row"""
    source: NDArray[np.int32]
    """(n,), for each vertex the one of the unwrapped mesh that it is a copy of"""


@dataclass(frozen=True)
class VertexColours:
    """Colours of a dense mesh at its vertices."""

    positions: NDArray[np.float32]
    """(n, 3), in the frame of the mesh that is painted"""
    colours: NDArray[np.float32]
    """(n, 3) sRGB in 0..1"""


@dataclass(frozen=True)
class _Texels:
    """The texels that the charts cover, k of them: flat index in the texture, position and unit normal (k, 3)."""

    index: NDArray[np.int64]
    position: NDArray[np.float32]
    normal: NDArray[np.float32]


@dataclass(frozen=True)
class _Photo:
    """A view ready for painting: colours (h * w, 3), the mesh's depth (h * w,) in metres, and the trust in each pixel,
    0 at the edges of the object and the mesh, 1 away from them."""

    camera: Camera
    colours: NDArray[np.uint8]
    depth: NDArray[np.float32]
    trust: NDArray[np.float32]


def unwrap(vertices: NDArray[np.floating], faces: NDArray[np.integer], texture_px: int) -> Unwrapped:
    """Charts of a mesh (n, 3), (m, 3), packed into a square texture of `texture_px` (https://github.com/jpcy/xatlas)."""
    atlas = xatlas.Atlas()
    area = float(np.linalg.norm(face_normals(vertices, faces), axis=1).sum() / 2)
    scaled = vertices * np.sqrt(UNWRAP_AREA / area)
    atlas.add_mesh(np.ascontiguousarray(scaled, np.float32), np.ascontiguousarray(faces, np.uint32))
    charts = xatlas.ChartOptions()
    charts.max_chart_area = CHART_SHARE * UNWRAP_AREA
    charts.max_cost = CHART_COST
    packing = xatlas.PackOptions()
    packing.resolution = texture_px
    packing.padding = CHART_PADDING
    packing.bilinear = True
    atlas.generate(charts, packing)
    source, corners, uv = atlas[0]
    flipped = np.column_stack([uv[:, 0], 1 - uv[:, 1]])
    return Unwrapped(
        np.asarray(vertices, np.float32)[source],
        corners.astype(np.int32),
        flipped.astype(np.float32),
        source.astype(np.int32),
    )


def bake(
    unwrapped: Unwrapped,
    views: Sequence[View],
    texture_px: int,
    vertex_colours: VertexColours | None = None,
    gaussians: Gaussians | None = None,
) -> tuple[NDArray[np.uint8], float | None]:
    """Paints the texture: (px, px, 3) uint8 sRGB, and the share of its texels that a view saw, None without views.

    The views need cameras; they and the gaussians are in the mesh's frame. A texel takes the mean of the views that see
    it, weighted by angle and distance. If no view sees it, it takes the colour that the gaussians show there, then the
    dense mesh's, then that of the nearest texels that have one. Space between charts repeats their edges. Raises
    ValueError if there are neither views nor colours.
    """
    if not views and vertex_colours is None and gaussians is None:
        raise ValueError("a texture needs views, gaussians or vertex colours")
    texels = _texels(unwrapped, texture_px)
    colours, seen = _from_views(texels, unwrapped, views)
    known = seen.copy()
    if gaussians is not None:
        unseen = np.flatnonzero(~seen)
        shown, opacity = SplatCompositor(gaussians).colours(texels.position[unseen], texels.normal[unseen])
        colours[unseen] = 255 * shown
        known[unseen] = opacity > OPAQUE
    if vertex_colours is not None:
        dense = (vertex_colours.positions, 255 * vertex_colours.colours)
        colours[~known] = _from_nearest(texels.position[~known], *dense, NEAREST_VERTICES, VERTEX_SHARPNESS)
    elif known.any():
        colours[~known] = _from_nearest(texels.position[~known], texels.position[known], colours[known], NEAREST_SEEN)
    texture = np.zeros((texture_px * texture_px, 3), np.float32)
    texture[texels.index] = colours
    covered = np.zeros(texture_px * texture_px, bool)
    covered[texels.index] = True
    image = _bled(texture.reshape(texture_px, texture_px, 3), covered.reshape(texture_px, texture_px))
    return np.rint(image).clip(0, 255).astype(np.uint8), float(seen.mean()) if views else None


def _from_views(
    texels: _Texels, unwrapped: Unwrapped, views: Sequence[View]
) -> tuple[NDArray[np.float32], NDArray[np.bool_]]:
    """Colours (k, 3) in 0..255 that the views give to the texels, and which of them any view sees, (k,)."""
    scene = RayScene(trimesh.Trimesh(unwrapped.vertices, unwrapped.faces, process=False))
    starts = range(0, len(texels.index), CHUNK_TEXELS)
    with ThreadPoolExecutor(THREADS) as pool:
        photos = list(pool.map(lambda view: _photo(view, scene), views))
        photos = _with_gains(photos, texels) if len(photos) > 1 else photos
        if not photos:
            return np.zeros((len(texels.index), 3), np.float32), np.zeros(len(texels.index), bool)
        chunks = pool.map(lambda start: _painted(texels, slice(start, start + CHUNK_TEXELS), photos), starts)
        painted = np.concatenate(list(chunks))
    return painted[:, :3] / np.maximum(painted[:, 3:], np.finfo(np.float32).tiny), painted[:, 3] > 0


def _texels(unwrapped: Unwrapped, texture_px: int) -> _Texels:
    """The surface at the texels' centres, found with rays straight down onto the unwrapped charts."""
    flat = trimesh.Trimesh(np.column_stack([unwrapped.uv, np.zeros(len(unwrapped.uv))]), unwrapped.faces, process=False)
    axis = (np.arange(texture_px) + 0.5) / texture_px
    u, v = np.meshgrid(axis, 1 - axis)
    above = np.column_stack([u.ravel(), v.ravel(), np.ones(u.size)])
    hits = RayScene(flat).cast(above, np.broadcast_to([0.0, 0.0, -1.0], above.shape))
    corners = unwrapped.faces[hits.face]
    position = np.einsum("kc,kcd->kd", hits.barycentric, unwrapped.vertices[corners])
    normal = np.einsum("kc,kcd->kd", hits.barycentric, vertex_normals(unwrapped)[corners])
    normal /= np.maximum(np.linalg.norm(normal, axis=1, keepdims=True), np.finfo(np.float32).tiny)
    return _Texels(hits.ray, position.astype(np.float32), normal.astype(np.float32))


def vertex_normals(unwrapped: Unwrapped) -> NDArray[np.float32]:
    """Smooth normals, (n, 3), the same on both sides of a seam."""
    normals = face_normals(unwrapped.vertices, unwrapped.faces)
    smooth = unit_sums(normals, unwrapped.source[unwrapped.faces], int(unwrapped.source.max()) + 1)
    return smooth[unwrapped.source].astype(np.float32)


def _photo(view: View, scene: RayScene) -> _Photo:
    assert view.camera is not None
    camera = view.camera
    depth = depth_map(scene, camera)
    footprint = depth / camera.fl_x
    # a step to the background or to a surface behind: more than any slope that is painted at all
    step = ndimage.maximum_filter(depth, 3) - ndimage.minimum_filter(depth, 3) > 2 * footprint / MIN_COSINE
    inner = view.mask & (depth > 0) & ~step
    inner[[0, -1]] = inner[:, [0, -1]] = False
    trust = np.minimum(ndimage.distance_transform_edt(inner) / EDGE_PIXELS, 1)
    return _Photo(camera, view.image.reshape(-1, 3), depth.reshape(-1), trust.reshape(-1).astype(np.float32))


def _painted(texels: _Texels, part: slice, photos: Sequence[_Photo]) -> NDArray[np.float32]:
    """Weighted sums of the colours that the photos give to some texels, and of the weights, (k, 4).

    Colours that stray from what the other photos give (a highlight, a moving shadow) are left out.
    """
    colours, weights = _given(texels.position[part], texels.normal[part], photos)
    weights *= _agree(colours, weights)
    sums = (weights[..., None] * colours).sum(axis=0)
    return np.column_stack([sums, weights.sum(axis=0)])


def _given(
    position: NDArray[np.float32], normal: NDArray[np.float32], photos: Sequence[_Photo]
) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Colours (v, k, 3) that v photos give to k places of the surface, and their weights (v, k), 0 = not seen."""
    colours = np.zeros((len(photos), len(position), 3), np.float32)
    weights = np.zeros((len(photos), len(position)), np.float32)
    for number, photo in enumerate(photos):
        towards = photo.camera.centre.astype(np.float32) - position
        distance = np.sqrt(np.einsum("kd,kd->k", towards, towards))
        cosine = np.einsum("kd,kd->k", towards, normal) / distance
        facing = np.flatnonzero(cosine > MIN_COSINE)
        pixels, z = photo.camera.project(position[facing])
        pixel, in_image = _pixel(photo.camera, pixels, z)
        tolerance = DEPTH_TOLERANCE * z / np.float32(photo.camera.fl_x) / cosine[facing]
        visible = in_image & (photo.trust[pixel] > 0) & (z - photo.depth[pixel] < tolerance)
        facing, pixels, pixel = facing[visible], pixels[visible], pixel[visible]
        weights[number, facing] = cosine[facing] ** ANGLE_POWER * photo.trust[pixel] / distance[facing] ** 2
        colours[number, facing] = _sampled(photo, pixels)
    return colours, weights


def _agree(colours: NDArray[np.float32], weights: NDArray[np.float32]) -> NDArray[np.float32]:
    """1 for colours (v, k, 3) near the weighted median of their place, 0 for those that stray, (v, k)."""
    grey, seen = colours.mean(axis=2), weights > 0
    agree = np.ones_like(weights)
    spread = np.where(seen, grey, -np.inf).max(axis=0) - np.where(seen, grey, np.inf).min(axis=0)
    doubtful = np.flatnonzero(spread > STRAY_COLOUR)
    if not len(doubtful):
        return agree
    grey, weights = grey[:, doubtful], weights[:, doubtful]
    order = np.argsort(np.where(seen[:, doubtful], grey, np.inf), axis=0)
    reached = np.cumsum(np.take_along_axis(weights, order, axis=0), axis=0)
    middle = np.argmax(reached >= reached[-1] / 2, axis=0)
    median = np.take_along_axis(np.take_along_axis(grey, order, axis=0), middle[None], axis=0)[0]
    agree[:, doubtful] = np.abs(grey - median) < STRAY_COLOUR
    return agree


def _with_gains(photos: Sequence[_Photo], texels: _Texels) -> list[_Photo]:
    """The photos with their exposures made to agree, as far as they see the same surface."""
    some = np.linspace(0, len(texels.index) - 1, min(GAIN_SAMPLES, len(texels.index))).astype(int)
    colours, weights = _given(texels.position[some], texels.normal[some], photos)
    gains = solved_gains(colours.transpose(1, 0, 2).astype(np.float64), weights.T.astype(np.float64))
    if np.abs(np.log(gains)).max() < SAME_EXPOSURE:
        return list(photos)
    levels = to_linear(np.arange(256.0))
    tables = [to_srgb(levels[:, None] * gain).astype(np.float32) for gain in gains]
    corrected = [
        np.stack([table[photo.colours[:, channel], channel] for channel in range(3)], axis=1)
        for photo, table in zip(photos, tables, strict=True)
    ]
    return [replace(photo, colours=values) for photo, values in zip(photos, corrected, strict=True)]


def _pixel(
    camera: Camera, pixels: NDArray[np.floating], z: NDArray[np.floating]
) -> tuple[NDArray[np.intp], NDArray[np.bool_]]:
    """Flat index of the pixel at each position, and True if that lies in the image."""
    in_image = (z > 0) & ((pixels >= 0) & (pixels < (camera.width, camera.height))).all(axis=1)
    column, row = np.where(in_image[:, None], pixels, 0).astype(np.intp).T
    return row * camera.width + column, in_image


def _sampled(photo: _Photo, pixels: NDArray[np.floating]) -> NDArray[np.float32]:
    """Bilinear colours (k, 3) at positions (k, 2) with a pixel on every side."""
    corner = np.floor(pixels - 0.5)
    right, below = (pixels - 0.5 - corner).astype(np.float32).T[..., None]
    column, row = corner.astype(np.intp).T
    first = row * photo.camera.width + column
    upper = photo.colours[first] * (1 - right) + photo.colours[first + 1] * right
    first += photo.camera.width
    lower = photo.colours[first] * (1 - right) + photo.colours[first + 1] * right
    return np.asarray(upper * (1 - below) + lower * below, np.float32)


def _from_nearest(
    positions: NDArray[np.float32], known: NDArray[np.float32], colours: NDArray[np.float32], most: int, power: int = 1
) -> NDArray[np.float32]:
    """Colours for positions (k, 3): the nearest known ones, weighted by inverse distance to a power."""
    count = min(most, len(known))
    distance, nearest = cKDTree(known).query(positions, k=range(1, count + 1), workers=THREADS)
    weight = 1 / np.maximum(distance, np.finfo(np.float32).eps) ** power
    mixed = (colours[nearest] * weight[..., None]).sum(axis=1) / weight.sum(axis=1, keepdims=True)
    return np.asarray(mixed, np.float32)


def _bled(texture: NDArray[np.float32], covered: NDArray[np.bool_]) -> NDArray[np.float32]:
    """Every texel outside the charts takes the colour of the nearest one inside: seams never sample background."""
    nearest = ndimage.distance_transform_edt(~covered, return_distances=False, return_indices=True)
    return np.asarray(texture[tuple(nearest)])
