"""`capture2mesh store`: shows what the store of stage results holds, and removes what is not needed."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Annotated

import typer

from flows.cli.conventions import errors_told, print_table

if TYPE_CHECKING:
    from prefect.client.schemas.objects import FlowRun

    from tasks.store.retention import Item

LEFTOVERS = "leftovers"
USING = ("reconstruct", "infer", "batch", "reconstruct-dataset")
"""Flows whose runs use entries of the store."""


@dataclass(frozen=True)
class _Row:
    """A stage's part of the store."""

    stage: str
    """Name of the stage."""
    entries: int
    """Number of results."""
    bytes: int
    """Size of their files."""
    oldest: datetime | None
    """The last use of the entry that was not used for longest; None if there is none."""
    newest: datetime | None
    """The last use of the entry that was used last; None if there is none."""


app = typer.Typer(name="store", help="The store of stage results.", no_args_is_help=True)


@app.command()
def stats(
    json_: Annotated[bool, typer.Option("--json", help="Print JSON and nothing else on stdout.")] = False,
) -> None:
    """Show what the store holds, stage by stage; ages are of the last use."""
    from tasks.store.results import store
    from tasks.store.retention import abandoned_before, inventory

    now = datetime.now(UTC)
    with errors_told():
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
    _print_rows(
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
        str | None, typer.Option(metavar="AGE", help="Remove entries that were not used for this time: 12h, 30d.")
    ] = None,
    max_size: Annotated[
        str | None,
        typer.Option(metavar="SIZE", help="Then remove the oldest use first, until the rest fits: 500MB, 50GiB."),
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only show what would be removed.")] = False,
) -> None:
    """Remove what killed runs left behind, and entries beyond the given limits.

    Published assets need nothing from the store. Entries that were used within the last hour stay. If
    PREFECT_API_URL is set, entries that were used since the start of the oldest run that still runs stay as well.
    """
    from tasks.store import retention
    from tasks.store.results import store

    now = datetime.now(UTC)
    with errors_told():
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
    reason = f"since the start of run {run.name}, which still runs" if run else f"within {_span(retention.IN_USE)}"
    typer.echo(f"kept: {len(kept):,} entries, {_size(_bytes(kept))}; of these {len(in_use):,} were used {reason}")
    if max_bytes is not None and _bytes(kept) > max_bytes:
        typer.echo(f"above {max_size}: the rest is in use; prune again later")


def _oldest_running() -> FlowRun | None:
    """The oldest run that uses the store now and is known to the configured server; None if there is none."""
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
            f"{url}: {error}; only the server knows which runs use the store: start it, or unset PREFECT_API_URL if no"
            " other run uses this store"
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
    _print_rows(("stage", title, "size"), rows)


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
    """A time span in whole units, as prune reads it."""
    minutes = max(int(span.total_seconds() // 60), 0)
    if minutes < 60:
        return f"{minutes}m"
    hours = minutes // 60
    return f"{hours}h" if hours < 48 else f"{hours // 24}d"


def _print_rows(titles: tuple[str, ...], rows: Sequence[tuple[str, ...]]) -> None:
    from rich.table import Table

    table = Table(titles[0])
    for title in titles[1:]:
        table.add_column(title, justify="right")
    for row in rows:
        table.add_row(*row)
    print_table(table)
