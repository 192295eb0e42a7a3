"""`python -m flows store`: what the store of stage results holds, and making room in it."""

from __future__ import annotations

import json
import sys
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from prefect.client.schemas.objects import FlowRun

    from tasks.store.retention import Item

EXIT_FAILED, EXIT_BAD_INPUT = 1, 2
PLAIN_WIDTH = 140
LEFTOVERS = "leftovers"
USING = ("reconstruct", "infer", "batch", "reconstruct-dataset")
"""Flows whose runs use entries of the store."""


@dataclass(frozen=True)
class _Row:
    """What a stage has in the store; oldest and newest by the last use."""

    stage: str
    entries: int
    bytes: int
    oldest: datetime | None
    newest: datetime | None


app = typer.Typer(name="store", help="The store of stage results.", no_args_is_help=True)


@app.command()
def stats(
    json_: Annotated[bool, typer.Option("--json", help="Print JSON and nothing else on stdout.")] = False,
) -> None:
    """Show what the store holds, stage by stage; ages are of the last use."""
    from tasks.store.results import store
    from tasks.store.retention import abandoned_before, inventory

    now = datetime.now(UTC)
    with _errors_told():
        root = store().root
        found = inventory(root, abandoned_before(now, None))
    stages = [_summary(name, items) for name, items in _by_stage(found.entries).items()]
    leftovers = _summary(LEFTOVERS, found.leftovers)
    total = _summary("total", [*found.entries, *found.leftovers])
    if json_:
        content = {
            "store": root.url,
            "stages": [asdict(row) for row in stages],
            "leftovers": {"entries": leftovers.entries, "bytes": leftovers.bytes},
            "bytes": total.bytes,
        }
        typer.echo(json.dumps(content, indent=1, default=datetime.isoformat))
        return
    _print_table(
        ("stage", "entries", "size", "oldest", "newest"),
        [
            (row.stage, f"{row.entries:,}", _size(row.bytes), _ago(now, row.oldest), _ago(now, row.newest))
            for row in (*stages, leftovers, total)
        ],
    )
    typer.echo(f"store {root.url}")


@app.command()
def prune(
    older_than: Annotated[
        str | None, typer.Option(metavar="AGE", help="Remove what was not used for so long: 12h, 30d.")
    ] = None,
    max_size: Annotated[
        str | None, typer.Option(metavar="SIZE", help="Then the oldest use first, until the rest fits: 500MB, 50GiB.")
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only show what would go.")] = False,
) -> None:
    """Remove what killed runs left behind, and entries beyond the limits that are given.

    Published assets need nothing of the store. What was used within an hour stays, and with PREFECT_API_URL what was
    used since the oldest run began that still runs.
    """
    from tasks.store import retention
    from tasks.store.results import store

    now = datetime.now(UTC)
    with _errors_told():
        age = None if older_than is None else retention.age(older_than)
        max_bytes = None if max_size is None else retention.size(max_size)
        run = _oldest_running()
        begun = run.start_time if run else None
        protected = retention.protected_from(now, begun)
        root = store().root
        found = retention.inventory(root, retention.abandoned_before(now, begun))
        entries = retention.chosen(found.entries, now, protected, age, max_bytes)
        leftovers = list(found.leftovers)
        if not dry_run:
            entries, leftovers = retention.remove(root, entries), retention.remove(root, leftovers)
    _print_removed(entries, leftovers, "would go" if dry_run else "removed")
    gone = {item.path for item in entries}
    kept = [item for item in found.entries if item.path not in gone]
    in_use = [item for item in kept if item.used >= protected]
    reason = f"since run {run.name} began, which still runs" if run else f"within {_span(retention.IN_USE)}"
    typer.echo(f"kept: {len(kept):,} entries, {_size(_bytes(kept))}; of these {len(in_use):,} were used {reason}")
    if max_bytes is not None and _bytes(kept) > max_bytes:
        typer.echo(f"above {max_size}: the rest is in use; prune again when it is not")


def _oldest_running() -> FlowRun | None:
    """The run of the configured server that began first of those that use the store now."""
    import httpx
    from prefect.client.orchestration import get_client
    from prefect.client.schemas import filters
    from prefect.client.schemas.objects import StateType
    from prefect.client.schemas.sorting import FlowRunSort
    from prefect.settings import PREFECT_API_URL

    from tasks.errors import Capture2MeshError

    url = PREFECT_API_URL.value()
    if not url:
        return None
    states = filters.FlowRunFilterStateType(any_=[StateType.RUNNING, StateType.CANCELLING, StateType.PAUSED])
    try:
        with get_client(sync_client=True) as client:
            runs = client.read_flow_runs(
                flow_filter=filters.FlowFilter(name=filters.FlowFilterName(any_=list(USING))),
                flow_run_filter=filters.FlowRunFilter(state=filters.FlowRunFilterState(type=states)),
                sort=FlowRunSort.START_TIME_ASC,
                limit=1,
            )
    except (httpx.HTTPError, RuntimeError) as error:
        raise Capture2MeshError(
            f"{url}: {error}; without the server nobody knows which runs use the store: start it, or unset"
            " PREFECT_API_URL where no other run uses this store"
        ) from error
    return runs[0] if runs else None


def _by_stage(items: Iterable[Item]) -> dict[str, list[Item]]:
    groups: dict[str, list[Item]] = defaultdict(list)
    for item in items:
        groups[item.stage].append(item)
    return dict(sorted(groups.items()))


def _summary(stage: str, items: Iterable[Item]) -> _Row:
    items = list(items)
    used = [item.used for item in items]
    return _Row(stage, len(items), _bytes(items), min(used, default=None), max(used, default=None))


def _print_removed(entries: list[Item], leftovers: list[Item], title: str) -> None:
    groups = {**_by_stage(entries), LEFTOVERS: leftovers, "total": [*entries, *leftovers]}
    rows = [(name, f"{len(items):,}", _size(_bytes(items))) for name, items in groups.items()]
    _print_table(("stage", title, "size"), rows)


def _bytes(items: Iterable[Item]) -> int:
    return sum(item.bytes for item in items)


def _size(count: float) -> str:
    for unit in ("B", "KiB", "MiB", "GiB"):
        if count < 1024:
            return f"{count:.0f} B" if unit == "B" else f"{count:,.1f} {unit}"
        count /= 1024
    return f"{count:,.1f} TiB"


def _ago(now: datetime, then: datetime | None) -> str:
    return "" if then is None else _span(now - then)


def _span(span: timedelta) -> str:
    """As ages are given to prune; whole units."""
    minutes = max(int(span.total_seconds() // 60), 0)
    if minutes < 60:
        return f"{minutes}m"
    hours = minutes // 60
    return f"{hours}h" if hours < 48 else f"{hours // 24}d"


def _print_table(titles: tuple[str, ...], rows: Sequence[tuple[str, ...]]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(titles[0])
    for title in titles[1:]:
        table.add_column(title, justify="right")
    for row in rows:
        table.add_row(*row)
    Console(width=None if sys.stdout.isatty() else PLAIN_WIDTH).print(table)


@contextmanager
def _errors_told() -> Iterator[None]:
    from tasks.errors import Capture2MeshError, InputError

    try:
        yield
    except Capture2MeshError as error:
        typer.echo(f"error: {error}", err=True)
        raise typer.Exit(EXIT_BAD_INPUT if isinstance(error, InputError) else EXIT_FAILED) from None
