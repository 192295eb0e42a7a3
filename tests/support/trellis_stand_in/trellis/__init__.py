"""A stand-in for ReconViaGen's package, see the README beside it."""

import os

import faults

if os.environ.get("SPCONV_ALGO") != "native":
    raise RuntimeError("SPCONV_ALGO was not native when trellis was imported first")
if missing := faults.asked("MISSING_IMPORT"):
    raise ModuleNotFoundError(f"No module named {missing!r}", name=missing)

from . import models, pipelines, representations, utils

__all__ = ["models", "pipelines", "representations", "utils"]
