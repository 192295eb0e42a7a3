"""The start of the model's process: `python FOLDER DESCRIPTOR PARENT MODEL`, run by `model_process.py`.

DESCRIPTOR: the inherited socket to serve on. PARENT: the process id of the parent.
MODEL: `network`, or `upstream` for upstream's package.
"""

from __future__ import annotations

import importlib
import sys
from pathlib import Path

if __name__ == "__main__":
    # Python has put this folder first in the search path, where its modules could hide others of the same names. It is
    # imported as a package instead, and nothing of it stays in the search path.
    sys.path[0] = str(Path(__file__).resolve().parents[1])
    serving = importlib.import_module(f"{Path(__file__).resolve().parent.name}.serve")
    del sys.path[0]
    serving.main(int(sys.argv[1]), int(sys.argv[2]), sys.argv[3] == "upstream")
