"""Leaves the tests of the TRELLIS network out where torch is not installed: `make test-trellis` adds it."""

from __future__ import annotations

from importlib.util import find_spec

collect_ignore_glob = [] if find_spec("torch") else ["test_*.py"]
