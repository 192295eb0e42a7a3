"""infra/licences.py tells licences apart."""

from __future__ import annotations

import pytest

from infra.licences import installed, is_accepted


@pytest.mark.parametrize(
    ("licence", "accepted"),
    [
        ("MIT", True),
        ("BSD-3-Clause AND 0BSD AND MIT AND Zlib AND CC0-1.0", True),
        ("Mozilla Public License 2.0 (MPL 2.0)", True),
        ("MPL-2.0 AND (Apache-2.0 OR MIT)", True),
        ("Copyright (c) 2015\nRedistribution and use in source and binary forms, with or without", True),
        ("GNU Affero General Public License v3", False),
        ("LGPL-3.0-only", False),
        ("MIT AND GPL-2.0-or-later", False),
        ("CC-BY-NC-4.0", False),
        ("Free for non-commercial use, MIT otherwise", False),
        ("", False),
    ],
)
def test_licence(licence: str, accepted: bool) -> None:
    assert is_accepted(licence) == accepted


def test_extras_and_markers_are_followed() -> None:
    names = {package.name.lower() for package in installed(["pytest", "sqlalchemy[asyncio]; python_version > '3'"])}
    assert names >= {"pytest", "pluggy", "sqlalchemy", "greenlet"}
    assert "hypothesis" not in names and not list(installed(["pytest; python_version < '3'"]))
