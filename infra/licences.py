"""Check the licences of all packages that an installation with the extras `server` and `gpu` brings.

`python -m infra.licences`, as `make lint` does, fails if a licence is neither permissive nor MPL. Packages that only
the tests need are left out. torch, of the extra `gpu`, need not be installed: its licence is noted here.
"""

from __future__ import annotations

import re
import sys
import tomllib
from collections.abc import Iterable, Iterator
from importlib.metadata import Distribution, distribution
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

PYPROJECT = Path(__file__).parents[1] / "pyproject.toml"
GOOD = re.compile(
    r"\b(MIT|0?BSD|Apache|ISC|MPL|Mozilla|PSF|Python Software Foundation|Zlib|CC0|CNRI-Python)\b"
    r"|Redistribution and use in source and binary forms"  # the text of the BSD licences
)
BAD = re.compile(r"\b[AL]?GPL|\bGNU\b|Artistic|non.?commercial|\bNC\b|proprietary", re.IGNORECASE)
EXCEPTIONS = {
    "text-unidecode": "Artistic License or GPL: a choice, and we choose the Artistic License",
    "openexr": "BSD-3-Clause: its metadata names no licence",
}
"""Packages that fail the check and are accepted, with the reason."""
NOT_INSTALLED = {"torch": "BSD-3-Clause"}
"""Licences of packages of the extra `gpu`, as their authors publish them. NVIDIA's CUDA libraries, which torch's build
for CUDA brings as packages, are under NVIDIA's own terms, free of charge."""


def licence_of(package: Distribution) -> str:
    """The licence as the package's metadata says it: an expression, else classifiers, else free text."""
    metadata = package.metadata.json
    classifiers = [
        text.rpartition(" :: ")[2] for text in metadata.get("classifier", []) if text.startswith("License ::")
    ]
    return str(metadata.get("license_expression") or ", ".join(classifiers) or metadata.get("license", ""))


def is_accepted(licence: str) -> bool:
    """True for a licence that is permissive, or MPL, whatever else may be chosen."""
    return bool(GOOD.search(licence)) and not BAD.search(licence)


def installed(requirements: Iterable[str]) -> Iterator[Distribution]:
    """The packages that satisfy requirements, and those that they require themselves."""
    waiting = [(Requirement(text), "") for text in requirements]
    seen: set[tuple[str, str]] = set()
    while waiting:
        requirement, extra = waiting.pop()
        if requirement.marker is not None and not requirement.marker.evaluate({"extra": extra}):
            continue
        name = canonicalize_name(requirement.name)
        wanted = {(name, each) for each in ("", *requirement.extras)} - seen
        seen |= wanted
        if name in NOT_INSTALLED:
            continue
        package = distribution(name)
        if (name, "") in wanted:
            yield package
        waiting += [(Requirement(text), each) for _, each in wanted for text in package.requires or []]


def main() -> int:
    """Print what is wrong; gives 1 if a licence is not accepted, or an exception is not needed any more."""
    project = tomllib.loads(PYPROJECT.read_text())["project"]
    extras = project["optional-dependencies"]
    packages = installed([*project["dependencies"], *extras["server"], *extras["gpu"]])
    licences = {canonicalize_name(package.name): licence_of(package) for package in packages} | NOT_INSTALLED
    refused = {name for name, licence in licences.items() if not is_accepted(licence)}
    print(
        f"{len(licences)} packages; accepted all the same:",
        *(f"  {name}: {EXCEPTIONS[name]}" for name in EXCEPTIONS),
        sep="\n",
    )
    for name in sorted(refused - EXCEPTIONS.keys()):
        print(f"error: {name}: this licence is not accepted: {licences[name] or 'none'}", file=sys.stderr)
    for name in sorted(EXCEPTIONS.keys() - refused):
        print(f"error: {name}: needs no exception in {Path(__file__).name} any more", file=sys.stderr)
    return int(refused != EXCEPTIONS.keys())


if __name__ == "__main__":
    sys.exit(main())
