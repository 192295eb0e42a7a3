"""Time and quality of the native export of a mesh as TRELLIS makes them: `python tests/benchmarks/native_export.py`.

The mesh is synthetic: a bowl with a handle and a relief, of 650k faces with vertex colours and the defects of a model's
output. Beside it, the steps that a fusion mesh takes. Wall seconds need an idle machine; CPU seconds less so. With a
path: writes the GLB there.
"""

from __future__ import annotations

import resource
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import numpy as np
import trimesh
from numpy.typing import NDArray
from scipy.spatial import cKDTree

sys.path.insert(0, str(Path(__file__).parents[2]))

from tasks.geometry.gaussians import Gaussians
from tasks.geometry.render import sample_texture
from tasks.geometry.simplification import simplify
from tasks.geometry.solids import repair, solidify
from tasks.geometry.texture import Unwrapped, VertexColours, bake, unwrap
from tasks.mesh.export import glb_of
from tests.support.surface_gaussians import gaussians_on, trained
from tests.synthetic import OBJECT_CENTRE, OBJECT_HALF, Points, bowl, chamfer, field_mesh, pattern

CELLS = 260  # along the object: gives 656k faces
FACES = 20_000
GAUSSIANS = 430_000
TEXTURE_PX = 1024
SHEET_RADIUS = 0.138  # in the middle of the bowl's wall

Result = TypeVar("Result")


@dataclass(frozen=True)
class Dense:
    """vertices (n, 3) float32 metres, faces (m, 3) int32 and colours (n, 3) float32 in 0..1; whole: without defects."""

    vertices: NDArray[np.float32]
    faces: NDArray[np.int32]
    colours: NDArray[np.float32]
    whole: trimesh.Trimesh


def cup(p: Points) -> NDArray[np.floating]:
    """Signed distance to the bowl with a handle and a relief."""
    handle = np.hypot(np.hypot(p[:, 0] - 0.135, p[:, 2] + 0.02) - 0.03, p[:, 1]) - 0.008
    return np.minimum(bowl(p), handle) + 0.0015 * np.sin(p * 160).prod(axis=1)


def colours_at(points: Points) -> NDArray[np.float32]:
    """The cup's colours, (n, 3) in 0..1."""
    return np.asarray(pattern(points + OBJECT_CENTRE) / 255, np.float32)


def dense_mesh(cells: int = CELLS, seed: int = 0) -> Dense:
    """The cup about the origin, with holes, doubled and turned faces, fins, a sheet within its wall and crumbs."""
    rng = np.random.default_rng(seed)
    whole = field_mesh(cup, OBJECT_HALF, cells)
    soup = trimesh.util.concatenate([_torn(whole, cells, rng), _sheet(), *_crumbs(rng)])
    vertices = np.asarray(soup.vertices, np.float32)
    return Dense(vertices, np.asarray(soup.faces, np.int32), colours_at(vertices), whole)


def _torn(whole: trimesh.Trimesh, cells: int, rng: np.random.Generator) -> trimesh.Trimesh:
    """Uneven vertices, a large hole and small ones, turned and doubled faces, and fins that share an edge with two."""
    step = 2 * OBJECT_HALF / cells
    vertices = whole.vertices + rng.normal(scale=0.05 * step, size=whole.vertices.shape)
    faces, middles = whole.faces.copy(), vertices[whole.faces].mean(axis=1)
    holes = rng.choice(len(faces), 13, replace=False)
    radii = np.append(rng.uniform(1, 6, 12) * step, 0.01)
    distance, nearest = cKDTree(middles[holes]).query(middles)
    faces = faces[distance > radii[nearest]]
    some = rng.choice(len(faces), len(faces) // 800, replace=False)
    turned, doubled, backs, fins = (part.copy() for part in np.array_split(some, 4))
    faces[turned] = faces[turned][:, ::-1]
    wings = np.column_stack([faces[fins][:, :2], len(vertices) + np.arange(len(fins))])
    tips = vertices[faces[fins, 2]] + rng.normal(scale=2 * step, size=(len(fins), 3))
    all_faces = np.concatenate([faces, faces[doubled], faces[backs][:, ::-1], wings])
    return trimesh.Trimesh(np.concatenate([vertices, tips]), all_faces, process=False)


def _sheet() -> trimesh.Trimesh:
    """An open sheet that no view can see, a tenth of the cup in area."""
    ball = trimesh.creation.icosphere(subdivisions=6, radius=SHEET_RADIUS)
    ball.update_faces(ball.triangles_center[:, 2] < -0.09)
    return ball


def _crumbs(rng: np.random.Generator) -> list[trimesh.Trimesh]:
    """Small balls all over the place, every third of them open."""
    crumbs = []
    for index in range(30):
        crumb = trimesh.creation.icosphere(subdivisions=2, radius=rng.uniform(0.001, 0.005))
        crumb.update_faces(np.arange(len(crumb.faces)) >= (0 if index % 3 else 5))
        crumb.apply_translation(rng.uniform(-OBJECT_HALF, OBJECT_HALF, 3))
        crumbs.append(crumb)
    return crumbs


def timed(step: str, work: Callable[[], Result]) -> Result:
    """The work's result; prints its wall and CPU seconds."""
    wall, before = time.perf_counter(), resource.getrusage(resource.RUSAGE_SELF)
    result = work()
    wall, after = time.perf_counter() - wall, resource.getrusage(resource.RUSAGE_SELF)
    cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    print(f"{step:32} {wall:6.2f} s {cpu:6.2f} s CPU")
    return result


def export(dense: Dense, gaussians: Gaussians) -> tuple[Unwrapped, NDArray[np.uint8], NDArray[np.uint8], bytes]:
    """Export such a mesh as export_glb does without cameras, and its texture with vertex colours alone."""
    solid = timed("  solidify", lambda: solidify(dense.vertices, dense.faces, FACES))
    surface = timed("  simplify", lambda: simplify(*solid, FACES))
    print(f"  export error {surface.error}")
    unwrapped = timed("  unwrap", lambda: unwrap(surface.vertices, surface.faces, TEXTURE_PX))
    colours = VertexColours(dense.vertices, dense.colours)
    texture, _ = timed("  bake", lambda: bake(unwrapped, (), TEXTURE_PX, colours, gaussians))
    glb = timed("  GLB", lambda: glb_of(unwrapped, texture))
    plain, _ = timed("  (bake from vertices alone)", lambda: bake(unwrapped, (), TEXTURE_PX, colours))
    return unwrapped, texture, plain, glb


def describe(name: str, vertices: NDArray[np.floating], faces: NDArray[np.integer], truth: trimesh.Trimesh) -> None:
    mesh = trimesh.Trimesh(vertices, faces, process=False)
    mesh.merge_vertices(merge_tex=True, merge_norm=True)
    share = 100 * chamfer(mesh, truth) / np.linalg.norm(truth.extents)
    closed = f"watertight {mesh.is_watertight}, {mesh.body_count} component(s)"
    print(f"{name}: {len(faces)} faces, {closed}, Chamfer {share:.4f} % of the diagonal")


def colour_error(unwrapped: Unwrapped, texture: NDArray[np.uint8]) -> NDArray[np.floating]:
    """Distance of the texture from the true colours in the middle of every face, (m,), of 255."""
    shown = sample_texture(texture.astype(np.float32), unwrapped.uv[unwrapped.faces].mean(axis=1))
    true = 255 * colours_at(unwrapped.vertices[unwrapped.faces].mean(axis=1))
    return np.asarray(np.abs(shown - true).max(axis=1))


def main() -> None:
    dense = dense_mesh()
    print(f"dense: {len(dense.vertices)} vertices, {len(dense.faces)} faces")
    gaussians = trained(gaussians_on(dense.whole, GAUSSIANS, colours_at), dense.whole, colours_at)
    unwrapped, texture, plain, glb = timed("native export", lambda: export(dense, gaussians))
    repaired = timed("repair alone", lambda: repair(dense.vertices, dense.faces))
    describe("native export", unwrapped.vertices, unwrapped.faces, dense.whole)
    describe("repair alone", *repaired, dense.whole)
    for source, image in (("vertices", plain), ("gaussians", texture)):
        errors = colour_error(unwrapped, image)
        told = f"median error {np.median(errors):.1f}, 99th percentile {np.percentile(errors, 99):.1f} of 255"
        print(f"colours of {source}: {told}")
    for path in sys.argv[1:]:
        Path(path).write_bytes(glb)


if __name__ == "__main__":
    main()
