"""How long a sweep takes over a bucket of so many captures, all of them published: `python -m tests.benchmarks.sweep`.

And how long it takes to submit some of them: that is Prefect's time, and its database's.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from flows.sweep import submit_all
from flows.uploads.submit import Submitter
from tasks.capture.completeness import StorageState
from tasks.capture.listing import list_captures, upload_key
from tasks.settings import Parameters
from tasks.store.location import Location
from tests.support.published import mark_published
from tests.support.upload_house import WHOLE, at_home

THREADS = 16


def sweep(label: str) -> None:
    submitter = Submitter("s3://captures", "s3://assets")
    begun = time.perf_counter()
    state = StorageState.of(Location.of("s3://captures"))
    found = list_captures("s3://captures")
    listed = time.perf_counter()
    states = Counter(each.state for each in submit_all(submitter, found, state))
    ended = time.perf_counter()
    print(f"{label}: {ended - begun:.1f} s, {listed - begun:.1f} s of them for the listing; {dict(states)}", flush=True)


def published(names: list[str]) -> None:
    """As if they had been reconstructed."""
    keys = {each.id: upload_key(each, "fusion", Parameters()) for each in list_captures("s3://captures")}
    with ThreadPoolExecutor(THREADS) as pool:
        list(pool.map(lambda name: mark_published("s3://assets", name, keys[name]), names))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--captures", type=int, default=1250)
    parser.add_argument("--new", type=int, default=40)
    asked = parser.parse_args()
    names = [f"{number:05}" for number in range(asked.captures)]
    with tempfile.TemporaryDirectory() as folder, at_home(Path(folder)) as house:
        house.stop("receiver")
        with ThreadPoolExecutor(THREADS) as pool:
            list(pool.map(lambda name: house.put(name, WHOLE), names))
        print(f"{asked.captures} captures, {asked.captures * len(WHOLE)} objects", flush=True)
        published(names[asked.new :])
        sweep(f"{asked.new} are new")
        published(names)
        sweep("all are published")


if __name__ == "__main__":
    main()
