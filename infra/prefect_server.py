"""Prefect's server with a garbage collector of its own: `python -m infra.prefect_server server start ...`.

infra/stack.py uses it instead of `prefect`; flows/cli/server_process.py says why.
"""

from __future__ import annotations

import runpy

from flows.cli.server_process import collect_elsewhere

if __name__ == "__main__":
    collect_elsewhere()
    runpy.run_module("prefect", run_name="__main__")
