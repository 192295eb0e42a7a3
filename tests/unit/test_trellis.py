"""The trellis engine's own side: its stored output, the splats, the channel, and the kinds of errors."""

from __future__ import annotations

import io
import socket
import threading
import time
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import trimesh
from numpy.typing import NDArray
from scipy.spatial.transform import Rotation

from tasks.errors import InferenceFailed, InferenceTimeout, OutOfMemory
from tasks.inference.registry import resolve_engine
from tasks.inference.trellis.model_process import Runtime
from tasks.inference.trellis.process.channel import Channel, Message
from tasks.inference.trellis.process.faults import fault_of
from tasks.inference.trellis.splats import gaussians_of, splat_ply
from tasks.inference.trellis.trellis_output import TrellisOutput
from tests.support.own_settings import forget

COUNT = 50
INRIA = "x y z nx ny nz f_dc_0 f_dc_1 f_dc_2 opacity scale_0 scale_1 scale_2 rot_0 rot_1 rot_2 rot_3"


def output(activation: str = "softplus", **changes: NDArray[np.float32]) -> TrellisOutput:
    rng = np.random.default_rng(0)
    shapes = {"xyz": (COUNT, 3), "features_dc": (COUNT, 1, 3), "scaling": (COUNT, 3), "rotation": (COUNT, 4)}
    gaussians = {name: rng.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}
    gaussians["opacity"] = rng.normal(size=(COUNT, 1)).astype(np.float32)
    return TrellisOutput(
        vertices=rng.normal(size=(9, 3)).astype(np.float32),
        faces=rng.integers(0, 9, (4, 3), dtype=np.int32),
        vertex_attrs=rng.normal(size=(9, 6)).astype(np.float32),
        gaussians=gaussians | changes,
        gaussian_init={
            "aabb": [-0.5, -0.5, -0.5, 1.0, 2.0, 3.0],
            "sh_degree": 0,
            "mininum_kernel_size": 0.0009,
            "scaling_bias": 0.004,
            "opacity_bias": 0.1,
            "scaling_activation": activation,
        },
        variant="GAP-LAB-CUHK-SZ",
        views=("a", "b"),
        reduced=True,
    )


def columns(ply: bytes) -> dict[str, NDArray[np.float32]]:
    """Read the columns with trimesh's reader of PLY files."""
    vertex = trimesh.load(io.BytesIO(ply), file_type="ply").metadata["_ply_raw"]["vertex"]
    return {name: vertex["data"][name].ravel() for name in vertex["properties"]}


def test_everything_that_rebuilds_upstreams_objects_is_kept() -> None:
    before = output()
    after = TrellisOutput.from_safetensors(before.to_safetensors())
    for name in ("vertices", "faces", "vertex_attrs"):
        np.testing.assert_array_equal(getattr(after, name), getattr(before, name))
        assert getattr(after, name).dtype == getattr(before, name).dtype
    assert after.gaussians.keys() == before.gaussians.keys()
    for name, array in before.gaussians.items():
        np.testing.assert_array_equal(after.gaussians[name], array)
    assert after.gaussian_init == before.gaussian_init
    assert (after.variant, after.views, after.reduced) == ("GAP-LAB-CUHK-SZ", ("a", "b"), True)


def test_the_same_output_has_the_same_bytes() -> None:
    assert output().to_safetensors() == output().to_safetensors()


@pytest.mark.parametrize("activation", ["softplus", "exp"])
def test_splats_hold_what_upstreams_gaussian_would_render(activation: str) -> None:
    """By the formulas of its properties: get_xyz, get_scaling, get_opacity, get_rotation."""
    made = output(activation)
    raw, found = made.gaussians, columns(splat_ply(made))
    assert list(found) == INRIA.split()
    xyz = np.stack([found[name] for name in "xyz"], axis=1)
    np.testing.assert_allclose(xyz, raw["xyz"] * [1, 2, 3] + [-0.5, -0.5, -0.5], rtol=1e-5, atol=1e-6)
    bias = np.log(np.expm1(0.004)) if activation == "softplus" else np.log(0.004)
    shifted = raw["scaling"].astype(float) + bias
    size = np.log1p(np.exp(shifted)) if activation == "softplus" else np.exp(shifted)
    scale = np.exp(np.stack([found[f"scale_{axis}"] for axis in range(3)], axis=1))
    np.testing.assert_allclose(scale, np.sqrt(size**2 + 0.0009**2), rtol=1e-4)
    logit = raw["opacity"][:, 0] + np.log(0.1 / 0.9)
    np.testing.assert_allclose(1 / (1 + np.exp(-found["opacity"])), 1 / (1 + np.exp(-logit)), rtol=1e-5)
    quaternion = raw["rotation"] + [1, 0, 0, 0]
    rotation = np.stack([found[f"rot_{index}"] for index in range(4)], axis=1)
    np.testing.assert_allclose(rotation, quaternion / np.linalg.norm(quaternion, axis=1, keepdims=True), atol=1e-6)
    colour = np.stack([found[f"f_dc_{index}"] for index in range(3)], axis=1)
    np.testing.assert_array_equal(colour, raw["features_dc"][:, 0])
    shown = gaussians_of(made)
    np.testing.assert_allclose(shown.colours, (raw["features_dc"][:, 0] * 0.2820948 + 0.5).clip(0, 1), atol=1e-6)
    np.testing.assert_allclose(shown.opacities, 1 / (1 + np.exp(-logit)), rtol=1e-5)
    assert not any(found[name].any() for name in ("nx", "ny", "nz"))


def test_splats_are_turned_with_their_frame() -> None:
    """A splat's covariance goes with the similarity: S C S^T."""
    similarity = np.eye(4)
    similarity[:3, :3] = 3 * Rotation.from_euler("xyz", [0.3, -1.0, 2.0]).as_matrix()
    similarity[:3, 3] = [1, 2, 3]
    before, after = columns(splat_ply(output())), columns(splat_ply(output(), similarity))

    def places_and_covariances(found: dict[str, NDArray[np.float32]]) -> tuple[NDArray[np.float64], ...]:
        rotation = Rotation.from_quat(np.stack([found[f"rot_{i}"] for i in range(4)], 1), scalar_first=True).as_matrix()
        scale = np.exp(np.stack([found[f"scale_{i}"] for i in range(3)], 1).astype(float))
        axes = rotation * scale[:, None]
        return np.stack([found[name] for name in "xyz"], 1).astype(float), axes @ axes.transpose(0, 2, 1)

    place, covariance = places_and_covariances(before)
    turned_place, turned_covariance = places_and_covariances(after)
    linear = similarity[:3, :3]
    np.testing.assert_allclose(turned_place, place @ linear.T + [1, 2, 3], atol=1e-5)
    np.testing.assert_allclose(turned_covariance, linear @ covariance @ linear.T, rtol=1e-3, atol=1e-9)


def test_view_dependent_colours_follow_the_layout_and_are_not_turned() -> None:
    rest = np.arange(COUNT * 9, dtype=np.float32).reshape(COUNT, 3, 3)  # degree 1: 3 coefficients of 3 channels
    made = output(features_rest=rest)
    found = columns(splat_ply(made))
    assert [name for name in found if name.startswith("f_rest_")] == [f"f_rest_{index}" for index in range(9)]
    assert [found[f"f_rest_{index}"][0] for index in range(9)] == [0, 3, 6, 1, 4, 7, 2, 5, 8]  # channel by channel
    with pytest.raises(InferenceFailed, match="view-dependent"):
        splat_ply(made, np.eye(4))


def test_arrays_and_headers_cross_the_pipe_unchanged() -> None:
    left, right = socket.socketpair()
    with left, right:
        sent = {
            "big": np.random.default_rng(0).normal(size=(300, 700)),
            "mask": np.array([[True, False]]),
            "empty": np.zeros((0, 3), np.float32),
            "strided": np.arange(12, dtype=np.uint8).reshape(3, 4)[:, ::2],
        }
        sender = threading.Thread(target=Channel(left).send, args=(Message({"operation": "x", "n": [1, 2.5]}, sent),))
        sender.start()
        received = Channel(right).receive()
        sender.join()
    assert received.header == {"operation": "x", "n": [1, 2.5]}
    assert list(received.arrays) == list(sent)
    for name, array in sent.items():
        np.testing.assert_array_equal(received.arrays[name], array)
        assert received.arrays[name].dtype == array.dtype


def test_waiting_ends_when_the_waiter_says_so() -> None:
    left, right = socket.socketpair()
    with left, right:
        channel = Channel(left, 0.01)

        def give_up() -> None:
            raise InferenceTimeout("too long")

        with pytest.raises(InferenceTimeout):
            channel.receive(give_up)
        right.send(bytes(5))
        with pytest.raises(InferenceTimeout):  # a message has begun
            channel.receive(give_up)
        with pytest.raises(InferenceTimeout):  # the other side reads nothing: the pipe fills
            channel.send(Message({}, {"big": np.zeros(10**7)}), give_up)


def test_a_message_that_comes_in_pieces_is_waited_for() -> None:
    left, right = socket.socketpair()
    sent, waited = np.arange(1000), 0

    def waiting() -> None:
        nonlocal waited
        waited += 1

    with left, right:
        Channel(left).send(Message({"n": 1}, {"sent": sent}))
        data = right.recv(10**6)

        def in_pieces() -> None:
            for piece in (data[:3], data[3:40], data[40:5000], data[5000:]):
                time.sleep(0.05)
                left.sendall(piece)

        sender = threading.Thread(target=in_pieces)
        sender.start()
        received = Channel(right, 0.01).receive(waiting)
        sender.join()
    np.testing.assert_array_equal(received.arrays["sent"], sent)
    assert waited >= 4


class CountingCalls:
    """A socket that counts what is called on it."""

    def __init__(self, inner: socket.socket) -> None:
        self.inner, self.calls = inner, Counter[str]()

    def __getattr__(self, name: str) -> object:
        self.calls[name] += 1
        return getattr(self.inner, name)


def test_an_array_crosses_in_one_call() -> None:
    """Each call then waits for Python's global lock: 5 ms beside a thread that computes."""
    left, right = socket.socketpair()
    with left, right:
        sending, receiving = CountingCalls(left), CountingCalls(right)
        ours, theirs = Channel(sending, 60), Channel(receiving, 60)  # type: ignore[arg-type]
        sender = threading.Thread(target=ours.send, args=(Message({}, {"big": np.zeros(10**7)}),))
        sender.start()
        theirs.receive()
        sender.join()
    assert sending.calls["send"] == 2  # the header first
    assert receiving.calls["recv_into"] == 3


def test_the_other_sides_end_is_seen() -> None:
    left, right = socket.socketpair()
    right.close()
    with left, pytest.raises(EOFError):
        Channel(left).receive()
    left, right = socket.socketpair()
    right.close()
    with left, pytest.raises(EOFError):
        Channel(left).send(Message({}, {"big": np.zeros(10**6)}))


class OutOfMemoryError(RuntimeError):
    """Named as torch's."""


class RepositoryNotFoundError(Exception):
    """Named as the hub's."""


class SurroundedError(Exception):
    """Raised by a handler in the place of the first error."""


def surrounded(first: Exception, hidden: bool = False) -> Exception:
    """Raise another error in the place of the first, as upstream's handlers do."""
    try:
        try:
            raise first
        except type(first):
            if hidden:
                raise SurroundedError("Repository Not Found") from None
            raise SurroundedError("Repository Not Found")  # noqa: B904
    except SurroundedError as error:
        return error


@pytest.mark.parametrize(
    ("error", "loading", "kind"),
    [
        (OutOfMemoryError("CUDA out of memory. Tried to allocate 2.50 GiB."), False, "OutOfMemory"),
        (RuntimeError("CUDA error: out of memory"), False, "OutOfMemory"),
        (RuntimeError("cuBLAS: CUBLAS_STATUS_ALLOC_FAILED when calling cublasCreate"), False, "OutOfMemory"),
        (RuntimeError("CUDA error: an illegal memory access was encountered"), False, "DeviceLost"),
        (RuntimeError("Cuda error: 719[cudaStreamSynchronize(stream);]"), False, "DeviceLost"),
        (RuntimeError("CUDA error: no kernel image is available for execution on the device"), False, "Other"),
        (ModuleNotFoundError("No module named 'spconv'", name="spconv"), True, "MissingImport"),
        (FileNotFoundError("hubconf.py"), True, "WeightsMissing"),
        (FileNotFoundError("hubconf.py"), False, "Other"),
        (ConnectionError("offline mode"), True, "WeightsMissing"),
        (RepositoryNotFoundError("404"), True, "WeightsMissing"),
        (ValueError("anything else"), True, "Other"),
    ],
)
def test_errors_keep_their_kind_even_when_a_handler_hides_them(error: Exception, loading: bool, kind: str) -> None:
    assert fault_of(error, loading)["fault"] == kind
    for hidden in (False, True):
        told = fault_of(surrounded(error, hidden), loading)
        assert told["fault"] == kind
        assert (
            told["message"] == f"{type(error).__name__}: {error} (it surfaced as SurroundedError: Repository Not Found)"
        )


def test_what_was_needed_is_read_from_the_message() -> None:
    assert fault_of(OutOfMemoryError("Tried to allocate 2.50 GiB."))["needed_gib"] == 2.5
    assert fault_of(OutOfMemoryError("Tried to allocate 512.00 MiB."))["needed_gib"] == 0.5
    assert fault_of(OutOfMemoryError("out of memory"))["needed_gib"] is None


def test_out_of_memory_survives_prefects_records() -> None:
    import cloudpickle

    error = cloudpickle.loads(cloudpickle.dumps(OutOfMemory("told", 18.0, 2.5)))
    assert (str(error), error.needed_gib, error.free_gib) == ("told", 18.0, 2.5)


def test_the_childs_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3")
    monkeypatch.setenv("SPCONV_ALGO", "auto")
    monkeypatch.setenv("TRITON_CACHE_DIR", "/elsewhere")
    monkeypatch.setenv("PYTHONPATH", "/before")
    monkeypatch.delenv("ATTN_BACKEND", raising=False)
    root = tmp_path / "upstream"
    runtime = Runtime("w", tmp_path / "scratch", environment={"HF_HUB_OFFLINE": "1"}, root=root)
    environment = runtime.child_environment()
    assert environment["SPCONV_ALGO"] == "native"
    assert environment["CUDA_VISIBLE_DEVICES"] == "3"
    assert environment["HF_HUB_OFFLINE"] == "1"
    assert environment["TRITON_CACHE_DIR"] == "/elsewhere"
    assert environment["TORCH_EXTENSIONS_DIR"] == str(tmp_path / "scratch/trellis/torch_extensions")
    assert environment["PYTHONPATH"].split(":") == [str(root), str(root / "wheels/vggt"), "/before"]
    assert "ATTN_BACKEND" not in environment


def test_bytecode_is_kept_on_the_scratch_volume_where_the_image_forbids_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("PYTHONPYCACHEPREFIX", raising=False)
    monkeypatch.setenv("PYTHONDONTWRITEBYTECODE", "1")
    environment = Runtime("w", tmp_path).child_environment()
    assert "PYTHONDONTWRITEBYTECODE" not in environment
    assert environment["PYTHONPYCACHEPREFIX"] == str(tmp_path / "trellis/bytecode")
    monkeypatch.delenv("PYTHONDONTWRITEBYTECODE")
    assert "PYTHONPYCACHEPREFIX" not in Runtime("w", tmp_path).child_environment()


def test_memory_needed_goes_by_the_number_of_views(tmp_path: Path) -> None:
    runtime = Runtime("w", tmp_path, min_free_vram_gib=18, min_free_vram_gib_many_views=20)
    assert [runtime.min_free_gib(views) for views in (1, 8, 9, 16)] == [18, 18, 20, 20]


def test_the_version_tells_our_networks_from_upstreams_package(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """It is part of the key of an inference: neither takes the other's results for its own."""
    monkeypatch.delenv("CAPTURE2MESH_TRELLIS_ROOT", raising=False)
    forget()
    ours = resolve_engine("trellis").version
    monkeypatch.setenv("CAPTURE2MESH_TRELLIS_ROOT", str(tmp_path))
    forget()
    assert resolve_engine("trellis").version != ours
