"""The pipeline of TRELLIS-VGGT, top to bottom: views in, gaussians and a mesh out.

Source: ReconViaGen (2025) on TRELLIS (Xiang et al. 2024). The model's process and the benchmarks run it.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional

from ..faults import Fault
from .attention import plain_norm
from .cubes import CubeMesh, mesh_of
from .loader import Networks
from .sampler import Sampling, sample
from .sparse import Voxels
from .step_graphs import LatentSteps, StructureSteps
from .structure_flow import LAST_NORM_EPS
from .vision_transformer import normalised

# A step of the latents' flow takes about as long as one of the structure's (measured with 8 and 16 views)
STRUCTURE_STEP_COST, LATENT_STEP_COST = 2, 3
# How many versions of a compiled block are kept: with and without condition, one or several views, masked or not
COMPILED_VERSIONS = 64


@dataclass(frozen=True)
class Request:
    """Parameters of a run."""

    seed: int
    structure_steps: int
    structure_strength: float
    """Guidance: (1 + s) p - s n."""
    latent_steps: int
    latent_strength: float


@dataclass(frozen=True)
class Result:
    """The outputs of a run, on the networks' device."""

    mesh: CubeMesh
    gaussians: dict[str, Tensor]
    """Raw tensors by upstream's names (`_xyz` ...)."""
    seconds: dict[str, float]
    """Time of each phase."""


class ViewsToMesh:
    """The pipeline on loaded networks. compiles: torch.compile for the flows' blocks, where a compiler is there."""

    def __init__(self, networks: Networks, compiles: bool = False) -> None:
        self._networks, self._device = networks, networks.mean.device
        if compiles and self._device.type == "cuda" and (shutil.which("cc") or shutil.which("gcc")):
            torch._dynamo.config.cache_size_limit = COMPILED_VERSIONS
            for block in networks.structure_flow.blocks:
                block.compile(dynamic=False)
            for block in networks.latent_flow.blocks:
                block.compile(dynamic=True)
        self._structure_steps = StructureSteps(networks.structure_flow)
        self._latent_steps = LatentSteps(networks.latent_flow)

    def release(self) -> None:
        """Free what later runs would use again: the graphs of the latents' flow, with their keys and values."""
        self._latent_steps.release()

    @torch.no_grad()
    def run(self, views: Sequence[NDArray[np.uint8]], asked: Request, progressed: Callable[[float], None]) -> Result:
        """views: (518, 518, 3) each, as `preprocess.prepared` gives them. Raises Fault if nothing comes out."""
        networks, timer = self._networks, _Timer(self._device)
        random = torch.Generator().manual_seed(asked.seed)  # on the CPU: the same numbers on every device
        done = _Progress(asked, progressed)
        for_structure, for_latents = self._conditions(views)
        timer.mark("conditions")
        noise = torch.randn(networks.structure_flow.shape, generator=random).to(self._device)
        velocity = self._structure_steps.begin(for_structure, noise)
        timer.mark("structure_prepared")
        chosen = _as_asked(networks.structure_sampling, asked.structure_steps, asked.structure_strength)
        latents = sample(velocity, noise, chosen, lambda: done.by(STRUCTURE_STEP_COST))
        timer.mark("structure")
        _require_finite("latents of the structure", latents)
        coords = self.occupied(latents)
        if not len(coords):
            raise Fault("EmptyResult", "the model found nothing in the views: no voxel is occupied")
        noise = torch.randn(len(coords), networks.latent_flow.in_channels, generator=random).to(self._device)
        rows, velocity = self._latent_steps.begin(for_latents, coords)
        del for_structure, for_latents
        timer.mark("latents_prepared")
        chosen = _as_asked(networks.latent_sampling, asked.latent_steps, asked.latent_strength)
        noise = functional.pad(noise, (0, 0, 0, rows - len(coords)))
        latents = sample(velocity, noise, chosen, lambda: done.by(LATENT_STEP_COST))[: len(coords)]
        timer.mark("latents")
        _require_finite("structured latents", latents)
        latents = latents * networks.std + networks.mean
        voxels = Voxels(coords)
        gaussians = networks.gaussian_decoder(latents, voxels)
        timer.mark("gaussians")
        mesh = self.surface(latents, voxels)
        timer.mark("mesh")
        return Result(mesh, gaussians, timer.seconds)

    def occupied(self, latents: Tensor) -> Tensor:
        """The occupied voxels (N, 3) of the structure's latents, in lexicographic order."""
        return (self._networks.structure_decoder(latents) > 0)[0, 0].nonzero()

    def surface(self, latents: Tensor, voxels: Voxels) -> CubeMesh:
        """The mesh of the latents (N, 8)."""
        decoder = self._networks.mesh_decoder
        coords, features = decoder(latents, voxels)
        return mesh_of(coords, features, decoder.cube_resolution)

    def _conditions(self, views: Sequence[NDArray[np.uint8]]) -> tuple[Tensor, Tensor]:
        """The conditions of the structure's flow (1, 4096, C) and of the latents' (V, P, C)."""
        networks = self._networks
        images = torch.from_numpy(np.stack(views)).to(self._device).permute(0, 3, 1, 2).float() / 255
        aggregated = networks.aggregator(images)
        features = plain_norm(networks.features(normalised(images)), LAST_NORM_EPS)
        return networks.structure_condition(aggregated, features), networks.latent_condition(aggregated, features)


def _as_asked(published: Sampling, steps: int, strength: float) -> Sampling:
    return replace(published, steps=steps, strength=strength)


def _require_finite(what: str, latents: Tensor) -> None:
    """Raise Fault if numbers have overflowed: what is not a number counts as unoccupied, so it would look empty."""
    if not latents.isfinite().all():
        raise Fault("EmptyResult", f"the model's {what} are not finite: its numbers overflowed on these views")


class _Progress:
    """Reports the done share of a run's steps."""

    def __init__(self, asked: Request, progressed: Callable[[float], None]) -> None:
        self._total = STRUCTURE_STEP_COST * asked.structure_steps + LATENT_STEP_COST * asked.latent_steps
        self._done, self._progressed = 0, progressed

    def by(self, cost: int) -> None:
        self._done += cost
        self._progressed(min(1.0, self._done / self._total))


class _Timer:
    """Seconds between marks."""

    def __init__(self, device: torch.device) -> None:
        self._device, self.seconds = device, dict[str, float]()
        self._last = self._now()

    def _now(self) -> float:
        if self._device.type == "cuda":  # kernels run behind Python
            torch.cuda.synchronize(self._device)
        return time.perf_counter()

    def mark(self, phase: str) -> None:
        now = self._now()
        self.seconds[phase] = now - self._last
        self._last = now
