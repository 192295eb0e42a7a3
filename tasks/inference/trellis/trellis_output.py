"""The output of the `trellis` engine, in memory and as safetensors. The engine and `splats.py` use it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import load, save

SCHEMA = 1
PREFIX = "gaussians."


@dataclass(frozen=True, eq=False)
class TrellisOutput:
    """Geometry and gaussians of a capture, in the model's frame: z-up, within [-0.5, 0.5]^3, of unknown size."""

    vertices: NDArray[np.float32]
    """(n, 3), in the model's frame."""
    faces: NDArray[np.int32]
    """(m, 3), indices of vertices."""
    vertex_attrs: NDArray[np.float32] | None
    """(n, 6): RGB, about 0..1, and normal of each vertex; None if the model gives none."""
    gaussians: dict[str, NDArray[np.float32]]
    """Upstream's raw tensors by name (xyz, features_dc, scaling, rotation, opacity), before biases and activations."""
    gaussian_init: dict[str, Any]
    """The arguments with which upstream's `Gaussian` is constructed."""
    variant: str
    """Upstream's variant that made it."""
    views: tuple[str, ...]
    """Names of the views that were used."""
    reduced: bool
    """True if these are fewer than asked for, because GPU memory was too small."""
    measured: dict[str, float] = field(default_factory=dict)
    """Seconds by step, and `peak_gib`, the most GPU memory in use. Not stored."""
    to_capture = None  # the model does not know where the object lies in the capture's frame
    surface = None  # nor does it measure anything

    @property
    def colours(self) -> NDArray[np.float32] | None:
        """RGB 0..1 of the vertices, (n, 3) float32; None if the model gives none."""
        return vertex_colours(self.tensors())

    def tensors(self) -> dict[str, NDArray[Any]]:
        """All arrays by name, as they are stored and as the model's process takes them."""
        tensors: dict[str, NDArray[Any]] = {"vertices": self.vertices, "faces": self.faces}
        if self.vertex_attrs is not None:
            tensors["vertex_attrs"] = self.vertex_attrs
        return tensors | {f"{PREFIX}{name}": array for name, array in self.gaussians.items()}

    def to_safetensors(self) -> bytes:
        """All of it but `measured`; the values that are not arrays go to the file's metadata."""
        meta = {
            "schema": SCHEMA,
            "gaussian_init": self.gaussian_init,
            "variant": self.variant,
            "views": self.views,
            "reduced": self.reduced,
        }
        return save(self.tensors(), {"trellis": json.dumps(meta, sort_keys=True)})

    @staticmethod
    def from_safetensors(data: bytes, tensors: Mapping[str, NDArray[Any]] | None = None) -> TrellisOutput:
        """Read the bytes that `to_safetensors` wrote; tensors: their arrays, where they were read before."""
        header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
        meta = json.loads(header["__metadata__"]["trellis"])
        return TrellisOutput.of(
            load(data) if tensors is None else tensors,
            gaussian_init=meta["gaussian_init"],
            variant=meta["variant"],
            views=tuple(meta["views"]),
            reduced=meta["reduced"],
        )

    @staticmethod
    def of(tensors: Mapping[str, NDArray[Any]], **others: Any) -> TrellisOutput:
        """The output with these arrays, named as by `tensors`, and these other fields."""
        return TrellisOutput(
            vertices=tensors["vertices"],
            faces=tensors["faces"],
            vertex_attrs=tensors.get("vertex_attrs"),
            gaussians={name.removeprefix(PREFIX): array for name, array in tensors.items() if name.startswith(PREFIX)},
            **others,
        )


def vertex_colours(tensors: Mapping[str, NDArray[Any]]) -> NDArray[np.float32] | None:
    """RGB 0..1 (n, 3) of the vertices in the arrays of an output; None if it has no colours."""
    attributes = tensors.get("vertex_attrs")
    return None if attributes is None else attributes[:, :3].clip(0, 1)  # the model may exceed 0..1 a little
