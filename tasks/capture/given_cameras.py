"""The cameras that come with a capture, of whatever layout, before the size of each picture is known.

The readers of `layouts` make them; `views` and the checks use them.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Annotated

import numpy as np
from annotated_types import Gt, Lt
from numpy.typing import NDArray
from pydantic import BaseModel, FiniteFloat, PositiveInt

from tasks.capture.camera import Camera

MILLIMETRE = 0.001
"""Metres for each step of a 16-bit depth map, where a capture says nothing else"""

Positive = Annotated[FiniteFloat, Gt(0)]


class Intrinsics(BaseModel, frozen=True):
    """A camera's inner geometry, by the names of nerfstudio.

    w, h, fl_*, c*: pixels; pixel centres lie at half-integers. camera_angle_*: fields of view, radians.
    k*, p*: distortion as in OpenCV; k4 to k6 are the denominator of its rational model, or of its fisheye model k3, k4.
    """

    w: PositiveInt | None = None
    h: PositiveInt | None = None
    fl_x: Positive | None = None
    fl_y: Positive | None = None
    cx: FiniteFloat | None = None
    cy: FiniteFloat | None = None
    camera_angle_x: Annotated[FiniteFloat, Gt(0), Lt(math.pi)] | None = None
    camera_angle_y: Annotated[FiniteFloat, Gt(0), Lt(math.pi)] | None = None
    k1: FiniteFloat = 0.0
    k2: FiniteFloat = 0.0
    k3: FiniteFloat = 0.0
    k4: FiniteFloat = 0.0
    k5: FiniteFloat = 0.0
    k6: FiniteFloat = 0.0
    p1: FiniteFloat = 0.0
    p2: FiniteFloat = 0.0
    camera_model: str = "OPENCV"
    is_fisheye: bool = False

    @property
    def fisheye(self) -> bool:
        """True for OpenCV's fisheye model (Kannala and Brandt, TPAMI 2006)."""
        return self.is_fisheye or self.camera_model.lower().endswith("fisheye")

    @property
    def distortion(self) -> tuple[float, ...]:
        """In OpenCV's order, k1 k2 p1 p2 and, if they are not zero, k3 k4 k5 k6."""
        higher = (self.k3, self.k4, self.k5, self.k6)
        return (self.k1, self.k2, self.p1, self.p2, *(higher if any(higher) else ()))


@dataclass(frozen=True)
class Frame:
    """One view's camera as the capture gives it; `camera` completes it with the image's size."""

    intrinsics: Intrinsics
    camera_to_world: NDArray[np.float64]
    """(4, 4), OpenGL axes, metres"""
    reduced: int = 1
    """The picture was reduced by this factor; the intrinsics may be of its full size"""

    def for_picture(self, width: int, height: int) -> Intrinsics:
        """The intrinsics for a picture of this size: those of the full size are reduced as the picture was."""
        known, factor = self.intrinsics, self.reduced
        # a picture of 1001 pixels was reduced to 500 or 501
        if None in (known.w, known.h) or factor == 1 or (known.w or 0) // factor not in (width, width - 1):
            return known
        across, along = width / (known.w or width), height / (known.h or height)
        sizes = {"fl_x": across, "cx": across, "fl_y": along, "cy": along}
        given = {name: value for name in sizes if (value := getattr(known, name)) is not None}
        scaled = {name: value * sizes[name] for name, value in given.items()} | {"w": width, "h": height}
        return known.model_copy(update=scaled)

    def camera(self, width: int, height: int) -> Camera:
        """The camera of an image of this size, without the distortion of a fisheye lens."""
        known = self.for_picture(width, height)
        fl_x = known.fl_x or width / 2 / math.tan((known.camera_angle_x or math.pi / 2) / 2)
        fl_y = known.fl_y or (height / 2 / math.tan(known.camera_angle_y / 2) if known.camera_angle_y else fl_x)
        return Camera(
            width=width,
            height=height,
            fl_x=fl_x,
            fl_y=fl_y,
            cx=width / 2 if known.cx is None else known.cx,
            cy=height / 2 if known.cy is None else known.cy,
            camera_to_world=self.camera_to_world,
            distortion=(0.0, 0.0, 0.0, 0.0) if known.fisheye else known.distortion,
        )


@dataclass(frozen=True)
class GivenCameras:
    """The cameras of a capture, with what else its files say of all views."""

    frames: Mapping[str, Frame] = field(default_factory=dict)
    """By view name, only frames without a problem"""
    depth_unit: float = MILLIMETRE
    """Metres for each step of a 16-bit depth map"""
    depth_range: tuple[float, float] | None = None
    """(near, far) of 8-bit depth maps, metres"""
    bounds: NDArray[np.float64] | None = None
    """(2, 3) corners of the object's box, world metres"""
    named: frozenset[str] = frozenset()
    """Views that have a frame, right or wrong"""
    lenses: Mapping[str, Intrinsics] = field(default_factory=dict)
    """Intrinsics by view name, of all views that have them, with or without a pose"""
    rig: str | None = None
    """The kind of a declared rig, as `capture2mesh rig` writes it"""
    source: str = ""
    """The file that gives them, relative to the capture; empty if there is none"""
