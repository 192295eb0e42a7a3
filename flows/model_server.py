"""Lets the processes of a batch ask the models, which belong to the batch's own process. The workshop uses it.

So the processes read the views, and register and store what comes back: work of seconds for each capture, which the
threads of one process would do one after the other, since Python runs one thread at a time.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from contextlib import suppress
from multiprocessing.connection import Client, Connection, Listener
from typing import Any


class ModelServer:
    """Answers requests of other processes of this machine and user. answer: gets what was asked and by which capture.

    Its socket lies in a folder that only this user may enter.
    """

    def __init__(self, answer: Callable[[str, Any], Any]) -> None:
        self._answer, self._ended = answer, False
        self._listener = Listener(family="AF_UNIX")
        self.address = str(self._listener.address)
        threading.Thread(target=self._listen, name="model-server", daemon=True).start()

    def close(self) -> None:
        """Take no further requests."""
        self._ended = True
        with suppress(OSError):
            Client(self.address).close()  # wakes the listening thread

    def _listen(self) -> None:
        with self._listener:
            while not self._ended:
                with suppress(OSError, EOFError):  # a process that was killed meanwhile
                    threading.Thread(target=self._talk, args=(self._listener.accept(),), daemon=True).start()

    def _talk(self, connection: Connection) -> None:
        """Answer one request; an error is the answer as well. A process that is gone gets none."""
        with connection, suppress(OSError, EOFError):
            capture, request = connection.recv()
            try:
                answer = self._answer(capture, request)
            except BaseException as error:
                answer = error
            connection.send(answer)


def ask(address: str, capture: str, request: Any) -> Any:
    """In another process: ask, and wait for the answer; raises what the answering raised."""
    with Client(address) as connection:
        connection.send((capture, request))
        answer = connection.recv()
    if isinstance(answer, BaseException):
        raise answer
    return answer
