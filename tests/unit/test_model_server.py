"""The server by which the processes of a batch ask its models: answers and errors go back to the one that asked."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from multiprocessing.connection import Client
from threading import Barrier

import numpy as np
import pytest

from flows.model_server import ModelServer, ask
from tasks.errors import OutOfMemory
from tests.support.running import ROOT, wait_for

MEETING = Barrier(2, timeout=30)


def answer(capture: str, request: object) -> object:
    match request:
        case "meet":
            MEETING.wait()
            return f"{capture} met"
        case "fail":
            raise OutOfMemory("too large", 9.0, 4.0)
        case _:
            return {"doubled": 2 * np.asarray(request)}


@pytest.fixture
def server() -> Iterator[ModelServer]:
    made = ModelServer(answer)
    yield made
    made.close()


def test_another_process_gets_the_answer(server: ModelServer) -> None:
    program = f"from flows.model_server import ask; print(ask({server.address!r}, 'mug', [1, 2])['doubled'])"
    told = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True)
    assert told.stdout == "[2 4]\n"


def test_requests_are_answered_side_by_side(server: ModelServer) -> None:
    with ThreadPoolExecutor(2) as threads:
        both = list(threads.map(lambda name: ask(server.address, name, "meet"), ("mug", "hen")))
    assert both == ["mug met", "hen met"]


def test_an_error_is_raised_where_it_was_asked(server: ModelServer) -> None:
    with pytest.raises(OutOfMemory, match="too large") as told:
        ask(server.address, "mug", "fail")
    assert (told.value.needed_gib, told.value.free_gib) == (9.0, 4.0)


def test_a_process_that_is_gone_disturbs_no_other(server: ModelServer) -> None:
    Client(server.address).close()
    with Client(server.address) as gone:
        gone.send(("mug", [1]))
    assert ask(server.address, "hen", [3])["doubled"] == [6]


def test_a_closed_server_takes_nothing(server: ModelServer) -> None:
    server.close()

    def refused() -> bool:
        try:
            ask(server.address, "mug", [1])
        except (OSError, EOFError):
            return True
        return False

    assert wait_for("the end of the server", refused, 30)
