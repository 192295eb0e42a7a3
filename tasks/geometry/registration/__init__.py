"""Registration: the place of a generated mesh of unknown pose and scale in a capture.

`evidence` holds what the views know, `samples` the mesh as points, `search` the poses that are tried and judged.
A part of tasks.geometry: rooms above it import `register` and `Registration` from here, never from the modules.
"""

from tasks.geometry.registration.search import MAX_STRAY, MIN_INLIERS, Registration, register

__all__ = ["MAX_STRAY", "MIN_INLIERS", "Registration", "register"]
