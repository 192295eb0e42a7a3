"""The outputs of the decoders."""

from __future__ import annotations

from typing import Any

import torch


class MeshExtractResult:
    def __init__(self, vertices: Any, faces: Any, vertex_attrs: Any = None, res: int = 64) -> None:
        self.vertices, self.faces, self.vertex_attrs, self.res = vertices, faces.long(), vertex_attrs, res
        self.success = vertices.shape[0] != 0 and faces.shape[0] != 0


class Gaussian:
    def __init__(
        self,
        aabb: list[float],
        sh_degree: int = 0,
        mininum_kernel_size: float = 0.0,
        scaling_bias: float = 0.01,
        opacity_bias: float = 0.1,
        scaling_activation: str = "exp",
        device: str = "cuda",
    ) -> None:
        self.init_params = {
            "aabb": aabb,
            "sh_degree": sh_degree,
            "mininum_kernel_size": mininum_kernel_size,
            "scaling_bias": scaling_bias,
            "opacity_bias": opacity_bias,
            "scaling_activation": scaling_activation,
        }
        self.aabb = torch.tensor(aabb, device=device)
        # from here on the name means the logit, as upstream: only init_params can rebuild the object
        self.opacity_bias = float("nan")
        self._xyz = self._features_dc = self._features_rest = None
        self._scaling = self._rotation = self._opacity = None

    @property
    def get_xyz(self) -> Any:
        return self._xyz * self.aabb[None, 3:] + self.aabb[None, :3]
