"""Fixtures of all tests: a Prefect server and an S3 server for each process of pytest, stacks, and small captures."""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.support.own_settings import forget, send_the_rest
from tests.support.running import CommandLine, prefect
from tests.support.running_s3 import S3, seaweedfs
from tests.support.running_stack import Running, started, with_database
from tests.synthetic import make_capture

VIEWS, SIZE = 8, 96
SLOWEST = (
    "test_operations",
    "test_dataset_kill",
    "test_uploads_at_once",
    "test_browser",
    "test_stack",
    "test_kill",
    "test_trellis_run",
    "test_dataset",
    "test_uploads",
    "test_hand_over",
    "test_dataset_page",
)
"""Files that begin first: a long one that began last would run while other processes have no work.

A process takes its next file as soon as two tests are left, so files of few long tests come before those of many.
"""


def pytest_configure() -> None:
    """Stop the servers on SIGTERM too; by default the process would end at once and leave them running.

    A process that a shell runs in the background ignores SIGINT, and so would the processes that the tests start.
    """
    signal.signal(signal.SIGTERM, lambda number, frame: pytest.exit("terminated"))
    signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Put SLOWEST first: the processes of `make test` and `make test-system` take whole files in this order."""
    places = {file: place for place, file in enumerate(SLOWEST)}
    items.sort(key=lambda item: places.get(item.path.stem, len(SLOWEST)))


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


@pytest.fixture(scope="module")
def stack(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    """A running stack that the tests of a file share; a test that stops it starts it again, unless it is the last."""
    with started(with_database(tmp_path_factory.mktemp("stack") / "state")) as running:
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
