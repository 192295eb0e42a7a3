"""Processes that are started, watched and started again, each with a log of its own; infra/stack.py uses it."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console

from infra.stack_members import PART, POLL_SECONDS, STOP_SECONDS

ROOT = Path(__file__).parents[1]
START_SECONDS, LOG_LINES = 120, 20
LONGEST_PAUSE_SECONDS = 60  # before a process that keeps ending is started again


def say(text: str) -> None:
    """Print a line to the terminal, as it is."""
    Console(highlight=False, markup=False).print(text, soft_wrap=True)


class StackError(Exception):
    """The stack cannot start, or had to stop; the text says why."""


@dataclass
class Child:
    """A process, and what is needed to start it again."""

    command: list[str]
    """The program and its arguments."""
    env: Mapping[str, str]
    """Variables of this process, added to those of all."""
    cwd: Path
    """The folder that it runs in."""
    process: subprocess.Popen[bytes]
    """The process itself."""
    begun: float
    """When it was started, in seconds of the monotonic clock."""
    pause: float = 1.0
    """Seconds to wait before the next start; doubled each time that the process ends soon."""
    due: float | None = None
    """When it is started again, in seconds of the monotonic clock; None while it runs."""


class Supervisor:
    """The processes of a stack by name; all get the environment `env`, and their logs lie in the folder `logs`."""

    def __init__(self, logs: Path, env: Mapping[str, str]) -> None:
        self.logs, self.env = logs, env
        self.children: dict[str, Child] = {}

    def spawn(self, name: str, command: list[str], env: Mapping[str, str], cwd: Path = ROOT) -> None:
        """Start a process in a session of its own; the log of the process that had this name before is kept."""
        log = self.logs / f"{name}.log"
        if log.exists():
            log.replace(log.with_suffix(".log.1"))
        with log.open("wb") as stream:
            process = subprocess.Popen(
                command,
                cwd=cwd,
                env={**self.env, **env, PART: name},
                stdin=subprocess.DEVNULL,
                stdout=stream,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        self.children[name] = Child(command, env, cwd, process, time.monotonic())

    def call(self, name: str, command: list[str], env: Mapping[str, str]) -> int:
        """Run a command until it ends; gives its exit status."""
        self.spawn(name, command, env)
        self.wait_for(name, lambda: self.children[name].process.poll() is not None, but=name)
        return self.children.pop(name).process.returncode

    def last_lines(self, name: str) -> str:
        """The end of a process's log, for a message."""
        log = self.logs / f"{name}.log"
        lines = log.read_text(errors="replace").splitlines()[-LOG_LINES:]
        return "\n".join([*(f"  {line}" for line in lines), f"(the last lines of {log})"])

    def check(self, but: str = "") -> None:
        """Raise StackError if a process has ended; `but` names one that may."""
        for name, child in self.children.items():
            if name != but and child.process.poll() is not None:
                raise StackError(f"{name} ended with status {child.process.returncode}:\n{self.last_lines(name)}")

    def wait_for(self, what: str, condition: Callable[[], bool], but: str = "") -> None:
        """Wait until the condition holds; raises StackError if it takes too long or a process ends meanwhile."""
        begun = time.monotonic()
        while not condition():
            self.check(but)
            if time.monotonic() > begun + START_SECONDS:
                raise StackError(f"{what}: not there after {START_SECONDS} s; see {self.logs}")
            time.sleep(POLL_SECONDS)
        say(f"{what}: {time.monotonic() - begun:.1f} s")

    def keep_up(self, clean_up: Callable[[str], None]) -> None:
        """Start again the processes that have ended, each time later; `clean_up` ends what one of them has left."""
        for name, child in list(self.children.items()):
            now = time.monotonic()
            if child.due is None and child.process.poll() is not None:
                lived_long = now - child.begun > LONGEST_PAUSE_SECONDS
                child.pause = 1.0 if lived_long else min(2 * child.pause, LONGEST_PAUSE_SECONDS)
                say(f"{name} ended with status {child.process.returncode}; it is started again in {child.pause:.0f} s")
                clean_up(name)
                child.due = now + child.pause
            elif child.due is not None and now >= child.due:
                self.spawn(name, child.command, child.env, child.cwd)
                self.children[name].pause = child.pause
                say(f"{name} is started again")

    def end(self, names: Iterable[str]) -> None:
        """End processes, all at once, by force if need be; paused processes are continued first."""
        processes = [self.children[name].process for name in names]
        for process in processes:
            process.terminate()
            process.send_signal(signal.SIGCONT)
        for process in processes:
            with suppress(subprocess.TimeoutExpired):
                process.wait(STOP_SECONDS)
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
