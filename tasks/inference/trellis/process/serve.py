"""Answers the parent's requests until the parent ends. `__main__.py` calls it."""

from __future__ import annotations

import ctypes
import importlib
import os
import select
import signal
import socket
import sys
import threading

from .channel import Channel, Message
from .model import Model, NetworkModel

PR_SET_PDEATHSIG = 1


def main(descriptor: int, parent: int, upstream: bool) -> None:
    """Serve on an inherited socket until `parent`, a process id, is gone or asks for the end.

    upstream: whether upstream's package answers, not the networks in plain PyTorch.
    """
    _end_with(parent, descriptor)
    try:
        serve(Channel(socket.socket(fileno=descriptor)), upstream)
    except EOFError:
        sys.exit("the parent is gone")


def serve(channel: Channel, upstream: bool) -> None:
    """Answer requests until one asks to shut down; raises EOFError if the other side is gone."""
    made: type[Model] = NetworkModel
    if upstream:
        made = importlib.import_module(".upstream_model", __package__).UpstreamModel
    model = made(lambda fraction: channel.send(Message({"kind": "progress", "fraction": fraction})))
    while (request := channel.receive()).header["operation"] != "shutdown":
        answer = model.answer(request)
        lost = answer.header.get("fault") == "DeviceLost"
        channel.send(answer)
        del answer, request
        if not lost:  # after a lost device, CUDA calls fail, and the parent ends this process
            model.release()


def _end_with(parent: int, descriptor: int) -> None:
    """Make this process end with its parent, even in the middle of a CUDA call."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        os._exit(1)

    def watch() -> None:
        hung_up = select.poll()
        hung_up.register(descriptor, 0)  # no event but the hang-up, which is always reported
        hung_up.poll()
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
