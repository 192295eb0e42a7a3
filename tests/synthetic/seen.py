"""View of a perfect sensor of a scene, and what a second eye or light by way of other surfaces changes.

Used by `sensors`, whose models start from it.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import trimesh
from numpy.typing import NDArray
from scipy import ndimage

from tasks.capture.camera import Camera
from tasks.geometry.render import Hits, RayScene

Map = NDArray[np.float32]
"""A value for each pixel, (h, w)."""

SHADOW_TOLERANCE = 0.005  # of the distance: a surface does not hide itself from the second eye


@dataclass(frozen=True)
class Seen:
    """View of a perfect sensor: the input of every sensor model.

    Pixels of `camera` that hit nothing are 0 in all maps (h, w): depth (metres along the axis), cosine (of the angle
    between the surface's normal and the ray), albedo (0..1, linear). normals: (f, 3) of the scene's faces.
    """

    camera: Camera
    scene: RayScene
    normals: NDArray[np.float64]
    depth: Map
    cosine: Map
    albedo: Map

    @property
    def angle(self) -> Map:
        """Angle of incidence, radians, 0 = face on."""
        return np.arccos(np.clip(self.cosine, 0, 1))


def seen(scene: RayScene, mesh: trimesh.Trimesh, camera: Camera) -> Seen:
    """Exact maps of a mesh and its scene, at a camera's pixel centres."""
    hits = scene.view(camera)
    rays = camera.rays()[hits.ray]
    cosine = _dot(-rays, _facing(mesh.face_normals[hits.face], rays)) / np.linalg.norm(rays, axis=1)
    depth, cosines, albedo = (
        _image(values, hits.ray, camera) for values in (hits.distance, cosine, _albedo(scene.colours(hits)))
    )
    return Seen(camera, scene, np.asarray(mesh.face_normals), depth, cosines, albedo)


def hidden_from(exact: Seen, baseline: float, *, in_view: bool = False) -> NDArray[np.bool_]:
    """Pixels whose surface a second eye, `baseline` metres to the camera's right, does not see, (h, w).

    in_view: nor those outside of its image, which is as large as the camera's.
    """
    camera = exact.camera
    eye = camera.centre + baseline * camera.camera_to_world[:3, 0]
    pixels = np.flatnonzero(exact.depth)
    towards = camera.centre + camera.rays()[pixels] * exact.depth.ravel()[pixels, None] - eye
    before = np.ones(len(pixels), np.float32)
    hits = exact.scene.cast(eye, towards)
    before[hits.ray] = hits.distance
    hidden = np.zeros(exact.depth.size, bool)
    hidden[pixels] = before < 1 - SHADOW_TOLERANCE
    result = hidden.reshape(exact.depth.shape)
    if in_view:
        column = np.arange(camera.width) - camera.fl_x * baseline / np.maximum(exact.depth, 1e-3)
        result |= (column < 0) & (exact.depth > 0)
    return result


def multipath(exact: Seen, period: float, bounces: int, rng: np.random.Generator, coarse: int = 8) -> Map:
    """How much further away surfaces seem for light that came by way of another one, metres along the ray, (h, w).

    One bounce, gathered by cosine-weighted rays at every `coarse`-th pixel. Each path is a phasor, as long as its light
    and turned once for every `period` (metres) by which it is longer there and back, halved; the sensor reads the angle
    of their sum.
    """
    camera, scene = exact.camera, exact.scene
    rows, columns = (np.arange(coarse // 2, size, coarse) for size in exact.depth.shape)
    rays = camera.rays().reshape(*exact.depth.shape, 3)[np.ix_(rows, columns)].reshape(-1, 3)
    places = scene.cast(camera.centre, rays)
    normals = _facing(exact.normals[places.face], rays[places.ray])
    _, near, direct = _lit(places, normals, camera)
    directions = _hemisphere(np.repeat(normals, bounces, axis=0), rng)
    others = scene.cast(np.repeat(places.points, bounces, axis=0) + 1e-3 * directions, directions)
    source, far, light = _lit(others, exact.normals[others.face], camera)
    check = scene.cast(camera.centre, source)
    reached = np.zeros(len(source), bool)
    reached[check.ray] = check.distance > 1 - SHADOW_TOLERANCE
    place = others.ray // bounces
    ratio = reached * _albedo(scene.colours(others)) * light / bounces / np.maximum(direct[place], 1e-2)
    extra = np.maximum(far + others.distance - near[place], 0) / 2
    count = len(places.ray)
    turned = 2 * np.pi * extra / period
    along, across = (np.bincount(place, ratio * part(turned), count) for part in (np.cos, np.sin))
    further = np.arctan2(across, 1 + along) * period / (2 * np.pi)
    values, weights = np.zeros((2, len(rays)), np.float32)
    values[places.ray], weights[places.ray] = further, 1
    shape = (len(rows), len(columns))
    value, weight = (ndimage.gaussian_filter(each.reshape(shape), 0.7) for each in (values, weights))
    position = [(np.arange(size) - coarse // 2) / coarse for size in exact.depth.shape]
    where = np.meshgrid(*position, indexing="ij")
    return ndimage.map_coordinates(value / np.maximum(weight, 1e-6), where, order=1, mode="nearest")


def _lit(hits: Hits, normals: NDArray[np.float64], camera: Camera) -> tuple[NDArray[np.float64], ...]:
    """Of places (m): vector from the camera (m, 3), distance (m,), and the camera's light there (m,)."""
    vector = hits.points - camera.centre
    distance = np.linalg.norm(vector, axis=1)
    return vector, distance, np.abs(_dot(normals, vector)) / distance**3


def _hemisphere(normals: NDArray[np.float64], rng: np.random.Generator) -> NDArray[np.float64]:
    """Unit vectors (m, 3) about normals (m, 3), as many towards each direction as its cosine."""
    vectors = rng.standard_normal(normals.shape)
    vectors = normals * 1.001 + vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


def _facing(normals: NDArray[np.float64], rays: NDArray[np.float64]) -> NDArray[np.float64]:
    """Normals (m, 3), turned against the rays (m, 3) that meet them."""
    return -np.sign(_dot(normals, rays))[:, None] * normals


def _dot(a: NDArray[np.float64], b: NDArray[np.float64]) -> NDArray[np.float64]:
    return np.einsum("md,md->m", a, b)


def _albedo(colours: NDArray[np.floating]) -> NDArray[np.floating]:
    """Linear reflectance (m,) of sRGB colours (m, 3) in 0..255; colour stands in for infrared."""
    return (colours.mean(axis=1) / 255) ** 2.2


def _image(values: NDArray[np.floating], ray: NDArray[np.int64], camera: Camera) -> Map:
    """Values (m,) of some pixels as a map (h, w), 0 elsewhere."""
    flat = np.zeros(camera.height * camera.width, np.float32)
    flat[ray] = values
    return flat.reshape(camera.height, camera.width)
