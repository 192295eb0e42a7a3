"""The gaussians of the `trellis` engine as a file that splat viewers open. The engine calls it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.spatial.transform import Rotation

from tasks.errors import InferenceFailed
from tasks.inference.trellis.trellis_output import TrellisOutput


def splat_ply(output: TrellisOutput, transform: NDArray[np.float64] | None = None) -> bytes:
    """Return the gaussians as a .ply in the layout of INRIA's reference code, which splat viewers open.

    transform: 4x4 similarity from the model's frame to the file's. Opacities are logits, scales logarithms, colours
    coefficients of spherical harmonics. Raises InferenceFailed if view-dependent colours would have to be turned.
    """
    init, raw = output.gaussian_init, output.gaussians
    aabb = np.asarray(init["aabb"], np.float32)
    activate, invert = _SCALING[init["scaling_activation"]]
    position = raw["xyz"] * aabb[3:] + aabb[:3]
    scale = activate(raw["scaling"] + invert(np.float64(init["scaling_bias"])))
    log_scale = np.log(np.sqrt(scale**2 + init["mininum_kernel_size"] ** 2))
    opacity = raw["opacity"] + np.log(init["opacity_bias"] / (1 - init["opacity_bias"]))
    rotation = raw["rotation"] + np.array([1, 0, 0, 0], np.float32)
    rotation = rotation / np.linalg.norm(rotation, axis=1, keepdims=True)
    # as INRIA's code writes them: all coefficients of one channel, then of the next
    colour = raw["features_dc"].transpose(0, 2, 1).reshape(len(position), -1)
    rest = raw["features_rest"].transpose(0, 2, 1).reshape(len(position), -1) if "features_rest" in raw else None
    if transform is not None:
        if rest is not None:
            raise InferenceFailed("splats with view-dependent colours cannot be turned into another frame")
        size = np.cbrt(np.linalg.det(transform[:3, :3]))
        position = position @ transform[:3, :3].T + transform[:3, 3]
        log_scale = log_scale + np.log(size)
        rotation = _turned(transform[:3, :3] / size, rotation)
    columns = {"x y z": position, "nx ny nz": np.zeros_like(position), "f_dc_": colour, "f_rest_": rest}
    columns |= {"opacity": opacity, "scale_": log_scale, "rot_": rotation}
    names: list[str] = []
    for name, column in columns.items():
        if column is not None:
            width = column.shape[1]
            names += [f"{name}{index}" for index in range(width)] if name.endswith("_") else name.split()
    table = np.concatenate([column for column in columns.values() if column is not None], axis=1, dtype="<f4")
    properties = "".join(f"property float {name}\n" for name in names)
    header = f"ply\nformat binary_little_endian 1.0\nelement vertex {len(table)}\n{properties}end_header\n"
    return header.encode() + table.tobytes()


def _softplus(x: NDArray[Any]) -> NDArray[Any]:
    return np.logaddexp(0, x)


def _inverse_softplus(x: NDArray[Any]) -> NDArray[Any]:
    return x + np.log(-np.expm1(-x))


_SCALING: dict[str, tuple[Callable[..., NDArray[Any]], Callable[..., Any]]] = {
    "exp": (np.exp, np.log),
    "softplus": (_softplus, _inverse_softplus),
}


def _turned(rotation: NDArray[np.float64], quaternions: NDArray[Any]) -> NDArray[Any]:
    """Turn quaternions (n, 4), w first, by a 3x3 rotation."""
    turned = Rotation.from_matrix(rotation) * Rotation.from_quat(quaternions, scalar_first=True)
    return turned.as_quat(scalar_first=True)
