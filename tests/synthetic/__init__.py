"""Captures of known truth: solids, cameras around them, simulated sensors, and the metrics.

Exact captures are exported here; those of simulated sensors are in `tabletop` and `rooms`, which also need tests/data.
Imports tasks.capture.camera and tasks.geometry.render; used by tests and benchmarks.
"""

from tests.synthetic.captures import SUPERSAMPLE, Truth, make_capture, write_capture
from tests.synthetic.metrics import chamfer, colour_error, f_score, glb_to_capture_frame, psnr
from tests.synthetic.shapes import (
    OBJECT_CENTRE,
    OBJECT_HALF,
    SHAPES,
    Points,
    bowl,
    field_mesh,
    pattern,
    shape_mesh,
    solid_colours,
    torus,
)
from tests.synthetic.viewpoints import cameras_around, fibonacci_sphere, look_at, orbit_cameras

__all__ = [
    "OBJECT_CENTRE",
    "OBJECT_HALF",
    "SHAPES",
    "SUPERSAMPLE",
    "Points",
    "Truth",
    "bowl",
    "cameras_around",
    "chamfer",
    "colour_error",
    "f_score",
    "fibonacci_sphere",
    "field_mesh",
    "glb_to_capture_frame",
    "look_at",
    "make_capture",
    "orbit_cameras",
    "pattern",
    "psnr",
    "shape_mesh",
    "solid_colours",
    "torus",
    "write_capture",
]
