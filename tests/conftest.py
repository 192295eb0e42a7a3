"""Fixtures of all tests: one Prefect server, one S3 server and one stack a process of pytest, and small captures."""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from xdist.scheduler import LoadFileScheduling

from tests.support.gpu_machine import gpu_environment
from tests.support.own_settings import forget, send_the_rest
from tests.support.running import CommandLine, prefect
from tests.support.running_s3 import S3, seaweedfs
from tests.support.running_stack import Running, started
from tests.synthetic import make_capture

VIEWS, SIZE = 8, 96
SHARE_THE_STACK = ("test_browser", "test_operations", "test_stack")


def pytest_configure() -> None:
    """Stop the servers on SIGTERM too; by default the process would end at once and leave them running.

    A process that a shell runs in the background ignores SIGINT, and so would the processes that the tests start.
    """
    signal.signal(signal.SIGTERM, lambda number, frame: pytest.exit("terminated"))
    signal.signal(signal.SIGINT, signal.default_int_handler)


class FileScheduling(LoadFileScheduling):
    """Gives whole files to the workers of pytest-xdist; the files that share the stack go to one worker.

    `--dist loadgroup` is for this, but with pytest 9.2 pytest-xdist 3.8 ignores the groups (its issue 1386).
    """

    def _split_scope(self, nodeid: str) -> str:
        file = super()._split_scope(nodeid)
        return "stack" if Path(file).stem in SHARE_THE_STACK else file


def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> FileScheduling:
    """Use our scheduling, whatever `--dist` says."""
    return FileScheduling(config, log)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Check that SHARE_THE_STACK is complete: another file would start a second stack."""
    for item in items:
        if isinstance(item, pytest.Function) and "stack" in item.fixturenames:
            assert item.path.stem in SHARE_THE_STACK, item.nodeid


@pytest.fixture(scope="session")
def prefect_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The API's URL of a Prefect server that all tests share."""
    with prefect(tmp_path_factory.mktemp("prefect")) as url:
        yield url
        send_the_rest()


@pytest.fixture(scope="session")
def s3(tmp_path_factory: pytest.TempPathFactory) -> Iterator[S3]:
    """An S3 server that all tests share; each test uses prefixes of its own."""
    with seaweedfs(tmp_path_factory.mktemp("s3")) as server:
        yield server


@pytest.fixture(scope="session")
def stack(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    """A running stack that all tests share; a test that stops it starts it again."""
    folder = tmp_path_factory.mktemp("stack")
    once = folder / "once"
    once.touch()  # a test that wants an empty mesh removes it
    stand_in = {"STAND_IN_STEP_SECONDS": "0.1", "STAND_IN_EMPTY": "structure", "STAND_IN_ONCE": str(once)}
    with started(folder / "state", **gpu_environment(folder), **stand_in) as running:
        yield running


@pytest.fixture(scope="session")
def capture(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Makes a small capture with a given name; the test may change it."""

    def make(name: str) -> Path:
        folder = tmp_path_factory.mktemp("captures") / name
        make_capture(folder, "sphere", views=VIEWS, size=SIZE)
        return folder

    return make


@pytest.fixture
def command_line(tmp_path: Path, prefect_server: str) -> CommandLine:
    """The command line against the shared server, with an empty store."""
    return CommandLine(tmp_path, prefect_server)


@pytest.fixture
def own_store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """An empty store and a scratch folder for this process; gives the store's folder.

    A test that changes another setting after this calls `forget`.
    """
    monkeypatch.setenv("CAPTURE2MESH_STORE", str(tmp_path / "store"))
    monkeypatch.setenv("CAPTURE2MESH_SCRATCH", str(tmp_path / "scratch"))
    forget()
    yield tmp_path / "store"
    forget()


@pytest.fixture
def worker_here(own_store: Path, s3: S3, monkeypatch: pytest.MonkeyPatch) -> None:
    """This process has the keys of the S3 server's worker."""
    for name, value in s3.env.items():
        monkeypatch.setenv(name, value)
    forget()
