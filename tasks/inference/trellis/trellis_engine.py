"""The `trellis` engine: TRELLIS-VGGT (ReconViaGen) on CUDA, in a child process that can be killed.

This side imports neither torch nor trellis; what runs in the child is in `trellis_process.py`.
"""

from __future__ import annotations

import atexit
import fcntl
import importlib.util
import json
import logging
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import load, save

from tasks.capture.capture_checks import Needs
from tasks.capture.views import View
from tasks.errors import (
    DeviceLost,
    EmptyResult,
    EngineUnavailable,
    InferenceFailed,
    InferenceTimeout,
    OutOfMemory,
    WeightsMissing,
)
from tasks.inference.trellis.trellis_process import Channel, Message
from tasks.settings import ExporterName, InferParameters, settings
from tasks.weights.local import environment, find, require
from tasks.weights.pins import bundle

TRELLIS_VERSION = "1"
PIPELINE = "Stable-X/trellis-vggt-v0-2"
SCHEMA = 1
FEW_VIEWS = 8

NVIDIA_SMI_SECONDS = 20
POLL_SECONDS = 0.2
KILL_WAIT_SECONDS = 10.0
SHUTDOWN_WAIT_SECONDS = 5.0
LAST_WORDS_BYTES = 2000
LAST_WORDS_LINES = 3

_CHILD = Path(__file__).with_name("trellis_process.py")
# A child dies with the thread that started it (PR_SET_PDEATHSIG goes by thread): this one lives as long as the process
_STARTER = ThreadPoolExecutor(1, thread_name_prefix="trellis-starter")

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Runtime:
    """Where and how the model runs on this machine; nothing here changes a result.

    weights: the folder or the hub's name that `from_pretrained` takes. environment: added to the child's (where the
    weights are). root: upstream's checkout, where `trellis` is not installed. scratch: holds what is compiled and
    tuned, so it is worth a volume.
    """

    weights: str
    scratch: Path
    environment: Mapping[str, str] = field(default_factory=dict)
    root: Path | None = None
    python: str = sys.executable
    time_limit_s: float = 1800.0
    min_free_vram_gib: float = 18.0
    min_free_vram_gib_many_views: float = 20.0

    def min_free_gib(self, views: int) -> float:
        """GPU memory that an inference of so many views needs."""
        return self.min_free_vram_gib if views <= FEW_VIEWS else self.min_free_vram_gib_many_views

    def child_environment(self) -> dict[str, str]:
        """The child's whole environment; what is compiled and tuned is kept on the scratch volume."""
        inherited = dict(os.environ)
        kept = {
            "TRITON_CACHE_DIR": "triton",
            "TORCHINDUCTOR_CACHE_DIR": "inductor",
            "TORCH_EXTENSIONS_DIR": "torch_extensions",
            "CUDA_CACHE_PATH": "cuda",
        }
        if inherited.pop("PYTHONDONTWRITEBYTECODE", ""):  # images say so: upstream's imports would take 17 s, not 6
            kept["PYTHONPYCACHEPREFIX"] = "bytecode"
        places = {name: str(self.scratch / "trellis" / folder) for name, folder in kept.items()}
        paths = [] if self.root is None else [self.root, self.root / "wheels" / "vggt"]
        search = [str(path.resolve()) for path in paths] + list(filter(None, [inherited.get("PYTHONPATH")]))
        forced = {
            "SPCONV_ALGO": "native",  # the default measures every algorithm at the start
            "PYTHONPATH": os.pathsep.join(search),
            "PYTHONSAFEPATH": "1",  # beside the child's script lies a trellis.py that is not upstream's
            "PYTHONUNBUFFERED": "1",
            "TQDM_DISABLE": "1",
        }
        return places | inherited | dict(self.environment) | forced


def vertex_colours(vertex_attrs: NDArray[np.float32] | None) -> NDArray[np.float32] | None:
    """RGB 0..1 (n, 3) of a mesh's attributes, where it has any; the model may leave 0..1 by a little."""
    return None if vertex_attrs is None else vertex_attrs[:, :3].clip(0, 1)


def runtime_here() -> Runtime:
    """With this machine's weights; raises WeightsMissing where the bundle is not on it."""
    return runtime_with(environment(find(bundle(masks=True)) or require(bundle())))


def runtime_with(environment: Mapping[str, str]) -> Runtime:
    """As this process's settings say."""
    here = settings()
    return Runtime(
        weights=PIPELINE,
        scratch=here.scratch,
        environment=environment,
        root=here.trellis_root,
        python=str(here.trellis_python),
        time_limit_s=here.trellis_time_limit_s,
        min_free_vram_gib=here.trellis_min_free_gib,
        min_free_vram_gib_many_views=here.trellis_min_free_gib_many_views,
    )


def gpus() -> list[str]:
    """The NVIDIA GPUs that the driver lists; none where there is no driver."""
    command = shutil.which("nvidia-smi")
    if command is None:
        return []
    try:
        told = subprocess.run([command, "-L"], capture_output=True, text=True, timeout=NVIDIA_SMI_SECONDS, check=True)
    except (OSError, subprocess.SubprocessError) as error:
        log.warning("nvidia-smi fails: %s", error)
        return []
    return told.stdout.strip().splitlines()


@dataclass(frozen=True, eq=False)
class TrellisOutput:
    """What the model made of a capture, in its own frame: z-up, within [-0.5, 0.5]^3, of no metric size.

    vertices (n, 3) float32, faces (m, 3) int32, vertex_attrs (n, 6) float32: RGB 0..1 and normal, where the model gives
    them. gaussians: upstream's raw float32 tensors by name (xyz, features_dc, scaling, rotation, opacity: before
    biases and activations); gaussian_init: what its `Gaussian` is constructed with. views: those that were used;
    reduced: fewer than asked for, as memory did not suffice. measured: seconds and peak GiB, not kept.
    """

    vertices: NDArray[np.float32]
    faces: NDArray[np.int32]
    vertex_attrs: NDArray[np.float32] | None
    gaussians: dict[str, NDArray[np.float32]]
    gaussian_init: dict[str, Any]
    variant: str
    views: tuple[str, ...]
    reduced: bool
    to_capture: NDArray[np.float64] | None = None
    measured: dict[str, float] = field(default_factory=dict)

    @property
    def colours(self) -> NDArray[np.float32] | None:
        """RGB 0..1 of the vertices (n, 3), where the model gives them."""
        return vertex_colours(self.vertex_attrs)

    def to_safetensors(self) -> bytes:
        """All of it but `to_capture` and `measured`; what is no tensor goes to the file's metadata."""
        meta = {
            "schema": SCHEMA,
            "gaussian_init": self.gaussian_init,
            "variant": self.variant,
            "views": self.views,
            "reduced": self.reduced,
        }
        return save(self._tensors(), {"trellis": json.dumps(meta, sort_keys=True)})

    @staticmethod
    def from_safetensors(data: bytes, to_capture: NDArray[np.float64] | None = None) -> TrellisOutput:
        """What `to_safetensors` wrote."""
        header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
        meta = json.loads(header["__metadata__"]["trellis"])
        tensors = load(data)
        return TrellisOutput(
            vertices=tensors["vertices"],
            faces=tensors["faces"],
            vertex_attrs=tensors.get("vertex_attrs"),
            gaussians=_gaussians(tensors),
            gaussian_init=meta["gaussian_init"],
            variant=meta["variant"],
            views=tuple(meta["views"]),
            reduced=meta["reduced"],
            to_capture=to_capture,
        )

    def _tensors(self) -> dict[str, NDArray[Any]]:
        tensors: dict[str, NDArray[Any]] = {"vertices": self.vertices, "faces": self.faces}
        if self.vertex_attrs is not None:
            tensors["vertex_attrs"] = self.vertex_attrs
        return tensors | {f"gaussians.{name}": array for name, array in self.gaussians.items()}


@dataclass(frozen=True, eq=False)
class Textured:
    """What upstream's `to_glb` made, turned back to z-up.

    vertices: (n, 3) float32. faces: (m, 3) int32. uv: (n, 2) float32, v upwards. texture: (px, px, 3) uint8 sRGB, its
    first row at v = 1. decimated_by: pyvista or its substitute.
    """

    vertices: NDArray[np.float32]
    faces: NDArray[np.int32]
    uv: NDArray[np.float32]
    texture: NDArray[np.uint8]
    decimated_by: str
    measured: dict[str, float] = field(default_factory=dict)


class Trellis:
    """TRELLIS-VGGT on this machine's GPU. The model stays loaded from one call to the next, until `close`.

    `runtime` is asked at every call: a changed one starts a new process.
    """

    version = TRELLIS_VERSION
    needs = Needs(cameras=False, metric_depth=False, min_views=1)
    exporter: ExporterName = "to_glb"
    has_weights = True
    closed = False
    shares_model = True

    def __init__(self, runtime: Callable[[], Runtime] | None = None) -> None:
        self._runtime = runtime or runtime_here
        self._process: TrellisProcess | None = None
        self._loaded: Message | None = None
        self._lock = threading.Lock()  # one GPU, one capture at a time

    def missing(self) -> str | None:
        """Why it cannot run on this machine, as far as is quickly seen; weights apart."""
        if not gpus():
            return "no NVIDIA GPU here (nvidia-smi lists none)"
        here = settings()
        ours = here.trellis_python == Path(sys.executable) and here.trellis_root is None
        if ours and importlib.util.find_spec("trellis") is None:
            return "no `trellis` package here; install upstream's, or set CAPTURE2MESH_TRELLIS_ROOT to its checkout"
        return None

    def most_views(self, parameters: InferParameters) -> int | None:
        return parameters.trellis.max_views

    def reconstruct(
        self, views: Sequence[View], parameters: InferParameters, progress: Callable[[float], None]
    ) -> TrellisOutput:
        """The views' object. Out of memory is tried again with the same views, then with half of them."""
        failed: list[OutOfMemory] = []
        for attempt in (views, views, views[::2]):
            try:
                return self._infer(attempt, parameters, progress, reduced=len(attempt) < len(views))
            except OutOfMemory as error:
                log.warning("out of GPU memory with %d views: %s", len(attempt), error)
                failed.append(error)
        first = failed[0]
        tried = f"{first} (tried with {len(views)}, {len(views)} and {len(views[::2])} views)"
        raise OutOfMemory(tried, first.needed_gib, first.free_gib) from first

    def to_glb(self, output: TrellisOutput, simplify: float = 0.95, texture_px: int = 1024) -> Textured:
        """Upstream's exporter: decimated, hidden faces removed, the texture baked from renders of the gaussians.

        Not deterministic to the last bit. It needs nvdiffrast and the gaussian rasteriser (non-commercial licences).
        """
        asked = {"gaussian_init": output.gaussian_init, "simplify": simplify, "texture_px": texture_px}
        with self._lock:
            answer = self._running().request("to_glb", asked, output._tensors())
        arrays, header = answer.arrays, answer.header
        return Textured(**arrays, decimated_by=header["decimated_by"], measured=header["seconds"])

    def close(self) -> None:
        """End the model's process and give its GPU memory back."""
        with self._lock:
            if self._process is not None:
                self._process.shutdown()
            self._process = None

    def _infer(
        self, views: Sequence[View], parameters: InferParameters, progress: Callable[[float], None], reduced: bool
    ) -> TrellisOutput:
        model = parameters.trellis
        asked = {
            "views": [view.name for view in views],
            "seed": parameters.seed,
            **model.model_dump(include={"ss_steps", "ss_cfg", "slat_steps", "slat_cfg"}),
        }
        arrays: dict[str, NDArray[Any]] = {}
        for index, view in enumerate(views):
            arrays |= {f"{index}.image": view.image, f"{index}.mask": view.mask}
        with self._lock:
            process = self._running()
            needed = {"min_free_gib": process.runtime.min_free_gib(len(views))}
            if self._loaded is None:
                self._loaded = process.request("load", {"weights": process.runtime.weights} | needed)
                log.info("model loaded: %s", self._loaded.header)
            answer = process.request("infer", asked | needed, arrays, progress)
        header = answer.header
        log.info("inference of %d views: %s, peak %.1f GiB", len(views), header["seconds"], header["peak_gib"])
        return TrellisOutput(
            vertices=answer.arrays["vertices"],
            faces=answer.arrays["faces"],
            vertex_attrs=answer.arrays.get("vertex_attrs"),
            gaussians=_gaussians(answer.arrays),
            gaussian_init=header["gaussian_init"],
            variant=header["variant"],
            views=tuple(view.name for view in views),
            reduced=reduced,
            measured=header["seconds"] | {"peak_gib": header["peak_gib"]},
        )

    def _running(self) -> TrellisProcess:
        """The process to ask, a new one where there is none or it has ended."""
        runtime = self._runtime()
        if self._process is not None and self._process.alive and self._process.runtime == runtime:
            return self._process
        if self._process is not None:
            self._process.kill()
        self._process, self._loaded = TrellisProcess(runtime), None
        return self._process


class TrellisProcess:
    """The child, from its start to its end. Whatever interrupts a request ends it: the pipe would be out of step."""

    def __init__(self, runtime: Runtime) -> None:
        self.runtime = runtime
        self._output = tempfile.TemporaryFile()  # noqa: SIM115  (lives as long as the child)
        # the child goes on at the end of what `request` cut, not behind a hole
        fcntl.fcntl(self._output, fcntl.F_SETFL, fcntl.fcntl(self._output, fcntl.F_GETFL) | os.O_APPEND)
        folder = runtime.scratch / "trellis"
        folder.mkdir(parents=True, exist_ok=True)
        ours, theirs = socket.socketpair()
        self._socket, self._channel = ours, Channel(ours, POLL_SECONDS)
        with theirs:
            self._process = _STARTER.submit(
                subprocess.Popen,
                [runtime.python, str(_CHILD), str(theirs.fileno()), str(os.getpid())],
                cwd=folder,  # upstream makes folders where it runs
                env=runtime.child_environment(),
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
                stdout=self._output,
                stderr=self._output,
                start_new_session=True,  # a Ctrl-C is the parent's to handle
            ).result()
        atexit.register(self.kill)

    @property
    def alive(self) -> bool:
        """Whether it can be asked."""
        return self._process.poll() is None and self._socket.fileno() >= 0

    @property
    def pid(self) -> int:
        return self._process.pid

    def request(
        self,
        operation: str,
        header: Mapping[str, Any] | None = None,
        arrays: Mapping[str, NDArray[Any]] | None = None,
        progress: Callable[[float], None] = lambda _: None,
    ) -> Message:
        """Ask and wait for the answer; raises what the child's fault means here, or that its time is over."""
        deadline = time.monotonic() + self.runtime.time_limit_s

        def waiting() -> None:
            if time.monotonic() > deadline:
                limit = f"{self.runtime.time_limit_s:g} s"
                raise InferenceTimeout(f"engine trellis: {operation} took longer than {limit}; its process was ended")

        self._output.truncate(0)
        try:
            self._channel.send(Message({"operation": operation, **(header or {})}, dict(arrays or {})), waiting)
            while (answer := self._channel.receive(waiting)).header["kind"] == "progress":
                progress(answer.header["fraction"])
        except EOFError:
            raise DeviceLost(f"engine trellis: its process ended in {operation} ({self._end()})") from None
        except BaseException:
            self.kill()
            raise
        if answer.header["kind"] == "error":
            self._raise(answer.header)
        return answer

    def shutdown(self) -> None:
        """Let it end by itself."""
        try:
            self._channel.send(Message({"operation": "shutdown"}))
            self._process.wait(SHUTDOWN_WAIT_SECONDS)
        except (EOFError, OSError, subprocess.TimeoutExpired) as error:
            log.debug("the model's process did not end by itself: %r", error)
        self.kill()

    def kill(self) -> None:
        """End it, whatever it does. Its children, compilers mostly, go with it."""
        atexit.unregister(self.kill)
        with suppress(ProcessLookupError):
            if self._process.poll() is None:
                os.killpg(self._process.pid, signal.SIGKILL)
        try:
            self._process.wait(KILL_WAIT_SECONDS)
        except subprocess.TimeoutExpired:
            log.error("process %d does not end: the GPU's driver holds it", self._process.pid)
        self._socket.close()
        self._output.close()

    def _end(self) -> str:
        """How a child that closed the pipe ended, and its last words."""
        with suppress(subprocess.TimeoutExpired):
            self._process.wait(SHUTDOWN_WAIT_SECONDS)
        status = self._process.returncode
        how = "still there" if status is None else f"signal {-status}" if status < 0 else f"exit status {status}"
        self._output.seek(0, os.SEEK_END)
        self._output.seek(max(0, self._output.tell() - LAST_WORDS_BYTES))
        # of a progress bar what it showed last
        words = [line.rpartition("\r")[2] for line in self._output.read().decode(errors="replace").split("\n")]
        last = " / ".join([line.strip() for line in words if line.strip()][-LAST_WORDS_LINES:])
        self.kill()
        return f"{how}; its last words: {last}" if last else how

    def _raise(self, error: Mapping[str, Any]) -> NoReturn:
        message = f"engine trellis: {error['message']}"
        match error["fault"]:
            case "OutOfMemory":
                raise OutOfMemory(message, error["needed_gib"], error["free_gib"])
            case "DeviceLost":
                self.kill()
                raise DeviceLost(message)
            case "EmptyResult":
                raise EmptyResult(message)
            case "MissingImport":
                raise EngineUnavailable(
                    f"engine trellis: cannot import {error['name']}, which upstream's `trellis` needs:"
                    f" {error['message']}; run `python -m flows doctor`"
                )
            case "WeightsMissing":
                raise WeightsMissing(f"{message}; run `python -m flows weights fetch`")
            case "NoCuda" | "Unsupported":
                raise EngineUnavailable(f"{message}; run `python -m flows doctor`")
            case _:
                raise InferenceFailed(message)


def _gaussians(tensors: Mapping[str, NDArray[Any]]) -> dict[str, NDArray[np.float32]]:
    prefix = "gaussians."
    return {name.removeprefix(prefix): array for name, array in tensors.items() if name.startswith(prefix)}
