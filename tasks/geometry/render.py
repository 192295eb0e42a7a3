"""Ray-cast pictures and depth maps of meshes on the CPU, with embree and no system libraries; tasks.mesh calls it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import trimesh
from embreex.mesh_construction import TriangleMesh
from embreex.rtcore_scene import EmbreeScene
from numpy.typing import NDArray
from PIL import Image
from trimesh.visual.material import PBRMaterial
from trimesh.visual.texture import TextureVisuals

from tasks.capture.camera import Camera

# preview: a long lens, a little air around the bounding sphere, a light from the eye that never goes dark
PREVIEW_FOV_DEG = 28.0
PREVIEW_MARGIN = 1.04
PREVIEW_SUPERSAMPLE = 2
PREVIEW_BACKGROUND = (242, 242, 240)
PREVIEW_AMBIENT = 0.6


@dataclass(frozen=True)
class Rendering:
    """A picture of a mesh; all of it is 0 in pixels without the mesh."""

    image: NDArray[np.uint8]
    """(h, w, 3) sRGB"""
    mask: NDArray[np.bool_]
    """(h, w), True for pixels of the mesh"""
    depth: NDArray[np.float32]
    """(h, w) metres along the camera's axis"""


@dataclass(frozen=True)
class Hits:
    """First hits of the rays that hit something, m of them."""

    ray: NDArray[np.int64]
    """(m,) index of the ray"""
    face: NDArray[np.int64]
    """(m,) index of the triangle"""
    barycentric: NDArray[np.float32]
    """(m, 3) weights of the triangle's corners"""
    distance: NDArray[np.float32]
    """(m,) in lengths of the ray's direction"""
    points: NDArray[np.float64]
    """(m, 3) in the mesh's frame"""


Colours = Callable[[Hits], NDArray[np.float32]]
"""Colours (m, 3) float32 in 0..255 sRGB of the places that were hit."""


class RayScene:
    """A mesh made ready for ray casting: built once, used for any number of cameras.

    `colours` replaces the mesh's own texture or colours, e.g. by a function of position.
    """

    def __init__(self, mesh: trimesh.Trimesh, colours: Colours | None = None) -> None:
        self.colours = colours or mesh_colours(mesh)
        # embree computes in float32: a centred scene of unit size keeps all of its digits
        self._middle = mesh.bounds.mean(axis=0)
        self._scale = 1.0 / mesh.scale
        self._embree = EmbreeScene(robust=True)
        TriangleMesh(
            self._embree,
            ((mesh.vertices - self._middle) * self._scale).astype(np.float32),
            np.ascontiguousarray(mesh.faces, dtype=np.int32),
        )

    def cast(self, origin: NDArray[np.floating], directions: NDArray[np.floating]) -> Hits:
        """First hits of rays from `origin` ((3,) or (n, 3)) along `directions` (n, 3) of any length."""
        origins = np.empty(directions.shape, np.float32)
        origins[:] = (origin - self._middle) * self._scale
        found = self._embree.run(origins, (directions * self._scale).astype(np.float32), output=True)
        ray = np.flatnonzero(found["primID"] >= 0)
        u, v, distance = found["u"][ray], found["v"][ray], found["tfar"][ray]
        start = origin if origin.ndim == 1 else origin[ray]
        return Hits(
            ray=ray,
            face=found["primID"][ray].astype(np.int64),
            barycentric=np.column_stack([1 - u - v, u, v]),
            distance=distance,
            points=start + directions[ray] * distance[:, None].astype(np.float64),
        )

    def view(self, camera: Camera) -> Hits:
        """First hits of the rays through every pixel centre; their distance is the depth along the camera's axis."""
        return self.cast(camera.centre, camera.rays())


def render(mesh: trimesh.Trimesh | RayScene, camera: Camera, *, supersample: int = 1) -> Rendering:
    """The mesh, unlit, as `camera` sees it; its frame is the camera's world.

    Mask and depth are taken at pixel centres. With `supersample` > 1 the colour is the mean over the centre and
    supersample x supersample places of the pixel, background left out (straight, not premultiplied, colour).
    """
    scene = _scene(mesh)
    hits = scene.view(camera)
    depth = _depth(hits, camera)
    colour, count = _accumulate(scene.colours(hits), hits, camera, 1)
    if supersample > 1:
        finer = camera.resized(camera.width * supersample, camera.height * supersample)
        hits = scene.view(finer)
        more_colour, more_count = _accumulate(scene.colours(hits), hits, camera, supersample)
        colour, count = colour + more_colour, count + more_count
    mask = depth > 0
    image = np.where(mask[..., None], colour / np.maximum(count, 1), 0)
    return Rendering(np.rint(image).astype(np.uint8), mask, depth)


def depth_map(mesh: trimesh.Trimesh | RayScene, camera: Camera) -> NDArray[np.float32]:
    """Depth of the mesh along the camera's axis at pixel centres, (h, w) float32 metres, 0 = nothing."""
    return _depth(_scene(mesh).view(camera), camera)


def preview(mesh: trimesh.Trimesh, *, azimuth_deg: float, elevation_deg: float, size: int = 512) -> NDArray[np.uint8]:
    """A shaded picture of a whole y-up mesh on a light background, (size, size, 3) uint8 sRGB.

    Azimuth 0 looks at the front (from +z, as glTF has it) and grows towards +x; elevation grows towards +y.
    """
    scene = RayScene(mesh)
    camera = _preview_camera(mesh, azimuth_deg, elevation_deg, size)
    finer = camera.resized(size * PREVIEW_SUPERSAMPLE, size * PREVIEW_SUPERSAMPLE)
    hits = scene.view(finer)
    light = PREVIEW_AMBIENT + (1 - PREVIEW_AMBIENT) * _facing(mesh, hits, camera.centre)
    colour, count = _accumulate(scene.colours(hits) * light[:, None], hits, camera, PREVIEW_SUPERSAMPLE)
    samples = PREVIEW_SUPERSAMPLE**2
    background = np.array(PREVIEW_BACKGROUND, np.float32)
    return np.rint((colour + (samples - count) * background) / samples).astype(np.uint8)


def mesh_colours(mesh: trimesh.Trimesh) -> Colours:
    """The mesh's own colours: its base-colour texture (bilinear, repeating), else its vertex or face colours."""
    visual: Any = mesh.visual
    if isinstance(visual, TextureVisuals) and visual.uv is not None:
        texels = _texels(visual)
        corner_uv = np.asarray(visual.uv, np.float64)[mesh.faces]
        return lambda hits: sample_texture(texels, np.einsum("mc,mcd->md", hits.barycentric, corner_uv[hits.face]))
    if isinstance(visual, TextureVisuals):
        visual = visual.to_color()
    if visual.kind == "face":
        face_colours = np.asarray(visual.face_colors[:, :3], np.float32)
        return lambda hits: face_colours[hits.face]
    corner_colours = np.asarray(visual.vertex_colors[:, :3], np.float32)[mesh.faces]
    return lambda hits: np.einsum("mc,mcd->md", hits.barycentric, corner_colours[hits.face])


def sample_texture(texels: NDArray[np.float32], uv: NDArray[np.floating]) -> NDArray[np.float32]:
    """Bilinear samples (m, 3) of texels (h, w, 3) at uv (m, 2): v up, repeating, texel centres at half-integers.

    trimesh keeps uv with v up: glTF's v is down and is flipped on loading and saving.
    """
    height, width = texels.shape[:2]
    x = uv[:, 0] * width - 0.5
    y = (1 - uv[:, 1]) * height - 0.5
    column, row = np.floor(x).astype(np.int64), np.floor(y).astype(np.int64)
    right, below = (x - column).astype(np.float32)[:, None], (y - row).astype(np.float32)[:, None]
    left_column, right_column = column % width, (column + 1) % width
    flat = texels.reshape(-1, 3)
    upper_row, lower_row = row % height * width, (row + 1) % height * width
    upper = flat[upper_row + left_column] * (1 - right) + flat[upper_row + right_column] * right
    lower = flat[lower_row + left_column] * (1 - right) + flat[lower_row + right_column] * right
    return upper * (1 - below) + lower * below


def _scene(mesh: trimesh.Trimesh | RayScene) -> RayScene:
    return mesh if isinstance(mesh, RayScene) else RayScene(mesh)


def _depth(hits: Hits, camera: Camera) -> NDArray[np.float32]:
    depth = np.zeros(camera.height * camera.width, np.float32)
    depth[hits.ray] = hits.distance
    return depth.reshape(camera.height, camera.width)


def _texels(visual: TextureVisuals) -> NDArray[np.float32]:
    """Base-colour texture of a material, (h, w, 3) float32 in 0..255; one texel of plain colour if it has none."""
    material: Any = visual.material
    pbr = isinstance(material, PBRMaterial)
    image: Image.Image | None = material.baseColorTexture if pbr else material.image
    if image is None:
        return np.asarray(material.main_color[:3], np.float32).reshape(1, 1, 3)
    texels = np.array(image.convert("RGB"), np.float32)
    # a simple material's diffuse is left alone: trimesh's default of 0.4 is not meant as a factor
    if pbr and material.baseColorFactor is not None:
        factor = np.asarray(material.baseColorFactor[:3], np.float32) / 255
        if (factor < 1).any():  # glTF multiplies in linear light; a power of 2.2 is near enough to sRGB's curve
            texels *= (factor ** (1 / 2.2)).astype(np.float32)
    return texels


def _accumulate(
    colours: NDArray[np.float32], hits: Hits, camera: Camera, finer: int
) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Per pixel of `camera` the sum (h, w, 3) and number (h, w, 1) of the samples that hit, of a `finer` grid."""
    samples = np.zeros((camera.height * finer * camera.width * finer, 4), np.float32)
    samples[hits.ray, :3] = colours
    samples[hits.ray, 3] = 1
    summed = samples.reshape(camera.height, finer, camera.width, finer, 4).sum(axis=(1, 3))
    return summed[..., :3], summed[..., 3:]


def _preview_camera(mesh: trimesh.Trimesh, azimuth_deg: float, elevation_deg: float, size: int) -> Camera:
    """A camera that looks at the middle of a y-up mesh and just holds its bounding sphere."""
    azimuth, elevation = np.radians([azimuth_deg, elevation_deg])
    right = np.array([np.cos(azimuth), 0.0, -np.sin(azimuth)])
    back = np.array(
        [np.cos(elevation) * np.sin(azimuth), np.sin(elevation), np.cos(elevation) * np.cos(azimuth)],
    )
    middle = mesh.bounds.mean(axis=0)
    radius = PREVIEW_MARGIN * float(np.linalg.norm(mesh.vertices - middle, axis=1).max())
    half_fov = np.radians(PREVIEW_FOV_DEG / 2)
    pose = np.eye(4)
    pose[:3, :3] = np.column_stack([right, np.cross(back, right), back])
    pose[:3, 3] = middle + back * radius / np.sin(half_fov)
    focal = size / 2 / np.tan(half_fov)
    return Camera(size, size, focal, focal, size / 2, size / 2, pose)


def _facing(mesh: trimesh.Trimesh, hits: Hits, eye: NDArray[np.float64]) -> NDArray[np.float32]:
    """Cosine, (m,) in 0..1, between the smooth surface's normal and the direction to the eye, at each hit."""
    welded = trimesh.Trimesh(mesh.vertices, mesh.faces, process=False)
    welded.merge_vertices()  # vertices split at texture seams would shade as creases
    corners = welded.vertex_normals.astype(np.float32)[welded.faces]
    normals = np.einsum("mc,mcd->md", hits.barycentric, corners[hits.face])
    towards = (eye - hits.points).astype(np.float32)
    lengths = np.linalg.norm(normals, axis=1) * np.linalg.norm(towards, axis=1)
    return np.abs(np.einsum("md,md->m", normals, towards)) / np.maximum(lengths, np.finfo(np.float32).tiny)
