"""The progress of a run in the terminal, on stderr: a line and a bar for every stage."""

from __future__ import annotations

from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn

from tasks.progress import StageTiming


class Terminal:
    """An observer of stages that draws bars on a terminal, and prints plain lines if stderr is not one."""

    def __init__(self) -> None:
        self.console = Console(stderr=True)
        self._bars = Progress(
            TextColumn("{task.description:<17}"),
            BarColumn(bar_width=32),
            TimeElapsedColumn(),
            TextColumn("{task.fields[note]}"),
            console=self.console,
            disable=not self.console.is_terminal,
        )
        self._rows: dict[str, TaskID] = {}

    def __enter__(self) -> Terminal:
        self._bars.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bars.stop()

    def started(self, name: str) -> None:
        self._rows[name] = self._bars.add_task(name, total=None, note="")
        if not self.console.is_terminal:
            self.console.print(f"{name} ...", highlight=False)

    def progressed(self, name: str, fraction: float, note: str) -> None:
        self._bars.update(self._rows[name], total=1.0, completed=fraction, note=note)
        if note and not self.console.is_terminal:
            self.console.print(f"{name}: {note}", highlight=False, soft_wrap=True)

    def finished(self, timing: StageTiming) -> None:
        note = "cached" if timing.cached else ""
        self._bars.update(self._rows[timing.name], total=1.0, completed=1.0, note=note)
        if not self.console.is_terminal:
            self.console.print(f"{timing.name} {timing.seconds:.2f} s {note}".rstrip(), highlight=False)
