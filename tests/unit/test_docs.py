"""The pages of documentation name only what exists: commands, options, targets, files, variables, fields."""

from __future__ import annotations

import re
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args

import pytest
import typer
from pydantic import BaseModel

from flows.__main__ import app
from infra.settings_reference import reference
from infra.stack import StackSettings
from tasks.report import Report
from tasks.settings import Parameters, Settings

ROOT = Path(__file__).parents[2]
README = ROOT / "README.md"
PAGES = sorted(
    path for path in ROOT.rglob("*.md") if not {".venv", "build", "out", ".git"} & {*path.relative_to(ROOT).parts}
)
TREES = ("flows", "infra", "tasks", "tests")
MADE = ("infra/weights.lock.json",)
"""Files that a command makes, and that users may commit."""
ENVIRONMENTS = {"CAPTURE2MESH_": Settings, "CAPTURE2MESH_STACK_": StackSettings}

each_page = pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))


def commands(text: str) -> Iterator[list[str]]:
    """The arguments of every call of this project's command line in a page."""
    for found in re.findall(r"(?:^(?:\.venv/bin/)?capture2mesh|-m flows) ([^\n#>|]+)", code(text), flags=re.MULTILINE):
        yield found.split()


def code(text: str) -> str:
    """Shell blocks and inline code, one piece on each line."""
    blocks = re.findall(r"```sh\n(.*?)```", text, flags=re.DOTALL)
    inline = re.findall(r"`([^`]+)`", re.sub(r"```.*?```", "", text, flags=re.DOTALL))
    return "\n".join([*blocks, *(" ".join(piece.split()) for piece in inline)])


def anchor(heading: str) -> str:
    """The anchor that GitHub gives to a heading."""
    return re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-")


def names(model: type[BaseModel], prefix: str = "") -> Iterator[str]:
    """The dotted names of a model's values and groups."""
    for name, field in model.model_fields.items():
        yield prefix + name
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            yield from names(field.annotation, f"{prefix}{name}.")


def fields(annotation: Any) -> Iterator[str]:
    """The names of all fields in a model and in the models that it holds; free dictionaries have none."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        for name, field in annotation.model_fields.items():
            yield field.alias or name
            yield from fields(field.annotation)
    for inner in get_args(annotation):
        yield from fields(inner)


def test_settings_reference_is_up_to_date() -> None:
    page = (ROOT / "infra" / "settings.md").read_text()
    assert page == reference(), "run: python -m infra.settings_reference > infra/settings.md"


def test_settings_reference_has_every_setting() -> None:
    page = (ROOT / "infra" / "settings.md").read_text()
    for prefix, settings in ENVIRONMENTS.items():
        assert [name for name in settings.model_fields if f"| `{prefix}{name.upper()}` |" not in page] == []
    assert [name for name in names(Parameters) if f"`{name}`" not in page] == []


def test_settings_reference_says_nothing_of_this_machine() -> None:
    """No absolute path; numbers of cores have words too."""
    assert "`/" not in reference()


def test_readme_is_short() -> None:
    assert len(README.read_text().splitlines()) < 200


def test_readme_documents_every_field_of_the_report() -> None:
    text = README.read_text()
    block = text[text.index("All fields of report.json") : text.index("</details>")]
    assert [name for name in fields(Report) if f"`{name}`" not in block] == []


@each_page
def test_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)]+)\)", page.read_text()):
        if target.startswith("https://"):
            continue
        path, _, fragment = target.partition("#")
        linked = (page.parent / path) if path else page
        assert linked.exists(), target
        if fragment:
            headings = re.findall(r"^#+ (.+)$", linked.read_text(), flags=re.MULTILINE)
            assert fragment in map(anchor, headings), target


@each_page
def test_paths_exist(page: Path) -> None:
    found = re.findall(rf"(?<![\w/.])(?:{'|'.join(TREES)})/[\w./-]+", code(page.read_text()))
    assert [path for path in found if path not in MADE and not (ROOT / path).exists()] == []


def test_paths_in_configuration_exist() -> None:
    """Comments included; of what git knows."""
    tracked = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout.split()
    endings = (".yaml", ".toml", ".containerfile", ".service", ".tf", "Makefile")
    for name in tracked:
        if name.endswith(endings):
            found = re.findall(rf"(?<![\w/.@-])(?:{'|'.join(TREES)})/[\w./-]*\w", (ROOT / name).read_text())
            assert [path for path in found if not (ROOT / path).exists()] == [], name


@each_page
def test_commands_are_accepted(page: Path) -> None:
    root = typer.main.get_command(app)
    for arguments in commands(page.read_text()):
        command, rest = root, arguments
        while hasattr(command, "commands"):
            assert rest and rest[0] in command.commands, arguments
            command, rest = command.commands[rest[0]], rest[1:]
        known = {option for parameter in command.params for option in (*parameter.opts, *parameter.secondary_opts)}
        assert {each.partition("=")[0] for each in rest if each.startswith("--")} <= known, arguments


def test_a_command_that_does_not_exist_is_seen() -> None:
    assert list(commands("`capture2mesh dream my-dog --big`")) == [["dream", "my-dog", "--big"]]


@each_page
def test_targets_of_make_exist(page: Path) -> None:
    targets = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), flags=re.MULTILINE))
    assert set(re.findall(r"^make ([\w-]+)", code(page.read_text()), flags=re.MULTILINE)) <= targets


@each_page
def test_variables_exist(page: Path) -> None:
    known = {f"{prefix}{name.upper()}" for prefix, model in ENVIRONMENTS.items() for name in model.model_fields}
    known |= set(re.findall(r"CAPTURE2MESH_\w+", (ROOT / "infra" / "compose.yaml").read_text()))
    assert set(re.findall(r"CAPTURE2MESH_[A-Z0-9_]*[A-Z0-9]", page.read_text())) - known <= {"CAPTURE2MESH_STACK"}


@each_page
def test_parameters_exist(page: Path) -> None:
    known = set(names(Parameters))
    found = re.findall(r"(?<![\w./])(?:infer|export|limits)\.[a-z_][\w.]*\w", page.read_text())
    assert set(found) <= known
