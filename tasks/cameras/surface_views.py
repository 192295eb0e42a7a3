"""Views as surfaces with normals, colours and outlines, in their cameras' axes. All that finds or refines uses them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from scipy import ndimage

from tasks.cameras.conflict import GL_TO_PINHOLE, Witness
from tasks.capture.camera import Camera
from tasks.capture.masks import resample
from tasks.capture.views import View
from tasks.geometry.depth import cut_out, tangent_planes
from tasks.geometry.depth_noise import DepthNoise, measured_noise

Floats = NDArray[np.float64]
Map = NDArray[np.float32]

# Sides of the maps; larger depth maps are thinned. Many views are small: of 200, the maps would take 3 GB
LONGEST_PX, FEW_VIEWS, LONGEST_PX_OF_MANY = 640, 60, 320
SAMPLE = 2000  # readings with a plane, in random order
BLUR_PX = 1.5  # sigma: colours are compared where a pose is a little wrong
COARSE_BLUR_PX, COARSE_STEP = 6.0, 4  # where it is more wrong
OUTLINE_BLUR_PX = 1.0  # the slope of a distance to pixels is rough
TYPICAL_FIELD = 1.2  # focal length in widths of the image, where none is known: that of a phone
EXTREMES = (2.0, 98.0)  # percentiles that bound a view's points


@dataclass(frozen=True, eq=False)
class Paint:
    """Blurred colours of the object, without the background's."""

    levels: Map
    """(rows, columns, 3) sRGB"""
    step: int
    """Pixels of the view between two of them"""

    def at(self, position: NDArray[np.floating]) -> tuple[Floats, Map, Map]:
        """Colours (k, 3) at positions (k, 2) in the view's pixels, and their change along x and along y."""
        height, width = self.levels.shape[:2]
        place = position / self.step
        column, row = place.clip(1, [width - 2, height - 2]).astype(np.intp).T
        levels, at = self.levels.reshape(-1, 3), row * width + column
        along_x, along_y = (
            (levels.take(at + next_one, axis=0) - levels.take(at - next_one, axis=0)) / np.float32(2 * self.step)
            for next_one in (1, width)
        )
        offset = (place - np.column_stack([column, row]) - 0.5) * self.step
        return levels.take(at, axis=0) + along_x * offset[:, :1] + along_y * offset[:, 1:], along_x, along_y


@dataclass(frozen=True, eq=False)
class SurfaceView:
    """A view's surface at the depth map's size, in the pinhole axes of its camera (x right, y down, z ahead).

    `zoom`, here and below, is the factor of the focal length that `camera` has.
    """

    name: str
    """The view's name"""
    camera: Camera
    """Of the maps' size, without distortion; its pose is that of the pinhole axes"""
    witness: Witness
    """The same view, as its depth is compared with others"""
    noise: float
    """Standard deviation of a reading at the object, metres"""
    footprint: float
    """Size of a pixel at the object, metres"""
    depth: Map
    """(h, w) metres, smoothed; 0 = no plane"""
    normals: Map
    """(h, w, 3) unit normals towards the camera; 0 = no plane"""
    paint: tuple[Paint, Paint]
    """The object's colours, sharp and blurred"""
    texture: Map
    """(h, w) grey levels less those of the surroundings: what exposure and light do not change"""
    outline: Map
    """(h, w) distance to the object's silhouette, pixels, positive outside"""
    rows: NDArray[np.intp]
    """(n,) of a random sample of readings with a plane"""
    columns: NDArray[np.intp]
    """(n,)"""
    sample_paint: tuple[Floats, Floats]
    """(n, 3) the sample's colours, sharp and blurred, sRGB levels"""
    witness_colours: Map
    """(k, 3) sRGB levels at the witness's readings"""
    witness_normals: Map
    """(k, 3) unit normals there; 0 = no plane"""
    witness_texture: Map
    """(k,) texture there"""

    def points(self, zoom: float = 1.0, count: int = SAMPLE) -> Floats:
        """The sample's points (count, 3), metres."""
        return lifted(
            self.camera,
            self.columns[:count] + 0.5,
            self.rows[:count] + 0.5,
            self.depth[self.rows[:count], self.columns[:count]],
            zoom,
        )

    def sample_normals(self, zoom: float = 1.0, count: int = SAMPLE) -> Floats:
        """The normals (count, 3) of the sample's points."""
        return zoomed_normals(self.normals[self.rows[:count], self.columns[:count]], zoom)

    def zoomed_camera(self, zoom: float) -> Camera:
        """The camera with another focal length."""
        return replace(self.camera, fl_x=self.camera.fl_x * zoom, fl_y=self.camera.fl_y * zoom)


def lifted(
    camera: Camera,
    x: NDArray[np.floating],
    y: NDArray[np.floating],
    depth: NDArray[np.floating],
    zoom: float = 1.0,
) -> Floats:
    """Points (n, 3) in a camera's pinhole axes, metres, of depth readings (n,) at pixel positions."""
    z = np.asarray(depth, np.float64)
    return np.column_stack([(x - camera.cx) / (camera.fl_x * zoom) * z, (y - camera.cy) / (camera.fl_y * zoom) * z, z])


def zoomed_normals(normals: NDArray[np.floating], zoom: float) -> Floats:
    """Normals (n, 3) of the same depth map under another focal length; 0 stays 0."""
    turned = normals * np.array([zoom, zoom, 1.0])
    length = np.linalg.norm(turned, axis=1, keepdims=True)
    return np.divide(turned, length, out=np.zeros_like(turned), where=length > 0)


def surface_views(views: Sequence[View], sensor: DepthNoise | None = None) -> list[SurfaceView]:
    """The surfaces of views with depth. A view without a camera gets a typical focal length, and the middle as centre.

    sensor: the noise of all depth maps, measured here if it is not given. Raises ValueError if a view has no depth or
    an empty mask.
    """
    depths = [view.depth for view in views if view.depth is not None]
    if len(depths) < len(views):
        raise ValueError("a view without depth has no surface")
    sensor = sensor or measured_noise(depths)
    longest = LONGEST_PX if len(views) <= FEW_VIEWS else LONGEST_PX_OF_MANY
    return [_surface(view, sensor, longest) for view in views]


def object_size(surfaces: Sequence[SurfaceView], zoom: float = 1.0) -> float:
    """Diagonal of what a view shows, typically, metres."""
    extents = [np.ptp(np.percentile(surface.points(zoom), EXTREMES, axis=0), axis=0) for surface in surfaces]
    return float(np.median([np.linalg.norm(extent) for extent in extents]))


def merged(
    surfaces: Sequence[SurfaceView], poses: Sequence[Floats] | Floats, zoom: float, count: int
) -> tuple[Floats, Floats]:
    """Points, metres, and normals (k, 3) of all views, `count` of each. poses: (n, 4, 4) camera-to-world, pinhole."""
    pairs = list(zip(surfaces, poses, strict=True))
    points = [surface.points(zoom, count) @ pose[:3, :3].T + pose[:3, 3] for surface, pose in pairs]
    normals = [surface.sample_normals(zoom, count) @ pose[:3, :3].T for surface, pose in pairs]
    return np.concatenate(points), np.concatenate(normals)


def intrinsics(view: View) -> Camera:
    """The camera of a view in pinhole axes: its own without its pose, else a typical one."""
    height, width = view.image.shape[:2]
    if view.camera is not None:
        return replace(view.camera, camera_to_world=GL_TO_PINHOLE)
    focal = TYPICAL_FIELD * max(width, height)
    return Camera(width, height, focal, focal, width / 2, height / 2, GL_TO_PINHOLE)


def _surface(view: View, sensor: DepthNoise, longest: int) -> SurfaceView:
    view = _working_size(replace(view, camera=intrinsics(view)), longest)
    assert view.depth is not None and view.camera is not None
    camera, (height, width) = view.camera, view.depth.shape
    depth_map = cut_out(view)
    if depth_map is None or not depth_map.depth.any():
        raise ValueError(f"view {view.name} has no depth of the object")
    planes = tangent_planes(depth_map, sensor)
    depth, normals = np.zeros((height, width), np.float32), np.zeros((height, width, 3), np.float32)
    shape = depth_map.depth.shape
    part = np.s_[
        depth_map.corner[0] : depth_map.corner[0] + shape[0], depth_map.corner[1] : depth_map.corner[1] + shape[1]
    ]
    depth[part], normals[part] = planes.depth.reshape(shape), planes.plane[:, :3].reshape(*shape, 3)
    paint = (_paint(view, BLUR_PX, 1), _paint(view, COARSE_BLUR_PX, COARSE_STEP))
    texture = _texture(view, paint[0])
    rows, columns = np.nonzero(depth)
    chosen = np.random.default_rng(1).permutation(len(rows))[:SAMPLE]
    witness = Witness.of(view, sensor)
    sampled = np.column_stack([columns[chosen], rows[chosen]]) + 0.5
    at = witness.pixels.astype(np.intp)
    return SurfaceView(
        view.name,
        camera,
        witness,
        float(sensor.at(depth_map.distance)),
        depth_map.footprint,
        depth,
        normals,
        paint,
        texture,
        _outline(view.mask),
        rows[chosen],
        columns[chosen],
        (paint[0].at(sampled)[0], paint[1].at(sampled)[0]),
        paint[0].levels[at[:, 1], at[:, 0]],
        normals[at[:, 1], at[:, 0]],
        texture[at[:, 1], at[:, 0]],
    )


def _working_size(view: View, longest: int) -> View:
    """The view with image, mask and depth of one size, `longest` pixels at most, and without distortion."""
    assert view.depth is not None and view.camera is not None
    rows, columns = view.depth.shape
    scale = min(1.0, longest / max(rows, columns))
    width, height = round(columns * scale), round(rows * scale)
    image = view.image
    if image.shape[:2] != (height, width):
        image = np.asarray(Image.fromarray(image).resize((width, height), Image.Resampling.BOX))
    small = replace(
        view,
        image=image,
        mask=resample(view.mask, width, height),
        depth=resample(view.depth, width, height),
        camera=view.camera.resized(width, height),
    )
    return _undistorted(small) if any(view.camera.distortion) else small


def _undistorted(view: View) -> View:
    """The view as a camera without distortion sees it; each pixel takes the nearest one of the original."""
    assert view.depth is not None and view.camera is not None
    straight = replace(view.camera, distortion=(0.0, 0.0, 0.0, 0.0))
    pixels, _ = view.camera.project(straight.centre + straight.rays())
    column, row = np.floor(pixels).astype(np.intp).T
    inside = (column >= 0) & (row >= 0) & (column < straight.width) & (row < straight.height)
    column, row = column.clip(0, straight.width - 1), row.clip(0, straight.height - 1)
    shape = (straight.height, straight.width)
    return replace(
        view,
        image=view.image[row, column].reshape(*shape, 3),
        mask=view.mask[row, column].reshape(shape),
        depth=np.where(inside, view.depth[row, column], np.float32(0)).reshape(shape),
        camera=straight,
    )


def _paint(view: View, blur: float, step: int) -> Paint:
    """Blurred colours of the object alone: a silhouette must not be an edge of its paint."""
    inside = _inside(view.mask)
    middle = np.s_[step // 2 :: step, step // 2 :: step]
    share = np.maximum(ndimage.gaussian_filter(inside, blur)[middle], np.float32(1e-3))
    channels = [ndimage.gaussian_filter(view.image[..., k] * inside, blur)[middle] / share for k in range(3)]
    return Paint(np.stack(channels, axis=-1), step)


def _texture(view: View, sharp: Paint) -> Map:
    """Grey levels less those of their surroundings on the object."""
    inside, grey = _inside(view.mask), sharp.levels.mean(axis=2)
    share = np.maximum(ndimage.gaussian_filter(inside, COARSE_BLUR_PX), np.float32(1e-3))
    around = ndimage.gaussian_filter(grey * inside, COARSE_BLUR_PX) / share
    return np.asarray((grey - around) * inside, np.float32)


def _inside(mask: NDArray[np.bool_]) -> Map:
    """1 on the object, 0 elsewhere and on its silhouette, whose pixels mix both."""
    return np.ones(mask.shape, np.float32) if mask.all() else np.float32(1) * ndimage.binary_erosion(mask)


def _outline(mask: NDArray[np.bool_]) -> Map:
    """Distance to the silhouette, smooth; far inside everywhere if no background is known."""
    if mask.all():
        return np.full(mask.shape, -np.inf, np.float32)
    # pixel centres are half a pixel away from the outline
    outside = ndimage.distance_transform_edt(~mask) - ndimage.distance_transform_edt(mask)
    outside = ndimage.gaussian_filter(outside - 0.5 * np.sign(outside), OUTLINE_BLUR_PX)
    return outside.astype(np.float32)
