"""`make stack` with a PostgreSQL of one's own instead of the SQLite file in its folder."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.support.postgresql import postgresql
from tests.support.running_stack import report, started

pytestmark = pytest.mark.system


def test_stack_on_postgresql(tmp_path: Path) -> None:
    with postgresql() as url, started(tmp_path / "state", CAPTURE2MESH_STACK_DATABASE_URL=url) as stack:
        run = stack.run()
        assert stack.ended(run)["state_name"] == "Completed", stack.logs
        assert [child["state_name"] for child in stack.children(run)] == ["Completed"]
        assert report(stack, "mug")["status"] == "normal"
        assert not list((stack.folder / "prefect").glob("*.db*"))
