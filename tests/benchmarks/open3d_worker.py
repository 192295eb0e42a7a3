"""Open3D's own route from RGB-D views to a textured mesh; runs in Open3D's environment, speaks by .npz files.

VoxelBlockGrid fusion, quadric simplification, UV atlas, `project_images_to_albedo`: what its documentation offers.
https://www.open3d.org/docs/latest/tutorial/t_reconstruction_system/integration.html
"""

from __future__ import annotations

import sys
import time

import numpy as np
import open3d as o3d

VOXELS = 250  # along the object's longest side: 1.2 mm of 300 mm, where its error was found to be smallest
TRUNCATION = 4.0  # voxels; its default of 8 is less exact here
WEIGHT = 0.5  # a voxel that one view saw counts; its default of 3 leaves most of the error in holes
BLOCKS = 50_000
# Its texturing, unlike its fusion, has pixel centres at integers: without this it loses 3.5 dB on the sample
INTEGER_CENTRES = np.array([[0, 0, -0.5], [0, 0, -0.5], [0, 0, 0]])
DEPTH_MAX = 100.0


def fuse(data: dict[str, np.ndarray], voxel: float) -> o3d.t.geometry.TriangleMesh:
    grid = o3d.t.geometry.VoxelBlockGrid(
        attr_names=("tsdf", "weight"),
        attr_dtypes=(o3d.core.float32, o3d.core.float32),
        attr_channels=((1), (1)),
        voxel_size=voxel,
        block_resolution=16,
        block_count=BLOCKS,
    )
    for depth, intrinsic, extrinsic in zip(data["depth"], data["intrinsic"], data["extrinsic"], strict=True):
        image = o3d.t.geometry.Image(o3d.core.Tensor(depth))
        blocks = grid.compute_unique_block_coordinates(image, intrinsic, extrinsic, 1.0, DEPTH_MAX, TRUNCATION)
        grid.integrate(blocks, image, intrinsic, extrinsic, 1.0, DEPTH_MAX, TRUNCATION)
    return grid.extract_triangle_mesh(weight_threshold=WEIGHT)


def main(source: str, target: str) -> None:
    data = dict(np.load(source))
    seconds = {}
    clock = time.perf_counter()

    def lap(step: str) -> None:
        nonlocal clock
        seconds[step], clock = time.perf_counter() - clock, time.perf_counter()

    mesh = fuse(data, float(data["extent"]) / VOXELS)
    lap("fuse")
    faces = int(data["faces"])
    mesh = mesh.remove_non_manifold_edges()  # else the simplification stops early: at 570,000 faces on the sample
    mesh = mesh.simplify_quadric_decimation(1 - faces / len(mesh.triangle.indices))
    mesh = mesh.remove_non_manifold_edges()
    lap("simplify")
    size = int(data["texture_px"])
    mesh.compute_uvatlas(size=size)
    lap("unwrap")
    images = [o3d.t.geometry.Image(o3d.core.Tensor(image)) for image in data["image"]]
    intrinsics = [o3d.core.Tensor(matrix + INTEGER_CENTRES) for matrix in data["intrinsic"]]
    extrinsics = [o3d.core.Tensor(matrix) for matrix in data["extrinsic"]]
    texture = mesh.project_images_to_albedo(images, intrinsics, extrinsics, size)
    lap("bake")
    np.savez(
        target,
        vertices=mesh.vertex.positions.numpy(),
        faces=mesh.triangle.indices.numpy(),
        corner_uv=mesh.triangle["texture_uvs"].numpy(),
        texture=texture.as_tensor().numpy(),
        steps=list(seconds),
        seconds=list(seconds.values()),
    )


if __name__ == "__main__":
    main(*sys.argv[1:])
