"""One small scene, a ball seen from cameras around it, written in each layout that is read, in memory."""

from __future__ import annotations

import io
import json
import struct
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.spatial.transform import Rotation

from tasks.capture.camera import Camera
from tests.support.tiny import Content, ball_depth, encoded

VIEWS, WIDTH, HEIGHT = 5, 64, 48
_TO_OPENCV = np.diag([1.0, -1, -1, 1])
# x, y (up), z of ARKit, in the order of this project: nerfstudio turns Polycam's axes like this
_Z_UP_TO_Y_UP = np.array([[0.0, 1, 0, 0], [0, 0, 1, 0], [1, 0, 0, 0], [0, 0, 0, 1]])


@dataclass(frozen=True)
class Shot:
    """One view of the scene."""

    camera: Camera
    image: NDArray[np.uint8]
    """(h, w, 3)"""
    depth: NDArray[np.float32]
    """(h, w) metres"""

    @property
    def opencv(self) -> NDArray[np.float64]:
        """Camera-to-world (4, 4) with y down and z ahead."""
        return self.camera.camera_to_world @ _TO_OPENCV

    @property
    def arkit(self) -> NDArray[np.float64]:
        """Camera-to-world (4, 4), OpenGL axes, in a world with y up."""
        return _Z_UP_TO_Y_UP @ self.camera.camera_to_world


def scene() -> list[Shot]:
    """Cameras at several heights, each rolled, around a ball at the origin."""
    rng = np.random.default_rng(3)
    shots = []
    for index in range(VIEWS):
        turn, rise = 2 * np.pi * index / VIEWS, 0.2 + 0.1 * index
        eye = np.array([np.sin(turn) * np.cos(rise), -np.cos(turn) * np.cos(rise), np.sin(rise)])
        right = np.cross([0, 0, 1], eye)
        right /= np.linalg.norm(right)
        pose = np.eye(4)
        pose[:3] = np.column_stack([right, np.cross(eye, right), eye, eye])
        pose[:3, :3] = pose[:3, :3] @ Rotation.from_rotvec([0.02, -0.03, 0.1 * index]).as_matrix()
        camera = Camera(WIDTH, HEIGHT, 66.0, 67.0, 33.0, 23.5, pose)
        image = rng.integers(0, 256, (HEIGHT, WIDTH, 3), dtype=np.uint8)
        shots.append(Shot(camera, image, ball_depth(camera)))
    return shots


def steps(depth: NDArray[np.float32], metres: float = 0.001) -> bytes:
    """A 16-bit PNG."""
    return encoded(np.rint(depth / metres).astype(np.uint16))


def _exr(depth: NDArray[np.float32]) -> bytes:
    import tempfile
    from pathlib import Path

    import OpenEXR

    header = {"compression": OpenEXR.ZIP_COMPRESSION, "type": OpenEXR.scanlineimage}
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "a.exr"
        OpenEXR.File(header, {"R": depth}).write(str(path))
        return path.read_bytes()


def _npy(pixels: NDArray[np.generic]) -> bytes:
    stream = io.BytesIO()
    np.save(stream, pixels)
    return stream.getvalue()


def _rows(matrix: NDArray[np.float64]) -> str:
    return "\n".join(" ".join(f"{value:.9f}" for value in row) for row in matrix)


def _quaternion(matrix: NDArray[np.float64]) -> list[float]:
    return Rotation.from_matrix(matrix[:3, :3]).as_quat().tolist()


def _k(camera: Camera, centre: float = 0.5) -> NDArray[np.float64]:
    """The camera matrix; centre: where the first pixel's centre lies in this project, and 0 in the layout."""
    return np.array([[camera.fl_x, 0, camera.cx - centre], [0, camera.fl_y, camera.cy - centre], [0, 0, 1]])


def own(shots: list[Shot]) -> Content:
    content = {}
    for index, shot in enumerate(shots):
        content[f"views/view_{index:03d}.png"] = encoded(shot.image)
        content[f"depth/view_{index:03d}.png"] = steps(shot.depth)
    frames = [(f"views/view_{index:03d}.png", None) for index in range(len(shots))]
    return content | {"transforms.json": _transforms(shots, frames)}


def _transforms(shots: list[Shot], files: list[tuple[str, str | None]], **top: object) -> bytes:
    camera = shots[0].camera
    lens = {"fl_x": camera.fl_x, "fl_y": camera.fl_y, "cx": camera.cx, "cy": camera.cy, "w": WIDTH, "h": HEIGHT}
    frames = [
        {"file_path": view, "transform_matrix": shot.camera.camera_to_world.tolist()}
        | ({} if depth is None else {"depth_file_path": depth})
        for shot, (view, depth) in zip(shots, files, strict=True)
    ]
    return json.dumps(lens | {"frames": frames} | top).encode()


def nerfstudio(shots: list[Shot]) -> Content:
    """As ns-process-data writes it, with reduced copies and a point cloud."""
    content: Content = {"sparse_pc.ply": b"ply"}
    files: list[tuple[str, str | None]] = []
    for index, shot in enumerate(shots, 1):
        name = f"frame_{index:05d}.png"
        content |= {f"images/{name}": encoded(shot.image), f"depth/{name}": steps(shot.depth)}
        content[f"images_2/{name}"] = encoded(np.ascontiguousarray(shot.image[::2, ::2]))
        files.append((f"./images/{name}", f"./depth/{name}"))
    return content | {"transforms.json": _transforms(shots, files, camera_model="OPENCV", aabb_scale=16)}


def instant_ngp(shots: list[Shot]) -> Content:
    """instant-ngp's keys for depth, as NeRFCapture writes them: rgb/, depth/."""
    content: Content = {}
    camera, frames = shots[0].camera, []
    for index, shot in enumerate(shots):
        content |= {f"rgb/{index}.png": encoded(shot.image), f"depth/{index}.png": steps(shot.depth, 10 / 65535)}
        frames.append(
            {
                "file_path": f"rgb/{index}.png",
                "depth_path": f"depth/{index}.png",
                "transform_matrix": shot.camera.camera_to_world.tolist(),
            }
        )
    top = {"fl_x": camera.fl_x, "fl_y": camera.fl_y, "cx": camera.cx, "cy": camera.cy, "w": WIDTH, "h": HEIGHT}
    top |= {"integer_depth_scale": 10 / 65535, "enable_depth_loading": True, "frames": frames}
    return content | {"transforms.json": json.dumps(top).encode()}


def several_cameras(shots: list[Shot]) -> Content:
    """A folder for each camera, backslashes of Windows, equal names."""
    content: Content = {}
    files: list[tuple[str, str | None]] = []
    for index, shot in enumerate(shots):
        name = f"cam{index % 2}/{index // 2:06d}.png"
        content |= {f"images/{name}": encoded(shot.image), f"depth/{name}": steps(shot.depth)}
        written = name.replace("/", "\\")
        files.append((f"images\\{written}", f"depth\\{written}"))
    return content | {"transforms.json": _transforms(shots, files)}


def blender(shots: list[Shot]) -> Content:
    """transforms_train.json and _test.json, names without a suffix, depth beside the pictures."""
    camera = shots[0].camera
    content: Content = {}
    for split, part in (("train", shots[:3]), ("test", shots[3:])):
        for index, shot in enumerate(part):
            content |= {f"{split}/r_{index}.png": encoded(shot.image)}
            content[f"{split}/r_{index}_depth_0001.png"] = steps(shot.depth)
        files: list[tuple[str, str | None]] = [(f"./{split}/r_{index}", None) for index in range(len(part))]
        content[f"transforms_{split}.json"] = _transforms(part, files, fl_x=camera.fl_x)
    return content


def polycam(shots: list[Shot], corrected: bool = True) -> Content:
    """The raw export; corrected: with the folders of Polycam's own optimisation, and wrong poses in the others."""
    content: Content = {"mesh_info.json": b"{}"}
    for index, shot in enumerate(shots):
        name, camera = str(103000000 + 1000 * index), shot.camera
        values: dict[str, object] = {
            "fx": camera.fl_x,
            "fy": camera.fl_y,
            "cx": camera.cx,
            "cy": camera.cy,
            "width": WIDTH,
        }
        values |= {"height": HEIGHT, "blur_score": 120.0, "timestamp": index}

        prefix = "corrected_" if corrected else ""
        if corrected:
            content |= {f"keyframes/images/{name}.jpg": encoded(shot.image, "JPEG")}
            content |= {f"keyframes/cameras/{name}.json": _keyframe(values, np.eye(4))}
        content[f"keyframes/{prefix}images/{name}.jpg"] = encoded(shot.image, "JPEG", quality=100, subsampling=0)
        content[f"keyframes/{prefix}cameras/{name}.json"] = _keyframe(values, shot.arkit)
        content[f"keyframes/depth/{name}.png"] = steps(shot.depth)
        content[f"keyframes/confidence/{name}.png"] = encoded(np.full((HEIGHT, WIDTH), 255, np.uint8))
    return content


def _keyframe(values: dict[str, object], pose: NDArray[np.float64]) -> bytes:
    return json.dumps(values | {f"t_{r}{c}": pose[r, c] for r in range(3) for c in range(4)}).encode()


def record3d(shots: list[Shot]) -> Content:
    camera = shots[0].camera
    content: Content = {"sound.m4a": b"x"}
    for index, shot in enumerate(shots):
        content[f"EXR_RGBD/rgb/{index}.png"] = encoded(shot.image)
        content[f"EXR_RGBD/depth/{index}.exr"] = _exr(shot.depth)
    metadata = {
        "w": WIDTH,
        "h": HEIGHT,
        "fps": 60,
        "K": _k(camera, 0).T.ravel().tolist(),
        "poses": [[*_quaternion(shot.arkit), *shot.arkit[:3, 3]] for shot in shots],
    }
    return content | {"EXR_RGBD/metadata.json": json.dumps(metadata).encode()}


def stray_scanner(shots: list[Shot]) -> Content:
    """With the frames of its video, and depth as NPY."""
    lines = ["timestamp, frame, x, y, z, qx, qy, qz, qw"]
    content: Content = {"imu.csv": b"", "rgb.mp4": b"x"}
    for index, shot in enumerate(shots):
        pose = shot.arkit @ _TO_OPENCV
        values = [*pose[:3, 3], *_quaternion(pose)]
        lines.append(", ".join([f"{index / 60:.6f}", f"{index:06d}", *(f"{value:.9f}" for value in values)]))
        content[f"rgb/{index:06d}.png"] = encoded(shot.image)
        content[f"depth/{index:06d}.npy"] = _npy(np.rint(shot.depth * 1000).astype(np.uint16))
        content[f"confidence/{index:06d}.png"] = encoded(np.full((HEIGHT, WIDTH), 2, np.uint8))
    matrix = "\n".join(", ".join(map(str, row)) for row in _k(shots[0].camera, 0))
    return content | {"odometry.csv": "\n".join(lines).encode(), "camera_matrix.csv": matrix.encode()}


def tum(shots: list[Shot]) -> Content:
    """Pictures and depth at times of their own, poses between them."""
    content: Content = {}
    colour, depth, poses = ["# color images"], ["# depth maps"], ["# timestamp tx ty tz qx qy qz qw"]
    for index, shot in enumerate(shots):
        time = 1305031102.175304 + index / 5
        content |= {
            f"rgb/{time:.6f}.png": encoded(shot.image),
            f"depth/{time + 0.01:.6f}.png": steps(shot.depth, 1 / 5000),
        }
        colour.append(f"{time:.6f} rgb/{time:.6f}.png")
        depth.append(f"{time + 0.01:.6f} depth/{time + 0.01:.6f}.png")
        values = [*shot.opencv[:3, 3], *_quaternion(shot.opencv)]
        for early in (-0.005, 0.005):
            poses.append(" ".join([f"{time + early:.4f}", *(f"{value:.9f}" for value in values)]))
    camera = shots[0].camera
    lens = f"{camera.fl_x} {camera.fl_y} {camera.cx - 0.5} {camera.cy - 0.5}"
    texts = {"rgb.txt": colour, "depth.txt": depth, "groundtruth.txt": poses, "intrinsics.txt": [lens]}
    return content | {name: "\n".join(lines).encode() for name, lines in texts.items()}


def bop(shots: list[Shot], objects: int = 1) -> Content:
    """A scene; a second object is the same ball, seen as half a metre further along x in its own frame."""
    content: Content = {}
    cameras, poses = {}, {}
    for index, shot in enumerate(shots):
        content |= {f"rgb/{index:06d}.png": encoded(shot.image), f"depth/{index:06d}.png": steps(shot.depth, 0.0001)}
        cameras[index] = {"cam_K": _k(shot.camera).ravel().tolist(), "depth_scale": 0.1}
        model_to_camera = np.linalg.inv(shot.opencv)
        poses[index] = []
        for number in range(objects):
            moved = model_to_camera @ np.array([[1, 0, 0, 0.5 * number], [0, 1, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1.0]])
            poses[index].append(
                {
                    "cam_R_m2c": moved[:3, :3].ravel().tolist(),
                    "cam_t_m2c": (1000 * moved[:3, 3]).tolist(),
                    "obj_id": 5 + number,
                }
            )
            seen = (shot.depth > 0) & (np.arange(WIDTH) % objects == number)
            content[f"mask_visib/{index:06d}_{number:06d}.png"] = encoded(seen * np.uint8(255))
            content[f"mask/{index:06d}_{number:06d}.png"] = encoded((shot.depth > 0) * np.uint8(255))
    return content | {"scene_camera.json": json.dumps(cameras).encode(), "scene_gt.json": json.dumps(poses).encode()}


def seven_scenes(shots: list[Shot]) -> Content:
    content: Content = {"camera-intrinsics.txt": _rows(_k(shots[0].camera)).encode()}
    for index, shot in enumerate(shots):
        depth = np.where(shot.depth > 0, np.rint(shot.depth * 1000), 65535).astype(np.uint16)
        content[f"frame-{index:06d}.color.png"] = encoded(shot.image)
        content[f"frame-{index:06d}.depth.png"] = encoded(depth)
        content[f"frame-{index:06d}.pose.txt"] = _rows(shot.opencv).encode()
    return content


def redwood(shots: list[Shot]) -> Content:
    """Open3D's folders with Redwood's names and trajectory."""
    log = []
    content: Content = {}
    for index, shot in enumerate(shots):
        content[f"color/{index + 1:07d}-{index * 33366:012d}.png"] = encoded(shot.image)
        content[f"depth/{index + 1:07d}-{index * 33366 + 16:012d}.png"] = steps(shot.depth)
        log.append(f"{index} {index} {index + 1}\n{_rows(shot.opencv)}")
    lens = {"width": WIDTH, "height": HEIGHT, "intrinsic_matrix": _k(shots[0].camera).T.ravel().tolist()}
    return content | {"trajectory.log": "\n".join(log).encode(), "intrinsic.json": json.dumps(lens).encode()}


def scannet(shots: list[Shot]) -> Content:
    """What ScanNet's reader of .sens files writes."""
    matrix = np.eye(4)
    matrix[:3, :3] = _k(shots[0].camera)
    content: Content = {"intrinsic/intrinsic_color.txt": _rows(matrix).encode()}
    for index, shot in enumerate(shots):
        content |= {f"color/{index}.png": encoded(shot.image), f"depth/{index}.png": steps(shot.depth)}
        content[f"pose/{index}.txt"] = _rows(shot.opencv).encode()
    return content


def bundle_sdf(shots: list[Shot]) -> Content:
    """Masks, cam_K.txt and the object's poses in the camera."""
    content: Content = {"cam_K.txt": _rows(_k(shots[0].camera)).encode()}
    for index, shot in enumerate(shots):
        content |= {f"rgb/{index:04d}.png": encoded(shot.image), f"depth/{index:04d}.png": steps(shot.depth)}
        content[f"masks/{index:04d}.png"] = encoded((shot.depth > 0) * np.uint8(255))
        content[f"ob_in_cam/{index:04d}.txt"] = _rows(np.linalg.inv(shot.opencv)).encode()
    return content


COLMAP_UNIT = 0.25
"""Metres that one unit of the written COLMAP model has"""


def colmap(shots: list[Shot], binary: bool = True) -> Content:
    """images/, depth/, sparse/0, in a unit of its own; its points lie on the ball."""
    content: Content = {}
    camera = shots[0].camera
    parameters = (camera.fl_x, camera.fl_y, camera.cx, camera.cy)
    images, points, number = [], {}, 0
    for index, shot in enumerate(shots, 1):
        content |= {f"images/img {index}.png": encoded(shot.image), f"depth/img {index}.png": steps(shot.depth)}
        rows, columns = np.nonzero(shot.depth)
        shown = []
        for row, column in list(zip(rows, columns, strict=True))[::40]:
            number += 1
            at = shot.camera.points(np.array([row]), np.array([column]), shot.depth[row, column : column + 1])[0]
            points[number] = at / COLMAP_UNIT
            shown.append((column + 0.5, row + 0.5, number))
        pose = np.linalg.inv(shot.opencv)
        x, y, z, w = _quaternion(pose)
        images.append((index, (w, x, y, z), pose[:3, 3] / COLMAP_UNIT, f"img {index}.png", shown))
    write = _colmap_binary if binary else _colmap_text
    return content | {f"sparse/0/{name}": data for name, data in write(parameters, images, points).items()}


def _colmap_binary(parameters: tuple[float, ...], images: list, points: dict) -> Content:
    cameras = struct.pack("<QIiQQ4d", 1, 7, 1, WIDTH, HEIGHT, *parameters)
    pictures = struct.pack("<Q", len(images))
    for index, quaternion, place, name, shown in images:
        pictures += struct.pack("<I7dI", index, *quaternion, *place, 7) + name.encode() + b"\0"
        pictures += struct.pack("<Q", len(shown) + 1) + struct.pack("<ddQ", 1.0, 1.0, 2**64 - 1)
        pictures += b"".join(struct.pack("<ddQ", *each) for each in shown)
    cloud = struct.pack("<Q", len(points))
    for number, place in points.items():
        cloud += struct.pack("<Q3d3BdQii", number, *place, 1, 2, 3, 0.5, 1, 1, 0)
    return {"cameras.bin": cameras, "images.bin": pictures, "points3D.bin": cloud}


def _colmap_text(parameters: tuple[float, ...], images: list, points: dict) -> Content:
    cameras = f"# Camera list\n7 PINHOLE {WIDTH} {HEIGHT} {' '.join(map(str, parameters))}\n"
    pictures = "# Image list\n"
    for index, quaternion, place, name, shown in images:
        pictures += f"{index} {' '.join(map(str, [*quaternion, *place]))} 7 {name}\n"
        pictures += " ".join(f"{x} {y} {number}" for x, y, number in shown) + "\n"
    cloud = "".join(f"{number} {' '.join(map(str, place))} 1 2 3 0.5 1 0\n" for number, place in points.items())
    return {"cameras.txt": cameras.encode(), "images.txt": pictures.encode(), "points3D.txt": cloud.encode()}


WRITERS: dict[str, tuple[str, Callable[[list[Shot]], Content]]] = {
    "own": ("capture2mesh", own),
    "ns-process-data": ("nerfstudio", nerfstudio),
    "instant-ngp": ("nerfstudio", instant_ngp),
    "several cameras": ("nerfstudio", several_cameras),
    "blender": ("blender", blender),
    "polycam": ("polycam", lambda shots: polycam(shots, corrected=False)),
    "polycam corrected": ("polycam", polycam),
    "record3d": ("record3d", record3d),
    "stray scanner": ("stray-scanner", stray_scanner),
    "tum": ("tum", tum),
    "bop": ("bop", bop),
    "7-scenes": ("7-scenes", seven_scenes),
    "redwood": ("rgbd-folders", redwood),
    "scannet": ("rgbd-folders", scannet),
    "bundle-sdf": ("rgbd-folders", bundle_sdf),
    "colmap binary": ("colmap", colmap),
    "colmap text": ("colmap", lambda shots: colmap(shots, binary=False)),
}
"""Each layout: its name in the report, and what writes it."""
