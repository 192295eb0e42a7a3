"""The renderer against closed forms: spheres, planes, textures of known layout."""

from __future__ import annotations

import io

import numpy as np
import pytest
import trimesh
from PIL import Image
from trimesh.visual.material import PBRMaterial
from trimesh.visual.texture import TextureVisuals

from tasks.capture.camera import Camera
from tasks.geometry.render import RayScene, depth_map, preview, render, sample_texture
from tests.synthetic import look_at

RED, GREEN, BLUE, GREY = (220, 30, 30), (30, 220, 30), (30, 30, 220), (128, 128, 128)
CORNERS = np.array([[0.0, 0], [1, 0], [1, 1], [0, 1]])


def camera_at(eye: tuple[float, float, float], size: int = 64, focal: float = 80.0) -> Camera:
    pose = look_at(np.array(eye), np.zeros(3))
    return Camera(size, size, focal, focal, size / 2 + 1.5, size / 2 - 0.75, pose)


def textured_square(texture: Image.Image) -> trimesh.Trimesh:
    """A 2 x 2 square in the xz plane that faces -y; the texture's upper left is at -x, +z."""
    square = trimesh.Trimesh([[-1, 0, -1], [1, 0, -1], [1, 0, 1], [-1, 0, 1]], [[0, 1, 2], [0, 2, 3]], process=False)
    square.visual = TextureVisuals(uv=CORNERS, material=PBRMaterial(baseColorTexture=texture))
    return square


def four_colours() -> Image.Image:
    """Upper row red, green; lower row blue, grey."""
    return Image.fromarray(np.array([[RED, GREEN], [BLUE, GREY]], np.uint8)).resize((64, 64), Image.Resampling.NEAREST)


def test_depth_of_a_sphere_is_the_analytic_one() -> None:
    radius = 0.15
    mesh = trimesh.creation.icosphere(subdivisions=6, radius=radius)
    camera = camera_at((0.3, -0.9, 0.4), size=96, focal=240)
    rays, eye = camera.rays(), camera.centre
    a, b, c = (rays**2).sum(axis=1), rays @ eye, eye @ eye - radius**2
    inside = b**2 - a * c
    expected = np.where(inside > 0, (-b - np.sqrt(np.maximum(inside, 0))) / a, 0).reshape(96, 96)
    depth = depth_map(mesh, camera)
    assert depth.dtype == np.float32
    disagree = (depth > 0) != (expected > 0)
    assert disagree.sum() <= 0.002 * (expected > 0).sum()
    clear = (inside > 0.001).reshape(96, 96)
    assert clear.sum() > 3000
    assert np.abs(depth - expected)[clear].max() < 5e-5


def test_depth_keeps_its_precision_far_from_the_origin() -> None:
    far = np.array([500_000.0, -300_000.0, 1000.0])
    mesh = trimesh.creation.icosphere(subdivisions=4, radius=0.15)
    near_camera = camera_at((0.3, -0.9, 0.4), focal=200)
    pose = near_camera.camera_to_world.copy()
    pose[:3, 3] += far
    far_camera = Camera(64, 64, 200, 200, near_camera.cx, near_camera.cy, pose)
    near = depth_map(mesh, near_camera)
    mesh.apply_translation(far)
    there = depth_map(mesh, far_camera)
    both = (near > 0) & (there > 0)
    assert both.sum() > 1000
    assert np.abs(near - there)[both].max() < 1e-5


def test_projection_undoes_the_rays() -> None:
    pose = look_at(np.array([0.4, -0.8, 0.5]), np.zeros(3), roll=0.3)
    camera = Camera(40, 30, 50.0, 55.0, 19.0, 16.0, pose, distortion=(-0.1, 0.02, 0.001, -0.002))
    depth = np.random.default_rng(0).uniform(0.5, 2.0, 1200)
    pixels, found = camera.project(camera.centre + camera.rays() * depth[:, None])
    column, row = np.meshgrid(np.arange(40) + 0.5, np.arange(30) + 0.5)
    assert np.abs(found - depth).max() < 1e-9
    assert np.abs(pixels - np.column_stack([column.ravel(), row.ravel()])).max() < 1e-3


def test_what_projects_to_a_pixel_is_seen_there() -> None:
    camera = camera_at((0.1, -1.0, 0.2), size=80, focal=100)
    for target in ((0.2, 0.0, 0.0), (0.0, 0.0, 0.25), (-0.1, 0.1, -0.2)):
        ball = trimesh.creation.icosphere(subdivisions=3, radius=0.02)
        ball.apply_translation(target)
        mask = render(ball, camera).mask
        seen = np.argwhere(mask).mean(axis=0)[::-1] + 0.5
        pixel, _ = camera.project(np.array([target]))
        assert np.abs(seen - pixel[0]).max() < 0.5


def test_texture_is_upright_and_not_mirrored() -> None:
    image = render(textured_square(four_colours()), camera_at((0, -3, 0), focal=64)).image
    upper_left, upper_right, lower_left, lower_right = image[20, 20], image[20, 45], image[45, 20], image[45, 45]
    for found, expected in ((upper_left, RED), (upper_right, GREEN), (lower_left, BLUE), (lower_right, GREY)):
        assert np.abs(found.astype(int) - expected).max() <= 1


@pytest.mark.parametrize("kind", ["glb", "obj"])
def test_texture_survives_a_file(kind: str) -> None:
    square = textured_square(four_colours())
    camera = camera_at((0.4, -3, 0.5), focal=64)
    if kind == "glb":
        loaded = trimesh.load_mesh(io.BytesIO(trimesh.exchange.gltf.export_glb(square.scene())), file_type="glb")
    else:
        text, files = trimesh.exchange.obj.export_obj(square, return_texture=True)
        resolver = trimesh.resolvers.ZipResolver({k: io.BytesIO(v) for k, v in files.items()})
        loaded = trimesh.load_mesh(io.StringIO(text), file_type="obj", resolver=resolver)
    before, after = render(square, camera), render(loaded, camera)
    assert before.mask.sum() > 500
    assert np.abs(before.image.astype(int) - after.image).max() <= 1


def test_texels_are_sampled_between_their_centres() -> None:
    texels = np.array([[[0.0, 0, 0], [100, 0, 0]], [[0, 200, 0], [100, 200, 0]]], np.float32)
    uv = np.array([[0.25, 0.75], [0.75, 0.75], [0.25, 0.25], [0.5, 0.5], [0.5, 0.75], [1.25, -0.25]])
    expected = [[0, 0, 0], [100, 0, 0], [0, 200, 0], [50, 100, 0], [50, 0, 0], [0, 0, 0]]
    assert np.allclose(sample_texture(texels, uv), expected)


def test_vertex_and_face_colours_and_plain_materials() -> None:
    camera = camera_at((0, -3, 0), focal=64)
    square = textured_square(four_colours())
    faces, vertices, plain = square.copy(), square.copy(), square.copy()
    faces.visual = trimesh.visual.ColorVisuals(faces, face_colors=[[*RED, 255], [*BLUE, 255]])
    vertices.visual = trimesh.visual.ColorVisuals(vertices, vertex_colors=[[*RED, 255]] * 2 + [[*BLUE, 255]] * 2)
    plain.visual = TextureVisuals(uv=CORNERS, material=PBRMaterial(baseColorFactor=[*GREEN, 255]))
    by_face, by_vertex = render(faces, camera).image, render(vertices, camera).image
    assert tuple(by_face[42, 45]) == RED and tuple(by_face[20, 25]) == BLUE
    middle = by_vertex[32, 33].astype(int)  # just below the optical axis
    assert np.abs(middle - np.mean([RED, BLUE], axis=0)).max() < 8
    assert tuple(render(plain, camera).image[32, 32]) == GREEN


def test_supersampling_smooths_colours_and_leaves_mask_and_depth() -> None:
    stripes = np.zeros((64, 64, 3), np.uint8)
    stripes[:, ::2] = 255
    scene = RayScene(textured_square(Image.fromarray(stripes)))
    camera = camera_at((0.1, -6, 0.1), focal=64)
    plain, smooth = render(scene, camera), render(scene, camera, supersample=4)
    assert (plain.mask == smooth.mask).all() and (plain.depth == smooth.depth).all()
    assert smooth.image[smooth.mask].std() < 0.6 * plain.image[plain.mask].std()
    assert smooth.image[smooth.mask].mean() == pytest.approx(127.5, abs=6)
    assert not smooth.image[~smooth.mask].any()


def test_preview_shows_the_front_from_azimuth_0_and_the_top_from_above() -> None:
    box = trimesh.creation.box((1, 1, 1))
    colour_of = {(0, 0, 1): RED, (1, 0, 0): GREEN, (0, 1, 0): BLUE}
    colours = [colour_of.get(tuple(np.rint(n).astype(int)), GREY) for n in box.face_normals]
    box.visual = trimesh.visual.ColorVisuals(box, face_colors=[[*c, 255] for c in colours])
    for azimuth, elevation, colour in ((0, 0, RED), (90, 0, GREEN), (0, 90, BLUE), (180, 0, GREY)):
        picture = preview(box, azimuth_deg=azimuth, elevation_deg=elevation, size=64)
        assert picture.shape == (64, 64, 3) and picture.dtype == np.uint8
        assert np.argmax(picture[32, 32]) == np.argmax(colour)
        assert picture[0, 0].min() > 230  # background
    assert np.ptp(preview(box, azimuth_deg=180, elevation_deg=0, size=64)[32, 32].astype(int)) == 0


def test_preview_holds_the_whole_mesh() -> None:
    stick = trimesh.creation.cylinder(radius=0.01, height=2.0, sections=16)
    stick.apply_translation([5, 0, 0])
    picture = preview(stick, azimuth_deg=90, elevation_deg=0, size=128)
    background = picture[0, 0]
    edge = np.concatenate([picture[0], picture[-1], picture[:, 0], picture[:, -1]])
    assert (edge == background).all()
    columns = np.flatnonzero((picture != background).any(axis=(0, 2)))
    assert 100 < np.ptp(columns) < 128
