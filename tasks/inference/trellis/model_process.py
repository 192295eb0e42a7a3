"""The parent's side of the model's process: how it is started, asked and ended. For the engine and `doctor`.

This side imports neither torch nor trellis; the code of the child is in the folder `process`.
"""

from __future__ import annotations

import atexit
import fcntl
import logging
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn

from numpy.typing import NDArray

from tasks.errors import (
    DeviceLost,
    EmptyResult,
    EngineUnavailable,
    InferenceFailed,
    InferenceTimeout,
    OutOfMemory,
    WeightsCorrupt,
    WeightsMissing,
)
from tasks.inference.trellis.process.channel import Channel, Message
from tasks.settings import settings
from tasks.weights.local import environment, require
from tasks.weights.pins import bundle

PIPELINE = "Stable-X/trellis-vggt-v0-2"
FEW_VIEWS = 8

POLL_SECONDS = 0.2
KILL_WAIT_SECONDS = 10.0
SHUTDOWN_WAIT_SECONDS = 5.0
LAST_WORDS_BYTES = 2000
LAST_WORDS_LINES = 3

_CHILD = Path(__file__).with_name("process")
# A child dies with the thread that started it (PR_SET_PDEATHSIG goes by thread): this one lives as long as the process
_STARTER = ThreadPoolExecutor(1, thread_name_prefix="trellis-starter")

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Runtime:
    """Where and how the model runs on this machine. Nothing of it changes a result."""

    weights: str
    """The folder, or the name on the Hugging Face hub, that upstream's `from_pretrained` takes."""
    scratch: Path
    """Folder below which compiled and tuned code is kept. On a lasting volume later starts are faster."""
    environment: Mapping[str, str] = field(default_factory=dict)
    """Variables that are added to the child's environment: where the weights are."""
    root: Path | None = None
    """Upstream's checkout, whose package then runs; None for the networks in plain PyTorch."""
    gpu: str = ""
    """The GPU that the child sees, as `CUDA_VISIBLE_DEVICES` takes it; empty: those that this process sees."""
    device: str = "cuda"
    """`cuda`, or `cpu`, which takes minutes to hours."""
    python: str = sys.executable
    """The Python that runs the child."""
    time_limit_s: float = 1800.0
    """Longest time of one request, in seconds."""
    min_free_vram_gib: float = 18.0
    """Free GPU memory that an inference of up to 8 views needs, in GiB."""
    min_free_vram_gib_many_views: float = 20.0
    """Free GPU memory that an inference of more views needs, in GiB."""

    @property
    def model(self) -> str:
        """The model that the child runs."""
        return model_of(self.root)

    def min_free_gib(self, views: int) -> float:
        """Free GPU memory in GiB that an inference of so many views needs."""
        return self.min_free_vram_gib if views <= FEW_VIEWS else self.min_free_vram_gib_many_views

    def child_environment(self) -> dict[str, str]:
        """The child's whole environment; compiled and tuned code is kept in the scratch folder."""
        inherited = dict(os.environ)
        kept = {
            "TRITON_CACHE_DIR": "triton",
            "TORCHINDUCTOR_CACHE_DIR": "inductor",
            "TORCH_EXTENSIONS_DIR": "torch_extensions",
            "CUDA_CACHE_PATH": "cuda",
        }
        if inherited.pop("PYTHONDONTWRITEBYTECODE", ""):  # set in images: upstream's imports would take 17 s, not 6
            kept["PYTHONPYCACHEPREFIX"] = "bytecode"
        places = {name: str(self.scratch / "trellis" / folder) for name, folder in kept.items()}
        paths = [] if self.root is None else [self.root, self.root / "wheels" / "vggt"]
        search = [str(path.resolve()) for path in paths] + list(filter(None, [inherited.get("PYTHONPATH")]))
        forced = {
            "SPCONV_ALGO": "native",  # the default measures every algorithm at the start
            "PYTHONPATH": os.pathsep.join(search),
            "PYTHONSAFEPATH": "1",  # for upstream's own child processes: the working folder holds a `triton`, a `cuda`
            "PYTHONUNBUFFERED": "1",
            "TQDM_DISABLE": "1",
        }
        if self.gpu:
            forced["CUDA_VISIBLE_DEVICES"] = self.gpu
        return places | inherited | dict(self.environment) | forced


def model_of(root: Path | None) -> str:
    """The model of a process: `upstream` with the folder of upstream's checkout, `network` without one."""
    return "network" if root is None else "upstream"


def runtime_here() -> Runtime:
    """The runtime with this machine's weights; raises WeightsMissing if the bundle is not here."""
    return runtime_with(environment(require(bundle())))


def runtime_with(environment: Mapping[str, str]) -> Runtime:
    """The runtime of this process's settings, with these variables for the child."""
    here = settings()
    return Runtime(
        weights=PIPELINE,
        scratch=here.scratch,
        environment=environment,
        root=here.trellis_root,
        device=here.trellis_device,
        python=str(here.trellis_python),
        time_limit_s=here.trellis_time_limit_s,
        min_free_vram_gib=here.trellis_min_free_gib,
        min_free_vram_gib_many_views=here.trellis_min_free_gib_many_views,
    )


class TrellisProcess:
    """The child, from its start to its end.

    An interrupted request ends the child: a late answer would be taken for the next request's.
    """

    def __init__(self, runtime: Runtime) -> None:
        self.runtime = runtime
        self._output = tempfile.TemporaryFile()  # noqa: SIM115  (lives as long as the child)
        # the child appends: after a request has emptied the file, it must not go on at its old position
        fcntl.fcntl(self._output, fcntl.F_SETFL, fcntl.fcntl(self._output, fcntl.F_GETFL) | os.O_APPEND)
        folder = runtime.scratch / "trellis"
        folder.mkdir(parents=True, exist_ok=True)
        ours, theirs = socket.socketpair()
        self._socket, self._channel = ours, Channel(ours, POLL_SECONDS)
        with theirs:
            self._process = _STARTER.submit(
                subprocess.Popen,
                [runtime.python, str(_CHILD), str(theirs.fileno()), str(os.getpid()), runtime.model],
                cwd=folder,  # upstream makes folders in its working folder
                env=runtime.child_environment(),
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
                stdout=self._output,
                stderr=self._output,
                start_new_session=True,  # Ctrl-C reaches the parent only, which ends the child
            ).result()
        atexit.register(self.kill)

    @property
    def alive(self) -> bool:
        """True while it can be asked."""
        return self._process.poll() is None and self._socket.fileno() >= 0

    @property
    def pid(self) -> int:
        """The child's process id."""
        return self._process.pid

    def request(
        self,
        operation: str,
        header: Mapping[str, Any] | None = None,
        arrays: Mapping[str, NDArray[Any]] | None = None,
        progress: Callable[[float], None] = lambda _: None,
    ) -> Message:
        """Ask and wait for the answer. A fault of the child is raised as the error of `tasks.errors` for it.

        Raises InferenceTimeout after the runtime's time limit, DeviceLost if the child ends.
        """
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
        """Ask the child to end, and end it if it does not."""
        try:
            self._channel.send(Message({"operation": "shutdown"}))
            self._process.wait(SHUTDOWN_WAIT_SECONDS)
        except (EOFError, OSError, subprocess.TimeoutExpired) as error:
            log.debug("the model's process did not end by itself: %r", error)
        self.kill()

    def kill(self) -> None:
        """End the child at once, and its own children, mostly compilers, with it."""
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
        """Say how a child that closed the socket has ended, with the last lines of its output."""
        with suppress(subprocess.TimeoutExpired):
            self._process.wait(SHUTDOWN_WAIT_SECONDS)
        status = self._process.returncode
        how = "still there" if status is None else f"signal {-status}" if status < 0 else f"exit status {status}"
        self._output.seek(0, os.SEEK_END)
        self._output.seek(max(0, self._output.tell() - LAST_WORDS_BYTES))
        # of a progress bar, the state that it showed last
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
                    f"engine trellis: cannot import {error['name']}, which its model needs:"
                    f" {error['message']}; run `capture2mesh doctor`"
                )
            case "WeightsMissing":
                raise WeightsMissing(f"{message}; run `capture2mesh weights fetch`")
            case "WeightsCorrupt":
                raise WeightsCorrupt(f"{message}; run `capture2mesh weights fetch --repair`")
            case "NoCuda" | "Unsupported":
                raise EngineUnavailable(f"{message}; run `capture2mesh doctor`")
            case _:
                raise InferenceFailed(message)
