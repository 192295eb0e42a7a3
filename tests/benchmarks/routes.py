"""What the benchmarks share: captures, our route through its pure functions, and the figures of a textured mesh."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import trimesh
from PIL import Image
from trimesh.visual.material import PBRMaterial
from trimesh.visual.texture import TextureVisuals

from tasks.capture.views import View, load_views
from tasks.geometry.render import RayScene, render
from tasks.geometry.simplification import simplify, simplify_open
from tasks.geometry.texture import bake, unwrap
from tasks.inference.fusion.fuse import fuse
from tasks.settings import FusionParameters
from tests.synthetic import SUPERSAMPLE, chamfer, f_score, psnr

FACES = 20_000
TEXTURE_PX = 1024
HOLD_OUT = 6  # every 6th view
SAMPLE = Path(__file__).parents[1] / "data" / "mug"


@dataclass(frozen=True)
class Figures:
    """Chamfer distance in percent of the truth's bounding-box diagonal, F-score at 1 % of it, dB on held-out views:
    over the true silhouettes, where a missing surface is black, and over the part of them that has a surface."""

    seconds: float
    chamfer: float
    f_score: float
    watertight: bool
    components: int
    faces: int
    psnr: float
    psnr_covered: float


def load(folder: Path) -> list[View]:
    """All views of a capture on disk."""
    names = [path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()]
    return load_views(names, lambda name: (folder / name).read_bytes())


def split(views: Sequence[View]) -> tuple[list[View], list[View]]:
    """Views to work with, and those held out."""
    used = [view for index, view in enumerate(views) if index % HOLD_OUT]
    return used, list(views[::HOLD_OUT])


def our_route(views: Sequence[View]) -> tuple[trimesh.Trimesh, dict[str, float]]:
    """Views -> a textured mesh in the capture's frame, and the seconds of each step."""
    seconds: dict[str, float] = {}
    clock = time.perf_counter()

    def lap(step: str) -> None:
        nonlocal clock
        seconds[step], clock = time.perf_counter() - clock, time.perf_counter()

    surface = fuse(views, FusionParameters(), lambda _: None)
    lap("fuse")
    reduce = simplify if surface.subject.kind == "object" else simplify_open
    simplified = reduce(surface.vertices, surface.faces, FACES, surface.spread_m)
    lap("simplify")
    unwrapped = unwrap(simplified.vertices, simplified.faces, TEXTURE_PX)
    lap("unwrap")
    texture, _ = bake(unwrapped, [view.of(surface.subject) for view in views], TEXTURE_PX)
    lap("bake")
    visual = TextureVisuals(uv=unwrapped.uv, material=PBRMaterial(baseColorTexture=Image.fromarray(texture)))
    return trimesh.Trimesh(unwrapped.vertices, unwrapped.faces, visual=visual, process=False), seconds


def figures(mesh: trimesh.Trimesh, truth: trimesh.Trimesh, held_out: Sequence[View], seconds: float) -> Figures:
    """Measures a textured mesh, welded by position, against the truth and the views that it has not seen."""
    welded = trimesh.Trimesh(mesh.vertices, mesh.faces, process=False)
    welded.merge_vertices(merge_tex=True, merge_norm=True)
    diagonal = float(np.linalg.norm(truth.extents))
    whole, covered = held_out_psnr(mesh, held_out)
    return Figures(
        seconds=seconds,
        chamfer=100 * chamfer(welded, truth) / diagonal,
        f_score=f_score(welded, truth, 0.01 * diagonal),
        watertight=bool(welded.is_watertight),
        components=int(welded.body_count),
        faces=len(welded.faces),
        psnr=whole,
        psnr_covered=covered,
    )


def held_out_psnr(mesh: trimesh.Trimesh, held_out: Sequence[View]) -> tuple[float, float]:
    """Mean over the views of the PSNR (dB), over the true silhouettes and over what the mesh covers of them."""
    scene, values = RayScene(mesh), []
    for view in held_out:
        assert view.camera is not None
        rendering = render(scene, view.camera, supersample=SUPERSAMPLE)
        masks = (view.mask, view.mask & rendering.mask)
        values.append([psnr(rendering.image, view.image, mask) for mask in masks])
    whole, covered = np.mean(values, axis=0) if values else (np.nan, np.nan)
    return float(whole), float(covered)
