"""Messages between the model's process and its parent. Both sides import it."""

from __future__ import annotations

import json
import socket
import struct
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True)
class Message:
    """A message of the channel."""

    header: dict[str, Any]
    """Values that JSON can hold, by name."""
    arrays: dict[str, NDArray[Any]] = field(default_factory=dict)
    """Arrays of any shape and dtype, by name."""


class Channel:
    """Sends and receives messages over a socket: a length, a header, then the bytes of each array. No pickles.

    While nothing moves, the callback `waiting` is called about every `poll_seconds`; it raises to give up. Sending and
    receiving raise EOFError if the other side is gone.
    """

    def __init__(self, connection: socket.socket, poll_seconds: float = 0) -> None:
        self._socket = connection
        # The kernel's timeouts (0: none), not Python's: those make the socket non-blocking. An array would then be sent
        # in hundreds of pieces, and each piece would wait for Python's global lock, which other threads hold.
        timeval = struct.pack("ll", int(poll_seconds), int(poll_seconds % 1 * 1e6))
        for option in (socket.SO_RCVTIMEO, socket.SO_SNDTIMEO):
            connection.setsockopt(socket.SOL_SOCKET, option, timeval)

    def send(self, message: Message, waiting: Callable[[], None] = lambda: None) -> None:
        """Send a whole message."""
        arrays = {name: np.ascontiguousarray(array) for name, array in message.arrays.items()}
        shapes = [[name, array.dtype.str, array.shape] for name, array in arrays.items()]
        header = json.dumps({"header": message.header, "arrays": shapes}).encode()
        self._send(memoryview(len(header).to_bytes(8, "big") + header), waiting)
        for array in arrays.values():
            if array.size:
                self._send(array.data.cast("B"), waiting)

    def receive(self, waiting: Callable[[], None] = lambda: None) -> Message:
        """Wait for the next message and return it."""
        length = np.empty(8, np.uint8)
        self._receive(length, waiting)
        header = np.empty(int.from_bytes(length.tobytes(), "big"), np.uint8)
        self._receive(header, waiting)
        content = json.loads(header.tobytes())
        arrays = {}
        for name, dtype, shape in content["arrays"]:
            arrays[name] = np.empty(shape, np.dtype(dtype))
            self._receive(arrays[name], waiting)
        return Message(content["header"], arrays)

    def _send(self, data: memoryview, waiting: Callable[[], None]) -> None:
        while data:
            try:
                data = data[self._socket.send(data) :]
            except BlockingIOError:  # the timeout
                waiting()
            except (BrokenPipeError, ConnectionResetError) as error:
                raise EOFError from error

    def _receive(self, array: NDArray[Any], waiting: Callable[[], None]) -> None:
        if not array.size:
            return
        rest = array.data.cast("B")
        while rest:
            try:
                count = self._socket.recv_into(rest, flags=socket.MSG_WAITALL)
            except BlockingIOError:  # the timeout
                waiting()
                continue
            except ConnectionResetError as error:
                raise EOFError from error
            if not count:
                raise EOFError
            rest = rest[count:]
