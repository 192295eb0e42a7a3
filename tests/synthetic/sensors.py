"""Depth sensors by their published noise models: exact depth goes in, what the sensor would deliver comes out.

Used by `tabletop` and `rooms`. What a paper gives as a number is a field with the paper beside it; thresholds without a
source (how dark is too dark) are ours, and are named so.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage
from scipy.special import ndtri

from tasks.capture.camera import Camera
from tests.synthetic.seen import Map, Seen, hidden_from, multipath

EDGE_JUMP = 0.03  # of the depth: more between neighbours is an edge between two surfaces


@dataclass(frozen=True)
class Sensor(ABC):
    """A depth camera whose depth map lies in its colour image, as drivers deliver it after registration."""

    width: int
    """Columns of the depth map."""
    height: int
    """Rows of the depth map."""
    focal: float
    """Focal length, depth pixels."""
    nearest: float
    """Shortest distance with a reading, metres; captures keep their cameras further away."""
    farthest: float
    """Longest distance with a reading, metres."""
    step: float = 0.001
    """Metres per unit of the depth files; 0 = they hold 32-bit floats in metres."""
    colour_scale: int = 1
    """Columns of the colour image per column of the depth map."""
    enlarge: int = 1
    """The depth files are this much larger, by nearest neighbour."""

    def camera(self, pose: NDArray[np.float64]) -> Camera:
        """The depth map's camera at a pose (4, 4); its colour camera is the same, resized."""
        return Camera(self.width, self.height, self.focal, self.focal, self.width / 2, self.height / 2, pose)

    def shrunk(self, factor: int) -> Sensor:
        """The same optics with fewer pixels, for quick tests; distances in pixels (blur, windows) stay."""
        return replace(self, width=self.width // factor, height=self.height // factor, focal=self.focal / factor)

    def deliver(self, exact: Seen, rng: np.random.Generator) -> Map:
        """Depth as its files hold it: measured, cut to the range, in steps, enlarged. Metres, 0 = no reading."""
        depth = self.measure(exact, rng)
        depth = np.where((depth >= self.nearest) & (depth <= self.farthest), depth, np.float32(0))
        if self.step:
            depth = np.rint(depth / self.step) * np.float32(self.step)
        return np.kron(depth, np.ones((self.enlarge, self.enlarge), np.float32)) if self.enlarge > 1 else depth

    @abstractmethod
    def measure(self, exact: Seen, rng: np.random.Generator) -> Map:
        """Measured depth (h, w) before rounding to the files' steps, metres, 0 = no reading."""


@dataclass(frozen=True)
class KinectV1(Sensor):
    """Structured light, registered to VGA.

    Disparity steps and the range: Khoshelham and Elberink, Accuracy and resolution of Kinect depth data for indoor
    mapping applications, Sensors 12 (2012). Axial and lateral noise: Nguyen, Izadi and Lovell, Modeling Kinect sensor
    noise for improved 3D reconstruction and tracking, 3DIMPVT 2012. Their combination (lateral shifts, noise, then
    rounded disparity): Handa et al., A benchmark for RGB-D visual odometry, 3D reconstruction and SLAM, ICRA 2014.
    """

    width: int = 640
    height: int = 480
    focal: float = 580.0
    nearest: float = 0.4  # of Kinect for Windows in near mode
    farthest: float = 5.0
    baseline: float = 0.075
    """Metres from the camera to the projector, which stands on its right: shadows fall to the left."""
    disparity_step: float = 1 / 8
    """Pixels. 1/8 makes depth steps of 2.87e-3 z^2 m; Khoshelham and Elberink calibrate 2.85e-3 z^2."""
    window: float = 1.5
    """Sigma of the noise's correlation, pixels: neighbours share most of their 9 x 9 matching windows."""
    too_dark: float = 0.02
    """Albedo times cosine below which half of the readings are lost; ours."""
    too_flat: float = 80.0
    """Angle of incidence, degrees, at which half of the readings are lost; ours."""

    def axial_sigma(self, depth: Map, angle: Map) -> Map:
        """Standard deviation along the axis, metres (Nguyen et al., equations 2 and 3)."""
        grazing = np.clip(angle, 0, np.radians(89))
        beyond = np.where(angle > np.radians(60), 0.0001 * grazing**2 / (np.pi / 2 - grazing) ** 2, 0)
        return 0.0012 + 0.0019 * (depth - 0.4) ** 2 + beyond / np.sqrt(np.maximum(depth, 0.1))

    def lateral_sigma(self, angle: Map) -> Map:
        """Standard deviation across the image, pixels (Nguyen et al., equation 1)."""
        grazing = np.clip(angle, 0, np.radians(80))
        return 0.8 + 0.035 * grazing / (np.pi / 2 - grazing)

    def depth_step(self, depth: Map) -> Map:
        """Metres between two neighbouring disparities."""
        return depth**2 * self.disparity_step / (self.focal * self.baseline)

    def measure(self, exact: Seen, rng: np.random.Generator) -> Map:
        visible = exact.depth * ~hidden_from(exact, self.baseline)
        sigma = self.lateral_sigma(exact.angle)
        rows, columns = np.indices(visible.shape)
        shifts = (sigma * _smooth_noise(rng, visible.shape, self.window) for _ in range(2))
        row, column = (
            np.clip(np.rint(index + shift), 0, size - 1).astype(int)
            for index, shift, size in zip((rows, columns), shifts, visible.shape, strict=True)
        )
        depth, angle, albedo, cosine = (m[row, column] for m in (visible, exact.angle, exact.albedo, exact.cosine))
        # Nguyen's sigma was measured on rounded depth: the rounding's own share is not added twice
        rounding = self.depth_step(depth) ** 2 / 12
        before = np.sqrt(np.maximum(self.axial_sigma(depth, angle) ** 2 - rounding, 0))
        depth = _added(depth, before * _smooth_noise(rng, depth.shape, self.window))
        light = ndimage.gaussian_filter(albedo * cosine, self.window)  # a window bridges a thin dark line
        lost = _fails(light, self.too_dark, rng) | _fails(np.pi / 2 - angle, _flat(self.too_flat), rng)
        return _in_disparity_steps(depth * ~lost, self.focal * self.baseline, self.disparity_step)


@dataclass(frozen=True)
class RealSenseD435(Sensor):
    """Active stereo; depth in the left imager.

    RMS error: Grunnet-Jepsen, Sweetser and Woodfill, Best-known methods for tuning Intel RealSense D400 depth cameras
    for best performance (Intel): z^2 * subpixel / (focal * baseline). That it grows with z^2 and is correlated between
    neighbours: Ahn et al., Analysis and noise modeling of the Intel RealSense D435 for mobile robots, UR 2019.
    Fattened edges: of any matching by windows, Hirschmueller and Scharstein, Evaluation of cost functions for stereo
    matching, CVPR 2007.
    """

    width: int = 640
    height: int = 480
    focal: float = 385.0
    nearest: float = 0.175
    farthest: float = 10.0
    baseline: float = 0.050
    """Metres between the imagers; the second stands on the right: shadows fall to the left."""
    subpixel: float = 0.08
    """RMS error of the disparity, pixels; Intel: below 0.1 on well textured surfaces."""
    disparity_step: float = 1 / 32
    """Pixels."""
    window: float = 2.0
    """Sigma of the noise's correlation, pixels."""
    fattening: int = 2
    """Pixels by which the foreground grows over the background at most: near half a matching window."""
    too_dark: float = 0.01
    """Albedo times cosine below which half of the readings are lost; ours."""
    too_flat: float = 83.0
    """Angle of incidence, degrees, at which half of the readings are lost; ours."""
    unmatched: float = 0.01
    """Share of readings that are lost in blobs; ours."""

    def sigma(self, depth: Map) -> Map:
        """RMS error along the axis, metres."""
        return depth**2 * self.subpixel / (self.focal * self.baseline)

    def measure(self, exact: Seen, rng: np.random.Generator) -> Map:
        shadow = hidden_from(exact, self.baseline, in_view=True)
        light = ndimage.gaussian_filter(exact.albedo * exact.cosine, self.window)
        lost = shadow | _fails(light, self.too_dark, rng)
        lost |= _fails(np.pi / 2 - exact.angle, _flat(self.too_flat), rng)
        lost |= _smooth_noise(rng, shadow.shape, 2 * self.window) > _one_sided(self.unmatched)
        depth = self._fattened(np.where(lost, np.float32(0), exact.depth), rng)
        depth = _added(depth, self.sigma(depth) * _smooth_noise(rng, depth.shape, self.window))
        return _in_disparity_steps(depth, self.focal * self.baseline, self.disparity_step)

    def _fattened(self, depth: Map, rng: np.random.Generator) -> Map:
        """The foreground grown over background and shadow, by a width that varies along the edge."""
        inverse = np.where(depth > 0, 1 / np.maximum(depth, 1e-3), 0)
        reach = self.fattening * (0.5 + 0.5 * np.tanh(_smooth_noise(rng, depth.shape, 2 * self.window)))
        for ring in range(self.fattening):
            grown = ndimage.maximum_filter(inverse, 3)
            edge = (inverse > 0) & (grown > inverse * (1 + EDGE_JUMP))
            empty = (inverse == 0) & (grown > 0) & (ndimage.uniform_filter(inverse, 3) > grown / 3)
            inverse = np.where((edge | empty) & (reach > ring + 0.5), grown, inverse)
        return np.where(inverse > 0, 1 / np.maximum(inverse, 1e-3), 0).astype(np.float32)


@dataclass(frozen=True)
class PhoneLidar(Sensor):
    """ARKit's depth of a phone: a few hundred laser dots made dense by a network that follows the colour image.

    Smooth, without holes, wrong by millimetres over whole areas and by a centimetre where two surfaces meet:
    Luetzenburg, Kroon and Bjork, Evaluation of the Apple iPhone 12 Pro LiDAR for an application in geosciences,
    Scientific Reports 11 (2021): +-1 cm for objects with sides above 10 cm. `enlarge` = 4 is what nerfstudio writes
    for Polycam.
    """

    width: int = 256
    height: int = 192
    focal: float = 213.0
    nearest: float = 0.2
    farthest: float = 5.0
    colour_scale: int = 4
    bleeding: float = 1.0
    """Sigma of the blur across edges, depth pixels."""
    area_sigma: float = 0.003
    """Standard deviation of the error that a whole area shares, metres at 1 m and nearer."""
    area: float = 12.0
    """Sigma of such areas, depth pixels: about the distance between laser dots."""
    edge_sigma: float = 0.010
    """Standard deviation of the error where two surfaces meet, metres."""

    def measure(self, exact: Seen, rng: np.random.Generator) -> Map:
        known = (exact.depth > 0).astype(np.float32)
        # the network gives every pixel a depth: beyond the scene it continues the nearest reading
        nearest = ndimage.distance_transform_edt(known == 0, return_distances=False, return_indices=True)
        filled = exact.depth[tuple(nearest)]
        smooth = ndimage.gaussian_filter(filled, self.bleeding)
        edge = np.clip(np.abs(smooth - filled) / (EDGE_JUMP * np.maximum(smooth, 1e-3)), 0, 1)
        edge = ndimage.gaussian_filter(edge, self.bleeding)
        error = self.area_sigma * np.maximum(smooth, 1) * _smooth_noise(rng, filled.shape, self.area)
        error += self.edge_sigma * edge * _smooth_noise(rng, filled.shape, self.area / 3)
        return np.where(ndimage.binary_dilation(known > 0, iterations=2), smooth + error, 0).astype(np.float32)


@dataclass(frozen=True)
class TimeOfFlight(Sensor):
    """Continuous-wave time of flight: Azure Kinect, narrow field of view, unbinned.

    Noise by the amplitude of the returned light, the mix of distances in a pixel at edges, the light that arrives by
    way of other surfaces, the cyclic error: Lefloch et al., Technical foundations and calibration methods for
    time-of-flight cameras, in: Time-of-Flight and Depth Imaging, LNCS 8200 (2013). The sizes: Toelgyessy et al.,
    Evaluation of the Azure Kinect and its comparison to Kinect V1 and Kinect V2, Sensors 21 (2021), which confirms the
    maker's error below 11 mm + 0.1 % and shows flying pixels and multipath.
    """

    width: int = 640
    height: int = 576
    focal: float = 504.0
    nearest: float = 0.5
    farthest: float = 3.86
    floor: float = 0.0008
    """Standard deviation that is left however bright the surface, metres; ours, within the maker's 17 mm."""
    per_amplitude: float = 0.0006
    """Standard deviation at 1 m of a white surface face on, metres; it grows with z^2 / (albedo * cosine)."""
    spread: float = 0.6
    """Sigma of the light that a pixel takes from its neighbours, pixels."""
    cyclic: float = 0.001
    """Amplitude of the cyclic error, metres."""
    period: float = 0.75
    """Metres of distance after which the phase repeats: 200 MHz, the mean modulation that Bamji et al. state for this
    sensor (IMpixel 65nm BSI 320MHz demodulated TOF image sensor, ISSCC 2018). The cyclic error has a quarter of it."""
    bounces: int = 24
    """Rays per place that gather light from other surfaces."""
    uncorrected: float = 1.0
    """Share of the error by such light that the driver leaves; 1 = it corrects nothing. Azure Kinect's maker promises
    its error only without multipath. It can be corrected from depth and amplitude alone: Fuentes-Jimenez et al.,
    Modelling and correction of multipath interference in time of flight cameras, CVPR 2012."""
    too_weak: float = 0.02
    """Amplitude (albedo * cosine / z^2, z in metres) below which half of the readings are lost; ours."""
    rejected: float = 0.5
    """Share of the mixed pixels at edges that the driver finds and drops; ours."""

    def sigma(self, depth: Map, albedo: Map, cosine: Map) -> Map:
        """Standard deviation along the ray, metres."""
        amplitude = np.maximum(albedo * cosine / np.maximum(depth, 0.1) ** 2, 1e-3)
        return np.hypot(self.floor, self.per_amplitude / amplitude).astype(np.float32)

    def measure(self, exact: Seen, rng: np.random.Generator) -> Map:
        hit = exact.depth > 0
        amplitude = np.where(hit, exact.albedo * exact.cosine / np.maximum(exact.depth, 0.1) ** 2, 0)
        stretch = np.linalg.norm(exact.camera.rays(), axis=1).astype(np.float32).reshape(hit.shape)
        weight = ndimage.gaussian_filter(amplitude, self.spread)
        mixed = ndimage.gaussian_filter(amplitude * exact.depth, self.spread) / np.maximum(weight, 1e-9)
        flying = np.abs(mixed - exact.depth) > EDGE_JUMP / 3 * exact.depth
        depth = np.where(hit, mixed, 0)
        error = self.uncorrected * multipath(exact, self.period, self.bounces, rng)
        error += self.cyclic * np.sin(8 * np.pi * depth * stretch / self.period)
        error += self.sigma(depth, exact.albedo, exact.cosine) * rng.standard_normal(hit.shape, np.float32)
        lost = _fails(weight, self.too_weak, rng) | (flying & (rng.random(hit.shape) < self.rejected))
        return _added(depth, error / stretch) * ~lost


SENSORS: dict[str, Sensor] = {
    "kinect_v1": KinectV1(),
    "realsense_d435": RealSenseD435(),
    "phone_lidar": PhoneLidar(),
    "phone_lidar_enlarged": PhoneLidar(enlarge=4),
    "time_of_flight": TimeOfFlight(),
    "time_of_flight_corrected": TimeOfFlight(uncorrected=0.0),
}


def _smooth_noise(rng: np.random.Generator, shape: tuple[int, ...], sigma: float) -> Map:
    """Gaussian noise of variance 1, correlated over `sigma` pixels."""
    impulse = np.zeros(2 * int(4 * sigma + 0.5) + 1)
    impulse[len(impulse) // 2] = 1
    norm = np.square(ndimage.gaussian_filter1d(impulse, sigma)).sum()
    return ndimage.gaussian_filter(rng.standard_normal(shape, np.float32), sigma, mode="wrap") / np.float32(norm)


def _fails(value: Map, threshold: float, rng: np.random.Generator) -> NDArray[np.bool_]:
    """Blobs of pixels with small values: half of the pixels that are exactly at the threshold."""
    return value < threshold * np.exp(0.3 * _smooth_noise(rng, value.shape, 1.5))


def _flat(degrees: float) -> float:
    """Radians that are left to 90 degrees."""
    return float(np.radians(90 - degrees))


def _one_sided(share: float) -> float:
    """The level that a share of normal numbers exceeds."""
    return float(ndtri(1 - share))


def _added(depth: Map, error: Map) -> Map:
    return np.where(depth > 0, np.maximum(depth + error, 0), 0).astype(np.float32)


def _in_disparity_steps(depth: Map, focal_times_baseline: float, step: float) -> Map:
    """Depth (h, w) whose disparity (focal * baseline / depth) is a whole number of steps."""
    disparity = np.rint(focal_times_baseline / np.maximum(depth, 1e-3) / step) * step
    return np.where(depth > 0, focal_times_baseline / np.maximum(disparity, step), 0).astype(np.float32)
