"""Names: no module and no public class of the project has the name of another one."""

from __future__ import annotations

import ast
from collections import defaultdict
from pathlib import Path

ROOT = Path(__file__).parents[2]
MODULES = [path for room in ("flows", "tasks", "infra") for path in sorted((ROOT / room).rglob("*.py"))]


def twins(names: list[tuple[str, Path]]) -> dict[str, list[str]]:
    """The names that are given more than once, and where."""
    found = defaultdict(list)
    for name, path in names:
        found[name].append(str(path.relative_to(ROOT)))
    return {name: paths for name, paths in found.items() if len(paths) > 1}


def test_no_module_has_a_twin() -> None:
    assert twins([(path.stem, path) for path in MODULES if path.stem not in ("__init__", "__main__")]) == {}


def test_no_public_class_has_a_twin() -> None:
    classes = [
        (node.name, path)
        for path in MODULES
        for node in ast.parse(path.read_text()).body
        if isinstance(node, ast.ClassDef) and not node.name.startswith("_")
    ]
    assert twins(classes) == {}
