"""Open3D's VoxelBlockGrid with colours: views in, the raw mesh out. Runs in Open3D's environment, by .npz files.

Started by `sensors.py`. https://www.open3d.org/docs/latest/tutorial/t_reconstruction_system/integration.html
"""

from __future__ import annotations

import resource
import sys
import time

import numpy as np
import open3d as o3d

TRUNCATION = 4.0  # voxels, as in open3d_worker.py
WEIGHT = 3.0  # readings that a voxel needs: Open3D's default, without which noise leaves crumbs everywhere
BLOCKS = 30_000
DEPTH_MAX = 1.5  # metres: the object and the table


def main(source: str, target: str) -> None:
    data = dict(np.load(source))
    start = time.perf_counter()
    grid = o3d.t.geometry.VoxelBlockGrid(
        attr_names=("tsdf", "weight", "color"),
        attr_dtypes=(o3d.core.float32, o3d.core.float32, o3d.core.float32),
        attr_channels=((1), (1), (3)),
        voxel_size=float(data["voxel"]),
        block_resolution=16,
        block_count=BLOCKS,
    )
    views = zip(
        data["depth"], data["image"], data["depth_intrinsic"], data["intrinsic"], data["extrinsic"], strict=True
    )
    for depth, image, depth_intrinsic, intrinsic, extrinsic in views:
        reading = o3d.t.geometry.Image(o3d.core.Tensor(depth))
        colour = o3d.t.geometry.Image(o3d.core.Tensor(image.astype(np.float32) / 255))
        cameras = (o3d.core.Tensor(depth_intrinsic), o3d.core.Tensor(intrinsic), o3d.core.Tensor(extrinsic))
        blocks = grid.compute_unique_block_coordinates(reading, cameras[0], cameras[2], 1.0, DEPTH_MAX, TRUNCATION)
        grid.integrate(blocks, reading, colour, *cameras, 1.0, DEPTH_MAX, TRUNCATION)
    mesh = grid.extract_triangle_mesh(weight_threshold=WEIGHT)
    np.savez(
        target,
        vertices=mesh.vertex.positions.numpy(),
        faces=mesh.triangle.indices.numpy(),
        colours=np.clip(mesh.vertex.colors.numpy(), 0, 1),
        seconds=time.perf_counter() - start,
        peak_mb=resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
    )


if __name__ == "__main__":
    main(*sys.argv[1:])
