"""Every layout gives the same views and cameras, from a folder and from a bucket."""

from __future__ import annotations

import json
from pathlib import Path

import fsspec
import numpy as np
import pytest

from tasks.capture.layouts import LAYOUTS, content_of, read_layout
from tasks.capture.listing import list_capture, list_captures
from tasks.capture.subject import Box
from tasks.capture.views import View, views_of
from tasks.errors import InputError
from tests.support.tiny import FUSION, Content, ball_depth, encoded, report
from tests.synthetic.layouts import HEIGHT, WIDTH, WRITERS, Shot, bop, colmap, own, polycam, redwood, scene, tum

SHOTS = scene()

each_layout = pytest.mark.parametrize("layout", WRITERS)


def views_in(content: Content, part: str = "") -> list[View]:
    return list(views_of(read_layout(list(content), content.__getitem__, part), content.__getitem__))


def put(folder: Path, content: Content) -> Path:
    for path, data in content.items():
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_bytes(data)
    return folder


def in_order(views: list[View]) -> list[tuple[View, Shot]]:
    """Each view with the shot that it shows: names may sort otherwise."""

    def unlike(view: View, shot: Shot) -> float:
        return float(np.abs(view.image.astype(float) - shot.image).mean())

    return [(view, min(SHOTS, key=lambda shot: unlike(view, shot))) for view in views]


@each_layout
def test_views_and_cameras_are_those_that_were_written(layout: str) -> None:
    name, write = WRITERS[layout]
    content = write(SHOTS)
    found = read_layout(list(content), content.__getitem__)
    assert (found.name, found.camera_problems, found.problems, found.warnings) == (name, (), (), ())
    pairs = in_order(views_in(content))
    assert len(pairs) == len(SHOTS)
    assert len({id(shot) for _, shot in pairs}) == len(SHOTS)
    first, first_shot = pairs[0]
    assert first.camera is not None
    # the world may be turned as a whole
    world = first.camera.camera_to_world @ np.linalg.inv(first_shot.camera.camera_to_world)
    for view, shot in pairs:
        camera, true = view.camera, shot.camera
        assert camera is not None and view.depth is not None
        np.testing.assert_allclose(camera.camera_to_world, world @ true.camera_to_world, atol=2e-3)
        found_lens = (camera.width, camera.height, camera.fl_x, camera.fl_y, camera.cx, camera.cy)
        assert found_lens == pytest.approx((WIDTH, HEIGHT, true.fl_x, true.fl_y, true.cx, true.cy), abs=1e-4)
        np.testing.assert_allclose(view.depth, shot.depth, atol=6e-4)
    # z is up: the cameras are higher and higher
    if name not in ("7-scenes", "rgbd-folders", "colmap", "tum", "bop"):
        np.testing.assert_allclose(world[2, :3], [0, 0, 1], atol=1e-6)


@each_layout
def test_what_is_listed_is_all_that_is_read(layout: str) -> None:
    name, write = WRITERS[layout]
    content = write(SHOTS)
    kept = content_of([*content, "notes.txt", "preview.gif"])
    read: list[str] = []

    def reader(path: str) -> bytes:
        read.append(path)
        return content[path]

    found = read_layout(kept, reader)
    views = list(views_of(found, reader))
    assert found.name == name
    assert len(views) == len(SHOTS)
    assert set(read) <= kept < {*content, "notes.txt", "preview.gif"}


@each_layout
def test_a_capture_in_it_is_accepted(layout: str) -> None:
    name, write = WRITERS[layout]
    content = write(SHOTS)
    kept = {path: content[path] for path in content_of(content)}
    found = report(kept, FUSION)
    assert (found.layout, len(found.views), found.has_cameras) == (name, len(SHOTS), True)


def test_every_layout_of_a_dataset_is_found(tmp_path: Path) -> None:
    for layout, (_, write) in WRITERS.items():
        put(tmp_path / "sets" / layout, write(SHOTS))
    found = list_captures(str(tmp_path))
    assert [(listing.id, listing.layout.name, listing.views) for listing in found] == sorted(
        (f"sets/{layout}", name, len(SHOTS)) for layout, (name, _) in WRITERS.items()
    )
    for listing in found:
        assert list_capture(listing.uri, str(tmp_path)) == listing


@each_layout
def test_a_bucket_gives_the_same(layout: str, tmp_path: Path) -> None:
    _, write = WRITERS[layout]
    content, memory = write(SHOTS), fsspec.filesystem("memory")
    for path, data in content.items():
        memory.pipe_file(f"/layouts/{layout}/{path}", data)
    there, here = list_capture(f"memory://layouts/{layout}"), list_capture(str(put(tmp_path / layout, content)))
    assert [(file.path, file.bytes) for file in there.files] == [(file.path, file.bytes) for file in here.files]
    assert there.layout.name == here.layout.name


def test_each_object_of_a_scene_is_a_capture(tmp_path: Path) -> None:
    put(tmp_path / "000048", bop(SHOTS, objects=2))
    found = list_captures(str(tmp_path))
    assert [listing.id for listing in found] == ["000048/object_5", "000048/object_6"]
    assert [list_capture(listing.uri, str(tmp_path)) for listing in found] == found
    with pytest.raises(InputError, match=r"holds 2 objects; name one \(.*000048/object_5, .*object_6\)"):
        list_capture(str(tmp_path / "000048"))
    content = bop(SHOTS, objects=2)
    for part, column in (("object_5", 0), ("object_6", 1)):
        for view, shot in in_order(views_in(content, part)):
            assert view.camera is not None and view.depth is not None
            seen = (shot.depth > 0) & (np.arange(WIDTH) % 2 == column)
            np.testing.assert_array_equal(view.depth > 0, seen)
            np.testing.assert_array_equal(view.mask, shot.depth > 0)  # what hides it is not background
            moved = view.camera.centre - shot.camera.centre
            np.testing.assert_allclose(moved, [-0.5 * column, 0, 0], atol=1e-6)


def test_objects_of_one_scene_are_different_work(own_store: Path, tmp_path: Path) -> None:
    from tasks.capture.stage_capture import stage_capture

    put(tmp_path / "000048", bop(SHOTS, objects=2))
    captures = [stage_capture(listing) for listing in list_captures(str(tmp_path))]
    assert captures[0].files == captures[1].files
    assert len({capture.digest for capture in captures}) == 2
    assert len(list(captures[1].views())) == len(SHOTS)


def test_views_and_depth_alone_are_a_capture_without_cameras() -> None:
    for pictures in ("views", "images", "rgb", "color"):
        content = {path: data for path, data in own(SHOTS).items() if path != "transforms.json"}
        content = {path.replace("views/", f"{pictures}/"): data for path, data in content.items()}
        found = read_layout(list(content), content.__getitem__)
        assert [view.depth is not None for view in found.views] == [True] * len(SHOTS)
        assert not found.cameras.frames and not found.camera_problems


def test_low_confidence_is_no_reading() -> None:
    content = polycam(SHOTS, corrected=False)
    low = np.full((HEIGHT, WIDTH), 255, np.uint8)
    low[:, ::2] = 0
    content = {path: encoded(low) if "/confidence/" in path else data for path, data in content.items()}
    for view in views_in(content):
        assert view.depth is not None
        assert not view.depth[:, ::2].any() and view.depth.any()


@pytest.mark.parametrize(("layout", "medium", "high"), [("polycam", 54, 255), ("stray scanner", 1, 2)])
def test_confidence_weighs_the_readings(layout: str, medium: int, high: int) -> None:
    levels = np.full((HEIGHT // 2, WIDTH // 2), high, np.uint8)  # of half the depth map's size
    levels[0], levels[1] = 0, medium
    content = {
        path: encoded(levels) if "confidence/" in path else data for path, data in WRITERS[layout][1](SHOTS).items()
    }
    for view in views_in(content):
        assert view.confidence is not None and view.depth is not None and view.confidence.dtype == np.float32
        rows = [np.unique(view.confidence[row]) for row in (0, 1, 2, 3, 4, HEIGHT - 1)]
        np.testing.assert_array_equal(np.ravel(rows), [0, 0, 0.5, 0.5, 1, 1])
        near = view.within(Box.between(np.array([[-0.01] * 3, [0.01] * 3])))
        np.testing.assert_array_equal(near.confidence, view.confidence)


def test_a_mask_path_is_the_mask() -> None:
    content = own(SHOTS)
    transforms = json.loads(content["transforms.json"])
    for index, frame in enumerate(transforms["frames"]):
        frame["mask_path"] = f"masks/{index}.png"
        content[f"masks/{index}.png"] = encoded((SHOTS[index].depth > 0) * np.uint8(255))
    content["transforms.json"] = json.dumps(transforms).encode()
    for view, shot in in_order(views_in(content)):
        np.testing.assert_array_equal(view.mask, shot.depth > 0)


def test_pictures_that_the_cameras_leave_out_are_left_out_and_told() -> None:
    content = WRITERS["ns-process-data"][1](SHOTS)
    transforms = json.loads(content["transforms.json"])
    del transforms["frames"][2]
    content["transforms.json"] = json.dumps(transforms).encode()
    found = read_layout(list(content), content.__getitem__)
    assert len(found.views) == len(SHOTS) - 1
    assert [warning.where for warning in found.warnings] == ["images/frame_00003.png"]


def test_tum_of_a_known_rig_needs_no_intrinsics() -> None:
    content = tum(SHOTS)
    del content["intrinsics.txt"]
    without = read_layout(list(content), content.__getitem__)
    assert [problem.what for problem in without.camera_problems] == ["gives poses without intrinsics"]
    header = b"# ground truth trajectory\n# file: 'rgbd_dataset_freiburg2_desk.bag'\n"
    content["groundtruth.txt"] = header + content["groundtruth.txt"]
    known = read_layout(list(content), content.__getitem__)
    lens = next(iter(known.cameras.lenses.values()))
    assert (lens.w, lens.fl_x, lens.cx) == (640, 520.9, 325.6)


def test_a_frame_whose_tracking_was_lost_is_left_out() -> None:
    content = WRITERS["7-scenes"][1](SHOTS)
    content["frame-000002.pose.txt"] = b"-inf -inf -inf -inf " * 3 + b"0 0 0 1"
    found = read_layout(list(content), content.__getitem__)
    assert len(found.views) == len(SHOTS) - 1 and not found.camera_problems
    assert [warning.where for warning in found.warnings] == ["frame-000002.pose.txt"]


def test_a_colmap_model_whose_points_contradict_the_depth_is_refused() -> None:
    content = colmap(SHOTS)
    rng = np.random.default_rng(0)
    for path in [path for path in content if path.startswith("depth/")]:
        content[path] = encoded(rng.integers(200, 6000, (HEIGHT, WIDTH)).astype(np.uint16))
    found = read_layout(list(content), content.__getitem__)
    assert ["do not lie where the depth maps say" in problem.what for problem in found.camera_problems] == [True]


def test_a_colmap_model_without_points_is_taken_as_metres_with_a_warning() -> None:
    content = {path: data for path, data in colmap(SHOTS).items() if "points3D" not in path}
    found = read_layout(list(content), content.__getitem__)
    eye = next(iter(found.cameras.frames.values())).camera_to_world[:3, 3]
    assert np.linalg.norm(eye) == pytest.approx(4.0, rel=1e-6)
    assert [warning.todo for warning in found.warnings] == ["its unit is taken for metres"]


@pytest.mark.parametrize(
    ("layout", "path", "data", "what"),
    [
        ("polycam", "keyframes/cameras/103000000.json", b"{", "not valid JSON"),
        ("polycam", "keyframes/cameras/103000000.json", b"{}", "is wrong at fx"),
        ("record3d", "EXR_RGBD/metadata.json", b"[]", "is wrong at"),
        ("stray scanner", "odometry.csv", b"1,2,3", "has a line of 3 values, not 9"),
        ("stray scanner", "camera_matrix.csv", b"1,2,3", "holds 3 numbers"),
        ("tum", "groundtruth.txt", b"1 2 3", "not timestamp tx"),
        ("tum", "groundtruth.txt", b"", "not timestamp tx"),
        ("bop", "scene_gt.json", b"3", "is wrong at"),
        ("bop", "scene_camera.json", b'{"0": {"cam_K": [1]}}', "is wrong at"),
        ("7-scenes", "frame-000001.pose.txt", b"1 2 3", "holds 3 numbers, a pose has 16"),
        ("7-scenes", "camera-intrinsics.txt", b"words", "not a number"),
        ("redwood", "trajectory.log", b"0 0 1\n1 2 3 4", "not a trajectory"),
        ("redwood", "intrinsic.json", b"{}", "is wrong at"),
        ("scannet", "pose/1.txt", b"\xff\xfe\x00", "not a text file"),
        ("colmap binary", "sparse/0/images.bin", b"\1" * 64, "not a file of COLMAP's"),
        ("colmap binary", "sparse/0/cameras.bin", bytes(64), "holds 0 camera(s)"),
        ("colmap text", "sparse/0/cameras.txt", b"words", "not a file of COLMAP's"),
    ],
)
def test_a_broken_file_is_named(layout: str, path: str, data: bytes, what: str) -> None:
    content = WRITERS[layout][1](SHOTS) | {path: data}
    found = read_layout(list(content), content.__getitem__)
    told = [str(problem) for problem in (*found.camera_problems, *found.problems)]
    assert any(what in problem for problem in told), told
    assert all(problem.todo for problem in found.camera_problems)


def test_redwood_depth_is_found_by_number() -> None:
    content = redwood(SHOTS)
    found = read_layout(list(content), content.__getitem__)
    assert [view.depth for view in found.views] == sorted(path for path in content if path.startswith("depth/"))


def test_ball_is_seen() -> None:
    """The scene of these tests is not empty."""
    assert all((ball_depth(shot.camera) > 0).mean() > 0.1 for shot in SHOTS)


def test_a_recording_with_gaps_keeps_its_whole_frames() -> None:
    content = WRITERS["record3d"][1](SHOTS)
    del content["EXR_RGBD/depth/3.exr"], content["EXR_RGBD/rgb/1.png"]
    found = read_layout(list(content), content.__getitem__)
    assert [view.name for view in found.views] == ["0", "2", "4"]
    assert [(warning.where, warning.what) for warning in found.warnings] == [("EXR_RGBD/rgb/3.png", "has no depth map")]
    assert found.unmatched_depth == ()


def test_reduced_pictures_get_reduced_cameras() -> None:
    content = WRITERS["ns-process-data"][1](SHOTS)
    transforms = json.loads(content["transforms.json"])
    for frame in transforms["frames"]:
        frame["file_path"] = frame["file_path"].replace("images/", "images_2/")
    content = {path: data for path, data in content.items() if not path.startswith("images/")}
    content["transforms.json"] = json.dumps(transforms).encode()
    kept = {path: content[path] for path in content_of(content)}
    assert len(report(kept, FUSION).views) == len(SHOTS)
    camera = views_in(content)[0].camera
    assert camera is not None
    assert (camera.width, camera.fl_x, camera.cx, camera.cy) == (WIDTH // 2, 33.0, 16.5, 11.75)


def test_a_scene_of_bop_without_objects_is_in_its_own_frame() -> None:
    content = bop(SHOTS)
    cameras = json.loads(content["scene_camera.json"])
    for index, shot in enumerate(SHOTS):
        pose = np.linalg.inv(shot.opencv)
        cameras[str(index)] |= {"cam_R_w2c": pose[:3, :3].ravel().tolist(), "cam_t_w2c": (1000 * pose[:3, 3]).tolist()}
    content = {path: data for path, data in content.items() if path.startswith(("rgb/", "depth/"))}
    content["scene_camera.json"] = json.dumps(cameras).encode()
    for view, shot in in_order(views_in(content)):
        assert view.camera is not None
        np.testing.assert_allclose(view.camera.camera_to_world, shot.camera.camera_to_world, atol=1e-9)


@pytest.mark.parametrize(
    ("files", "what"),
    [
        (("mug/views/a.png", "cup/depth/a.png"), r"below: cup, mug; name one of them, or run `dataset`"),
        (("mug.zip",), r"mug.zip is an archive: unpack it: unzip mug.zip"),
        (("scan.tar.gz",), r"an archive: unpack it: tar xf"),
        (("20240101.bag",), r"RealSense.*RGBDVideoReader.create\('20240101.bag'\)"),
        (("output.mkv",), r"Azure Kinect.*--input output.mkv"),
        (("scene0000_00.sens", "scene0000_00.txt"), r"ScanNet.*--filename scene0000_00.sens"),
        (("rgb.mp4", "depth.mp4"), r"a video.*ffmpeg -i depth.mp4"),
        (("rgb.mp4", "odometry.csv", "camera_matrix.csv", "depth/0.png"), r"Stray Scanner: ffmpeg -i rgb.mp4"),
        (("depth/0.png", "notes.txt"), r"no pictures in views/"),
        (("scan.r3d",), r"Record3D.*EXR \+ JPG"),
        (("rgbd/0.jpg", "rgbd/0.depth", "metadata"), r"\.r3d of Record3D"),
        (("data.jsonl", "notes.txt"), r"sai-cli process"),
        (("IMG_1.jpg", "IMG_2.jpg"), r"pictures in the folder itself, but no depth maps or cameras"),
        (("images/IMG_1.jpg",), r"pictures in images, but no depth maps or cameras"),
        (("mesh.ply",), r"a finished model, not a capture"),
        (("notes.txt",), r"no capture there; a capture is a folder with views/"),
    ],
)
def test_what_is_not_a_capture_is_told_what_it_looks_like(files: tuple[str, ...], what: str, tmp_path: Path) -> None:
    put(tmp_path, dict.fromkeys(files, b"x"))
    with pytest.raises(InputError, match=what) as caught:
        list_capture(str(tmp_path))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("name", "what"),
    [
        ("mug.zip", "is an archive, not a folder: unpack it"),
        ("a.mkv", "Azure Kinect"),
        ("a.txt", "is a file, not a folder"),
    ],
)
def test_a_file_is_told_what_it_is(name: str, what: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(b"x")
    with pytest.raises(InputError, match=what):
        list_capture(str(tmp_path / name))


def test_a_path_that_does_not_exist_is_told_so(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="does not exist"):
        list_capture(str(tmp_path / "nowhere"))
    with pytest.raises(InputError, match="does not exist"):
        list_capture("memory://nowhere/at/all")


@pytest.mark.parametrize(
    "litter",
    [
        *("views/Icon\r", "views/.DS_Store", "views/view_000.png:Zone.Identifier", "views/@eaDir/view_000.png/T.png"),
        *("views/.ipynb_checkpoints/view_000-checkpoint.png", "__MACOSX/views/._view_000.png", "depth/Thumbs.db"),
        *("views/Desktop.ini", ".git/config", "views_$folder$", "views/view_000.png~"),
    ],
)
def test_litter_is_ignored_without_a_warning(litter: str, tmp_path: Path) -> None:
    put(tmp_path, own(SHOTS))
    clean = list_capture(str(tmp_path))
    put(tmp_path, {litter: b"x"})
    assert list_capture(str(tmp_path)) == clean


def test_markers_of_folders_in_a_bucket_are_no_files() -> None:
    memory = fsspec.filesystem("memory")
    for path, data in own(SHOTS).items():
        memory.pipe_file(f"/marked/{path}", data)
    assert list_capture("memory://marked").others == ()


def test_names_of_another_form_of_unicode_or_case_are_found() -> None:
    content = own(SHOTS)
    transforms = json.loads(content.pop("transforms.json"))
    renamed = {path.replace("view_", "Übung ").replace(".png", ".PNG"): data for path, data in content.items()}
    for frame in transforms["frames"]:
        frame["file_path"] = frame["file_path"].replace("view_", "U\u0308bung ")
        frame["depth_file_path"] = frame["file_path"].replace("views", "depth")
    renamed["transforms.json"] = json.dumps(transforms).encode()
    found = read_layout(list(renamed), renamed.__getitem__)
    assert not found.camera_problems
    assert [view.name for view in found.views] == [f"Übung {index:03d}" for index in range(len(SHOTS))]
    assert all(view.depth for view in found.views) and len(found.cameras.frames) == len(SHOTS)


def test_every_layout_is_in_the_page_and_has_a_writer() -> None:
    page = (Path(__file__).parents[2] / "tasks" / "capture" / "README.md").read_text()
    names = {reader.name for reader in LAYOUTS}
    assert [name for name in sorted(names) if f"| `{name}` |" not in page] == []
    assert {name for name, _ in WRITERS.values()} == names
