"""The gaussians of the `trellis` engine, activated, and as a file that splat viewers open. The engine calls it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.special import expit

from tasks.errors import InferenceFailed
from tasks.geometry.gaussians import Gaussians
from tasks.inference.trellis.trellis_output import TrellisOutput

# Value of the constant spherical harmonic, of which `features_dc` holds the coefficients
CONSTANT_HARMONIC = 0.28209479177387814


def gaussians_of(output: TrellisOutput) -> Gaussians:
    """The gaussians of an output, in the model's frame, with upstream's activations. Raw rotations begin at w = 1."""
    init, raw = output.gaussian_init, output.gaussians
    aabb = np.asarray(init["aabb"], np.float32)
    activate, invert = _SCALING[init["scaling_activation"]]
    scales = activate(raw["scaling"] + invert(np.float64(init["scaling_bias"])))
    rotations = raw["rotation"] + np.array([1, 0, 0, 0], np.float32)
    return Gaussians(
        centres=raw["xyz"] * aabb[3:] + aabb[:3],
        scales=np.sqrt(scales**2 + init["mininum_kernel_size"] ** 2).astype(np.float32),
        rotations=rotations / np.linalg.norm(rotations, axis=1, keepdims=True),
        opacities=expit(_opacity_logits(output))[:, 0],
        colours=(raw["features_dc"][:, 0] * np.float32(CONSTANT_HARMONIC) + np.float32(0.5)).clip(0, 1),
    )


def splat_ply(output: TrellisOutput, transform: NDArray[np.float64] | None = None) -> bytes:
    """Return the gaussians as a .ply in the layout of INRIA's reference code, which splat viewers open.

    transform: 4x4 similarity from the model's frame to the file's. Opacities are logits, scales logarithms, colours
    coefficients of spherical harmonics. Raises InferenceFailed if view-dependent colours would have to be turned.
    """
    raw, placed = output.gaussians, gaussians_of(output)
    if transform is not None:
        if "features_rest" in raw:
            raise InferenceFailed("splats with view-dependent colours cannot be turned into another frame")
        placed = placed.moved(transform)
    count = len(placed.centres)
    # as INRIA's code writes them: all coefficients of one channel, then of the next
    colour = raw["features_dc"].transpose(0, 2, 1).reshape(count, -1)
    rest = raw["features_rest"].transpose(0, 2, 1).reshape(count, -1) if "features_rest" in raw else None
    columns = {"x y z": placed.centres, "nx ny nz": np.zeros_like(placed.centres), "f_dc_": colour, "f_rest_": rest}
    columns |= {"opacity": _opacity_logits(output), "scale_": np.log(placed.scales), "rot_": placed.rotations}
    names: list[str] = []
    for name, column in columns.items():
        if column is not None:
            width = column.shape[1]
            names += [f"{name}{index}" for index in range(width)] if name.endswith("_") else name.split()
    table = np.concatenate([column for column in columns.values() if column is not None], axis=1, dtype="<f4")
    properties = "".join(f"property float {name}\n" for name in names)
    header = f"ply\nformat binary_little_endian 1.0\nelement vertex {len(table)}\n{properties}end_header\n"
    return header.encode() + table.tobytes()


def _opacity_logits(output: TrellisOutput) -> NDArray[np.float32]:
    bias = output.gaussian_init["opacity_bias"]
    logits: NDArray[np.float32] = output.gaussians["opacity"] + np.float32(np.log(bias / (1 - bias)))
    return logits


def _softplus(x: NDArray[Any]) -> NDArray[Any]:
    return np.logaddexp(0, x)


def _inverse_softplus(x: NDArray[Any]) -> NDArray[Any]:
    return x + np.log(-np.expm1(-x))


_SCALING: dict[str, tuple[Callable[..., NDArray[Any]], Callable[..., Any]]] = {
    "exp": (np.exp, np.log),
    "softplus": (_softplus, _inverse_softplus),
}
