"""What the tests share: one real Prefect server, S3 server and stack a session, and small captures."""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.integration.test_trellis_run import gpu_environment
from tests.support.running import S3, CommandLine, prefect, seaweedfs
from tests.support.running_stack import Running, started
from tests.synthetic import make_capture

VIEWS, SIZE = 8, 96


def pytest_configure() -> None:
    """Stop the servers on SIGTERM as well; by default the process would end at once and leave them running.

    What a shell runs in the background ignores SIGINT, and so would all that the tests start.
    """
    signal.signal(signal.SIGTERM, lambda number, frame: pytest.exit("terminated"))
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="session")
def prefect_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The API's URL of a Prefect server that all tests share."""
    with prefect(tmp_path_factory.mktemp("prefect")) as url:
        yield url


@pytest.fixture(scope="session")
def s3(tmp_path_factory: pytest.TempPathFactory) -> Iterator[S3]:
    """A SeaweedFS that all tests share; use prefixes of your own."""
    with seaweedfs(tmp_path_factory.mktemp("s3")) as server:
        yield server


@pytest.fixture(scope="session")
def stack(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    """A stack that all tests share, up; who stops it starts it again."""
    folder = tmp_path_factory.mktemp("stack")
    once = folder / "once"
    once.touch()  # a test that wants an empty mesh removes it
    stand_in = {"STAND_IN_STEP_SECONDS": "0.1", "STAND_IN_EMPTY": "structure", "STAND_IN_ONCE": str(once)}
    with started(folder / "state", **gpu_environment(folder), **stand_in) as running:
        yield running


@pytest.fixture(scope="session")
def capture(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Makes a small capture of that name, one that a test may change."""

    def make(name: str) -> Path:
        folder = tmp_path_factory.mktemp("captures") / name
        make_capture(folder, "sphere", views=VIEWS, size=SIZE)
        return folder

    return make


@pytest.fixture
def command_line(tmp_path: Path, prefect_server: str) -> CommandLine:
    """The command line against the shared server, with an empty store."""
    return CommandLine(tmp_path, prefect_server)
