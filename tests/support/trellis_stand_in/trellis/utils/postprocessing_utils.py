"""The exporter's contract: canonical z-up in, a textured y-up trimesh out."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import faults
import numpy as np
import torch
import trimesh
from PIL import Image


class _PolyData:
    def __init__(self, points: Any, faces: Any) -> None:
        raise AssertionError("fast-simplification is installed with this project")


pv = SimpleNamespace(PolyData=_PolyData)


def to_glb(
    app_rep: Any,
    mesh: Any,
    simplify: float = 0.95,
    fill_holes: bool = True,
    fill_holes_max_size: float = 0.04,
    texture_size: int = 1024,
    debug: bool = False,
    verbose: bool = True,
) -> trimesh.Trimesh:
    assert torch.state.grad, "the bake needs gradients"
    if faults.asked("LOST_IN_GLB"):
        raise RuntimeError("Cuda error: 719[cudaStreamSynchronize(stream);]")
    vertices, faces = mesh.vertices.cpu().numpy(), mesh.faces.cpu().numpy()
    assert vertices.dtype == np.float32 and faces.dtype == np.int64
    reduced = pv.PolyData(vertices, np.concatenate([np.full((len(faces), 1), 3), faces], axis=1))
    reduced = reduced.decimate(simplify, progress_bar=verbose)
    vertices, faces = reduced.points, reduced.faces.reshape(-1, 4)[:, 1:]
    assert vertices.dtype == np.float32, "hole filling takes no float64"
    directions = vertices / np.linalg.norm(vertices, axis=1, keepdims=True)
    uvs = np.stack([np.arctan2(directions[:, 1], directions[:, 0]) / (2 * np.pi) % 1, np.arccos(directions[:, 2])], 1)
    uvs[:, 1] = 1 - uvs[:, 1] / np.pi
    colour = 0.2820948 * app_rep._features_dc.cpu().numpy().mean(axis=(0, 1)) + 0.5
    texture = np.tile(np.uint8(np.clip(colour, 0, 1) * 255), (texture_size, texture_size, 1))
    texture[0] = [255, 0, 0]  # the first row is the top: v = 1
    turned = vertices @ np.array([[1, 0, 0], [0, 0, -1], [0, 1, 0]])
    material = trimesh.visual.material.PBRMaterial(roughnessFactor=1.0, baseColorTexture=Image.fromarray(texture))
    return trimesh.Trimesh(turned, faces, visual=trimesh.visual.TextureVisuals(uv=uvs, material=material))
