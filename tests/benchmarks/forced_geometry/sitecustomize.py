"""FORCED GEOMETRY: makes random weights of TRELLIS give an object of realistic size. Of the benchmarks alone.

Python runs this file when it starts with this folder on PYTHONPATH. Random weights decode to noise. So here the
structure decoder's answer is replaced by a closed shell and the mesh decoder's distances by those of the same blob,
each after upstream has computed its own: the work stays, only its result is another.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from types import ModuleType
from typing import Any

# A ball with low waves, in a cube of side 1; its shell fills some 13,000 cells of the 64^3 grid
RADIUS = 0.36
WAVE, FREQUENCY = 0.01, 20.0
HALF_THICKNESS = 1.0  # of the shell, cells: enough to hold every cell that the surface crosses


def distance(points: Any) -> Any:
    """About the signed distance of points (..., 3), the cube's middle at the origin."""
    return points.norm(dim=-1) - RADIUS - WAVE * (FREQUENCY * points).sin().prod(dim=-1)


def force_shell(module: ModuleType) -> None:
    """The structure decoder finds the shell, whatever it computed."""
    forward = module.SparseStructureDecoder.forward

    def forced(self: Any, latent: Any) -> Any:
        occupied = forward(self, latent)
        torch, cells = sys.modules["torch"], occupied.shape[-1]
        middles = (torch.arange(cells, device=occupied.device) + 0.5) / cells - 0.5
        grid = torch.stack(torch.meshgrid(middles, middles, middles, indexing="ij"), dim=-1)
        inside = distance(grid).abs() < HALF_THICKNESS / cells
        return torch.where(inside, 1.0, -1.0).to(occupied).expand_as(occupied)

    module.SparseStructureDecoder.forward = forced


def force_distances(module: ModuleType) -> None:
    """The mesh is cut out of the blob's distances; colours and weights are as computed."""
    extractor = module.SparseFeatures2Mesh
    extract = extractor.__call__

    def forced(self: Any, cubes: Any, training: bool = False) -> Any:
        corners = cubes.coords[:, None, 1:] + module.cube_corners.to(cubes.coords)
        features = cubes.feats.clone()
        ranges = [slice(*self.layouts[name]["range"]) for name in ("sdf", "deform")]
        features[:, ranges[0]] = distance(corners / self.res - 0.5)
        features[:, ranges[1]] = 0
        return extract(self, cubes.replace(features), training)

    extractor.__call__ = forced


def force_networks(module: ModuleType) -> None:
    """Both for the networks in plain PyTorch: `module` is their pipeline's."""
    decode, extract = module.ViewsToMesh.occupied, module.mesh_of
    torch = sys.modules["torch"]

    def shell(self: Any, latents: Any) -> Any:
        decode(self, latents)
        cells = self._networks.latent_flow.resolution
        middles = (torch.arange(cells, device=latents.device) + 0.5) / cells - 0.5
        grid = torch.stack(torch.meshgrid(middles, middles, middles, indexing="ij"), dim=-1)
        return (distance(grid).abs() < HALF_THICKNESS / cells).nonzero()

    def cut_out(coords: Any, features: Any, resolution: int) -> Any:
        offsets = [(i & 1, i >> 1 & 1, i >> 2 & 1) for i in range(8)]
        corners = coords[:, None] + torch.tensor(offsets, device=coords.device)
        features = features.clone()
        features[:, :8], features[:, 8:32] = distance(corners / resolution - 0.5), 0
        return extract(coords, features, resolution)

    module.ViewsToMesh.occupied, module.mesh_of = shell, cut_out


FORCED: dict[str, Callable[[ModuleType], None]] = {
    "process.network.pipeline": force_networks,
    "trellis.models.sparse_structure_vae": force_shell,
    "trellis.representations.mesh.cube2mesh": force_distances,
}


class AfterImport(MetaPathFinder):
    """Changes the modules of `FORCED` once they are imported."""

    def find_spec(self, name: str, path: Sequence[str] | None, target: ModuleType | None = None) -> ModuleSpec | None:
        spec = PathFinder.find_spec(name, path, target) if name in FORCED else None
        if spec is None or spec.loader is None:
            return None
        load = spec.loader.exec_module

        def load_and_force(module: ModuleType) -> None:
            load(module)
            FORCED[name](module)
            print(f"FORCED GEOMETRY: {name}", file=sys.stderr)

        spec.loader.exec_module = load_and_force  # type: ignore[method-assign]
        return spec


sys.meta_path.insert(0, AfterImport())
