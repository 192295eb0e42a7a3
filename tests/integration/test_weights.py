"""Weights against a stand-in of the Hugging Face hub and a real S3 mirror, with what goes wrong on the way."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import random
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from prefect import flow
from prefect.settings import (
    PREFECT_API_URL,
    PREFECT_FLOWS_HEARTBEAT_FREQUENCY,
    PREFECT_LOGGING_TO_API_ENABLED,
    temporary_settings,
)

from tasks.errors import InputError, StorageError, StorageUnavailable, WeightsCorrupt, WeightsMissing
from tasks.progress import Timings, observed_by
from tasks.settings import settings
from tasks.store.location import Manifest
from tasks.weights import origins
from tasks.weights.fetch_weights import fetch_weights
from tasks.weights.local import environment, fetch, find, verify
from tasks.weights.pins import Bundle, Weights, bundle, declared, local_lock, lock_text
from tests.support.hub import Hub, serving
from tests.support.own_settings import forget
from tests.support.running import ROOT, clean_environment, kill_group, snapshot, task_runs, wait_for
from tests.support.running_s3 import S3

MODEL, CODE = "org/model", "org/code"
BIG, SMALL, DECODER = "ckpts/flow.safetensors", "pipeline.json", "ckpts/dec.safetensors"
CUT = 100_000
TOKEN = "hf_aSecretThatNobodyPrints"
OWN = ("CAPTURE2MESH_WEIGHTS", "CAPTURE2MESH_WEIGHTS_LIST", "CAPTURE2MESH_WEIGHTS_LOCK", "HF_ENDPOINT")
COMMAND = [sys.executable, "-m", "flows", "weights"]
TIMEOUT = 60


def noise(name: str, size: int) -> bytes:
    return random.Random(name).randbytes(size)


@dataclass(frozen=True)
class Place:
    """A declared list, a folder for the weights, and the hub that has them."""

    hub: Hub
    list_: Path
    weights: Path

    def command(self, *arguments: str, **env: str) -> subprocess.Popen[str]:
        own = {name: os.environ[name] for name in OWN}
        return subprocess.Popen(
            [*COMMAND, *arguments],
            cwd=ROOT,
            env=clean_environment() | own | env,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )

    def run(self, *arguments: str, **env: str) -> tuple[int, str, str]:
        process = self.command(*arguments, **env)
        try:
            stdout, stderr = process.communicate(timeout=TIMEOUT)
        finally:
            kill_group(process)
        return process.returncode, stdout, stderr

    @property
    def lock(self) -> Path:
        """The lock file of CAPTURE2MESH_WEIGHTS_LOCK."""
        return self.list_.with_name("weights.lock.json")

    @property
    def bundles(self) -> list[Path]:
        """What is visible as a bundle."""
        return [path for path in self.weights.glob("*") if len(path.name) == len(hashlib.sha256().hexdigest())]


def source(hub: Hub, repository: str, **values: Any) -> dict[str, Any]:
    files = [{"path": path, "bytes": None, "sha256": None} for path in hub.repositories[repository].files]
    return {"repository": repository, "revision": None, "files": files} | values


@pytest.fixture
def unpinned(own_store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Place]:
    """A model on the hub, and code and a checkpoint at plain URLs; no lock pins anything."""
    for name in ("HF_TOKEN", "HF_HUB_OFFLINE", "CAPTURE2MESH_WEIGHTS_MIRROR"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(origins, "PAUSE_SECONDS", 0.001)
    with serving(Hub()) as hub:
        hub.publish(MODEL, {SMALL: b'{"args": {}}', BIG: noise(BIG, 500_000), DECODER: noise(DECODER, 9000)})
        code = hub.publish(CODE, {"hubconf.py": b"x = 1\n", "dino/__init__.py": b"", "dino/hub/__init__.py": b""})
        checkpoint = hub.publish("host/files", {"checkpoint.pth": noise("checkpoint", 8000)})
        sources = [
            source(hub, MODEL, licence="MIT"),
            source(
                hub,
                CODE,
                url=f"{hub.endpoint}/plain/{CODE}/{{revision}}/{{path}}",
                folder="torch/hub/code_main",
                revision=code.revision,
            ),
            source(
                hub,
                "host/files",
                url=f"{hub.endpoint}/plain/host/files/{checkpoint.revision}/{{path}}",
                folder="torch/hub/checkpoints",
            ),
        ]
        place = Place(hub, tmp_path / "weights.json", tmp_path / "weights")
        place.list_.write_text(json.dumps({"sources": sources}))
        monkeypatch.setenv("CAPTURE2MESH_WEIGHTS", str(place.weights))
        monkeypatch.setenv("CAPTURE2MESH_WEIGHTS_LIST", str(place.list_))
        monkeypatch.setenv("CAPTURE2MESH_WEIGHTS_LOCK", str(place.lock))
        monkeypatch.setenv("HF_ENDPOINT", hub.endpoint)
        forget()
        yield place


@pytest.fixture
def place(unpinned: Place) -> Place:
    """The same, with a lock file that pins everything."""
    unpinned.lock.write_text(lock_text(published(unpinned)))
    return unpinned


def published(place: Place) -> Bundle:
    """The list with the revisions and the contents that are on the hub."""
    sources = []
    for each in declared().sources:
        repository = place.hub.repositories[each.repository]
        files = [
            {"path": path, "bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
            for path, data in repository.files.items()
        ]
        revision = repository.revision if each.has_revisions else None
        sources.append(each.model_dump(exclude_none=True) | {"revision": revision, "files": files})
    return Bundle.model_validate({"sources": sources})


def whole(place: Place, folder: Path, wanted: Bundle) -> bool:
    """Every file has the content that is published, and the manifest says so."""
    for each in wanted.sources:
        for path, data in place.hub.repositories[each.repository].files.items():
            assert (folder / each.path_in_bundle(path)).read_bytes() == data, path
    entries = Manifest.model_validate_json((folder / "manifest.json").read_bytes()).files
    found = {path.relative_to(folder).as_posix(): path for path in folder.rglob("*") if path.is_file()}
    assert sorted(found) == sorted([*(entry.path for entry in entries), "manifest.json"])
    for entry in entries:
        data = found[entry.path].read_bytes()
        assert (len(data), hashlib.sha256(data).hexdigest()) == (entry.bytes, entry.sha256)
    return True


def partial_of(place: Place, data: bytes) -> Path:
    """Where a part of that content waits for the rest."""
    blobs = place.weights / "blobs"
    blobs.mkdir(parents=True, exist_ok=True)
    return blobs / f"{hashlib.sha256(data).hexdigest()}.partial"


def test_what_is_fetched_loads_with_the_network_off(place: Place) -> None:
    shown: list[float] = []
    folder = fetch(bundle(), shown.append)
    assert whole(place, folder, bundle())
    assert shown == sorted(shown) and shown[-1] == 1.0
    assert not list(place.weights.rglob("*.partial")) and place.bundles == [folder]
    script = f"""
from huggingface_hub import hf_hub_download, snapshot_download
import os, pathlib
print(hf_hub_download({MODEL!r}, {BIG!r}))
print(snapshot_download({MODEL!r}))
print(len(list((pathlib.Path(os.environ["TORCH_HOME"]) / "hub").rglob("*.p*"))))
"""
    before = snapshot(folder)
    env = clean_environment() | environment(folder) | {"HF_ENDPOINT": "http://127.0.0.1:9"}
    done = subprocess.run([sys.executable, "-c", script], env=env, capture_output=True, text=True, timeout=TIMEOUT)
    assert done.returncode == 0, done.stderr
    big, model, torch_files = done.stdout.split()
    assert Path(big).read_bytes() == place.hub.repositories[MODEL].files[BIG]
    assert (Path(model) / SMALL).read_bytes() == place.hub.repositories[MODEL].files[SMALL]
    assert torch_files == "4"
    assert snapshot(folder) == before


def test_the_second_call_needs_no_network_and_does_nothing(place: Place) -> None:
    folder = fetch(bundle())
    before = snapshot(place.weights)
    asked = len(place.hub.requests)
    code, stdout, stderr = place.run("fetch", HF_ENDPOINT="http://127.0.0.1:9", HF_HUB_OFFLINE="1")
    assert (code, stdout.strip()) == (0, str(folder)), stderr
    assert fetch(bundle()) == folder
    assert len(place.hub.requests) == asked
    assert snapshot(place.weights) == before


def test_bundles_share_the_files_that_are_equal(place: Place) -> None:
    old, before = bundle(), fetch(bundle())
    place.hub.publish(MODEL, place.hub.repositories[MODEL].files | {SMALL: b'{"args": 2}'})
    place.lock.write_text(lock_text(published(place)))
    place.hub.requests.clear()
    folder = fetch(bundle())
    assert folder != before and whole(place, folder, bundle())
    assert place.hub.ranges(SMALL) == [None] and place.hub.ranges(BIG) == []
    paths = [made.sources[0].path_in_bundle(BIG) for made in (old, bundle())]
    assert (before / paths[0]).samefile(folder / paths[1])


def test_a_cut_connection_is_continued(place: Place) -> None:
    place.hub.cuts[BIG] = [CUT, CUT, CUT]
    place.hub.busy[BIG] = 2
    assert whole(place, fetch(bundle()), bundle())
    asked = place.hub.ranges(BIG)
    assert asked == [None, None, None, *(f"bytes={times * CUT}-" for times in (1, 2, 3))]


def test_what_has_arrived_is_kept_for_the_next_run(place: Place) -> None:
    place.hub.cuts[BIG] = [CUT, *[0] * (origins.FRUITLESS_TRIES - 1)]
    with pytest.raises(StorageUnavailable, match="run again"):
        fetch(bundle())
    assert place.bundles == [] and find(bundle()) is None
    data = place.hub.repositories[MODEL].files[BIG]
    assert partial_of(place, data).read_bytes() == data[:CUT]
    place.hub.requests.clear()
    assert whole(place, fetch(bundle()), bundle())
    assert place.hub.ranges(BIG) == [f"bytes={CUT}-"]


def test_a_killed_download_is_continued(place: Place) -> None:
    place.hub.stalls[BIG] = CUT
    process = place.command("fetch")
    try:
        wait_for("the part", lambda: any(path.stat().st_size == CUT for path in place.weights.rglob("*.partial")), 30)
    finally:
        process.send_signal(signal.SIGKILL)
        kill_group(process)
    assert place.bundles == []
    place.hub.stalls.clear()
    place.hub.requests.clear()
    assert whole(place, fetch(bundle()), bundle())
    assert place.hub.ranges(BIG) == [f"bytes={CUT}-"]


def test_a_server_without_ranges(place: Place) -> None:
    place.hub.ignores_ranges = True
    place.hub.cuts[BIG] = [CUT, 2 * CUT]
    assert whole(place, fetch(bundle()), bundle())
    assert len(place.hub.ranges(BIG)) == 3


@pytest.mark.parametrize("change", [lambda data: b"\0" + data[1:], lambda data: data[:-1], lambda data: data + b"more"])
def test_other_content_than_pinned(place: Place, change: Any) -> None:
    place.hub.wrong[BIG] = change(place.hub.repositories[MODEL].files[BIG])
    with pytest.raises(WeightsCorrupt, match=f"{MODEL}/{BIG}: what is served is not what is pinned"):
        fetch(bundle())
    assert place.bundles == [] and find(bundle()) is None
    digest = hashlib.sha256(place.hub.repositories[MODEL].files[BIG]).hexdigest()
    assert not list(place.weights.rglob(f"{digest}*"))
    place.hub.wrong.clear()
    assert whole(place, fetch(bundle()), bundle())


def test_a_part_that_is_wrong_is_fetched_anew(place: Place) -> None:
    partial_of(place, place.hub.repositories[MODEL].files[BIG]).write_bytes(b"from somewhere else")
    assert whole(place, fetch(bundle()), bundle())
    assert place.hub.ranges(BIG) == ["bytes=19-", None]


def test_a_file_that_is_gone(place: Place) -> None:
    del place.hub.repositories[MODEL].files[BIG]
    with pytest.raises(InputError, match=f"{MODEL}/{BIG} .*not there"):
        fetch(bundle())
    assert place.bundles == []


def test_no_network(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(StorageUnavailable, match="ConnectError; check the network"):
        fetch(bundle())
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(WeightsMissing, match="HF_HUB_OFFLINE is set"):
        fetch(bundle())


def test_no_room(place: Place) -> None:
    content = json.loads(place.lock.read_text())
    content["sources"][0]["files"][0]["bytes"] = 10**18
    place.lock.write_text(json.dumps(content))
    with pytest.raises(StorageError, match="GB are missing"):
        fetch(bundle())
    assert place.hub.requests == []


def test_several_at_once(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    place.hub.seconds_per_answer = 0.3
    fetch(bundle())
    assert place.hub.most_at_once == settings().weights_parallel == 4


def test_two_processes_at_once(place: Place) -> None:
    place.hub.seconds_per_answer = 0.3
    processes = [place.command("fetch") for _ in range(2)]
    try:
        finished = [process.communicate(timeout=TIMEOUT) for process in processes]
    finally:
        for process in processes:
            kill_group(process)
    assert [process.returncode for process in processes] == [0, 0], finished
    (folder,) = place.bundles
    assert {stdout.strip() for stdout, _ in finished} == {str(folder)}
    assert whole(place, folder, bundle())
    for path in (BIG, SMALL, "checkpoint.pth"):
        assert place.hub.ranges(path) == [None], path


def test_the_token_is_sent_and_never_told(
    place: Place, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]
) -> None:
    place.hub.token = TOKEN
    caplog.set_level(logging.DEBUG)
    with pytest.raises(InputError, match="set HF_TOKEN"):
        fetch(bundle())
    monkeypatch.setenv("HF_TOKEN", f"{TOKEN}-expired")
    with pytest.raises(InputError, match="access refused") as refused:
        fetch(bundle())
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    place.lock.unlink()
    fetch(bundle())
    sent = {request.token for request in place.hub.requests if request.path.startswith((f"/{MODEL}", "/api/"))}
    assert TOKEN in sent
    elsewhere = [request for request in place.hub.requests if request.path.startswith(("/large/", "/plain/"))]
    assert elsewhere and all(request.token is None for request in elsewhere)
    code, stdout, stderr = place.run("fetch", "--repair", "--write-lock", HF_TOKEN=TOKEN, HF_DEBUG="1")
    assert code == 0, stderr
    out, err = capfd.readouterr()
    kept = [path.read_bytes() for path in place.weights.rglob("*") if path.is_file()]
    told = [str(refused.value), caplog.text, out, err, stdout, stderr, place.lock.read_text(), *map(repr, kept)]
    assert not any(TOKEN in text for text in told)


def test_the_first_fetch_pins_what_is_published(unpinned: Place) -> None:
    code, stdout, stderr = unpinned.run("fetch")
    assert code == 0, stderr
    assert bundle() == published(unpinned) and not bundle().unpinned
    assert whole(unpinned, Path(stdout.strip()), bundle())
    assert f"{MODEL} at {unpinned.hub.repositories[MODEL].revision}: 3 file(s), 0.5 MB" in stderr
    assert f"lock file: {local_lock()}" in stderr and not unpinned.lock.exists()
    # every file is downloaded once: the digest of a large one is in the hub's metadata
    assert unpinned.hub.ranges(BIG) == unpinned.hub.ranges("checkpoint.pth") == [None]
    unpinned.hub.requests.clear()
    code, stdout, _ = unpinned.run("fetch", "--write-lock", "--frozen")
    assert code == 0 and unpinned.hub.requests == []
    assert unpinned.lock.read_text() == local_lock().read_text()


def test_a_moved_revision_changes_nothing_that_is_pinned(unpinned: Place) -> None:
    folder = fetch(bundle())
    pinned = bundle()
    old = unpinned.hub.repositories[MODEL].files
    moved = unpinned.hub.publish(MODEL, old | {SMALL: b'{"args": 2}'})
    unpinned.hub.requests.clear()
    assert fetch(bundle()) == folder and bundle() == pinned and unpinned.hub.requests == []
    # another machine with this lock asks for the pinned revision, never for the newest one
    unpinned.lock.write_bytes(local_lock().read_bytes())
    shutil.rmtree(unpinned.weights)
    with pytest.raises(InputError, match="not there"):
        fetch(bundle())
    resolved = [request.path for request in unpinned.hub.requests if "/resolve/" in request.path]
    assert resolved and not any(moved.revision in path for path in resolved)


def test_frozen_refuses_what_no_lock_pins(unpinned: Place) -> None:
    code, _, stderr = unpinned.run("fetch", "--frozen")
    assert code == 2 and "Traceback" not in stderr
    assert MODEL in stderr and "host/files" in stderr and str(unpinned.lock) in stderr
    with pytest.raises(InputError, match="weights fetch"):
        Weights.of(bundle())
    assert unpinned.hub.requests == [] and not unpinned.weights.exists()


def test_a_lock_of_other_files_or_another_revision_pins_nothing(place: Place) -> None:
    content = json.loads(place.list_.read_text())
    content["sources"][0]["revision"] = "c" * 40
    content["sources"][1]["files"] = content["sources"][1]["files"][:1]
    place.list_.write_text(json.dumps(content))
    assert [source.repository for source in bundle().unpinned] == [MODEL, CODE]
    with pytest.raises(InputError, match=f"{MODEL} at {'c' * 40}: not there"):
        fetch(bundle())
    assert not local_lock().exists()


@pytest.mark.parametrize("change", [lambda data: b"\0" + data[1:], lambda data: data[:-1]])
@pytest.mark.parametrize("path", [BIG, SMALL])
def test_the_first_fetch_compares_with_the_hubs_digests(unpinned: Place, path: str, change: Any) -> None:
    unpinned.hub.wrong[path] = change(unpinned.hub.repositories[MODEL].files[path])
    with pytest.raises((WeightsCorrupt, StorageUnavailable), match=f"{MODEL}/{path}: what is served is not what"):
        fetch(bundle())
    assert not local_lock().exists() and unpinned.bundles == [] and bundle().unpinned
    unpinned.hub.wrong.clear()
    assert whole(unpinned, fetch(bundle()), published(unpinned))


def test_a_first_fetch_that_was_cut_is_continued(unpinned: Place) -> None:
    """Also of a file whose digest nobody has told."""
    cut = len(unpinned.hub.repositories["host/files"].files["checkpoint.pth"]) // 2
    unpinned.hub.cuts["checkpoint.pth"] = [cut, *[0] * (origins.FRUITLESS_TRIES - 1)]
    with pytest.raises(StorageUnavailable, match="run again"):
        fetch(bundle())
    assert not local_lock().exists()
    unpinned.hub.requests.clear()
    assert whole(unpinned, fetch(bundle()), published(unpinned))
    assert unpinned.hub.ranges("checkpoint.pth") == [f"bytes={cut}-"]


def test_two_first_fetches_at_once(unpinned: Place) -> None:
    unpinned.hub.seconds_per_answer = 0.3
    processes = [unpinned.command("fetch") for _ in range(2)]
    try:
        finished = [process.communicate(timeout=TIMEOUT) for process in processes]
    finally:
        for process in processes:
            kill_group(process)
    assert [process.returncode for process in processes] == [0, 0], finished
    assert whole(unpinned, unpinned.bundles[0], bundle()) and len(unpinned.bundles) == 1
    assert unpinned.hub.ranges(BIG) == [None]


def test_a_pickle_beside_safetensors_is_refused(unpinned: Place) -> None:
    files = unpinned.hub.repositories[MODEL].files
    unpinned.hub.publish(MODEL, files | {"pytorch_model.bin": noise("pickle", 5000)})
    content = json.loads(unpinned.list_.read_text())
    content["sources"][0]["files"] = [{"path": "pytorch_model.bin"}]
    unpinned.list_.write_text(json.dumps(content))
    with pytest.raises(InputError, match=r"pytorch_model.bin is a pickle; take the .safetensors"):
        fetch(bundle())


def test_the_first_fetch_names_what_a_repository_lacks(unpinned: Place) -> None:
    del unpinned.hub.repositories[MODEL].files[SMALL]
    with pytest.raises(InputError, match=rf"has no {SMALL}; correct .*\. It has: ckpts/dec"):
        fetch(bundle())


def test_the_first_fetch_needs_the_hub(unpinned: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CAPTURE2MESH_WEIGHTS_MIRROR", "memory://mirror")
    forget()
    with pytest.raises(InputError, match="a mirror does not say which content is right"):
        fetch(bundle())
    monkeypatch.delenv("CAPTURE2MESH_WEIGHTS_MIRROR")
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    forget()
    with pytest.raises(StorageUnavailable, match="ConnectError"):
        fetch(bundle())
    assert not local_lock().exists()


def test_verify_names_what_is_wrong_and_repair_rights_it(place: Place) -> None:
    folder = fetch(bundle())
    assert verify(bundle()) == []
    big, small = (folder / bundle().sources[0].path_in_bundle(path) for path in (BIG, SMALL))
    big.write_bytes(b"\0" * big.stat().st_size)
    small.unlink()
    code, _, stderr = place.run("verify")
    assert code == 1 and str(big) in stderr and f"{small}: missing" in stderr and "--repair" in stderr
    assert find(bundle()) is None
    place.hub.requests.clear()
    code, _, stderr = place.run("fetch", "--repair")
    assert code == 0, stderr
    assert whole(place, folder, bundle())
    assert place.hub.ranges(BIG) == [None] and place.hub.ranges(SMALL) == []
    code, stdout, _ = place.run("verify")
    assert code == 0 and "every file is as it is pinned" in stdout
    assert place.bundles == [folder]


def cells(table: str) -> dict[str, list[str]]:
    """The rows of a printed table, by their first cell."""
    rows = [[cell.strip() for cell in line.split("│")[1:-1]] for line in table.splitlines() if "│" in line]
    return {row[0]: row[1:] for row in rows}


def test_list_says_what_is_pinned_and_present(unpinned: Place) -> None:
    code, stdout, stderr = unpinned.run("list")
    assert code == 0, stderr
    rows = cells(stdout)
    assert rows[MODEL] == ["", "3", "?", "NO", "0 of 3", "MIT"]
    assert "bundle: not pinned" in stdout
    fetch(bundle())
    _, stdout, _ = unpinned.run("list")
    rows = cells(stdout)
    revision = unpinned.hub.repositories[MODEL].revision[:12]
    assert rows[MODEL] == [revision, "3", "0.5 MB", "yes", "yes", "MIT"]
    assert rows["host/files"][0] == "(none)"
    assert "bundle: whole" in stdout


def test_a_folder_as_mirror(place: Place, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mirror = tmp_path / "mirror"
    monkeypatch.setenv("CAPTURE2MESH_WEIGHTS_MIRROR", str(mirror))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    forget()
    with pytest.raises(InputError, match="the mirror does not have it"):
        fetch(bundle())
    for path, data in mirrored(place).items():
        (mirror / path).parent.mkdir(parents=True, exist_ok=True)
        (mirror / path).write_bytes(data)
    big = mirror / MODEL / place.hub.repositories[MODEL].revision / BIG
    big.write_bytes(big.read_bytes()[:-1])
    with pytest.raises(WeightsCorrupt, match="499999 bytes, 500000 are pinned"):
        fetch(bundle())
    big.write_bytes(place.hub.repositories[MODEL].files[BIG])
    assert whole(place, fetch(bundle()), bundle())
    assert place.hub.requests == []


def mirrored(place: Place) -> dict[str, bytes]:
    return {
        each.path_in_mirror(path): data
        for each in bundle().sources
        for path, data in place.hub.repositories[each.repository].files.items()
    }


def test_s3_as_mirror(place: Place, s3: S3) -> None:
    for path, data in mirrored(place).items():
        s3.admin.pipe_file(f"assets/weights/{path}", data)
    # what has arrived before is continued from the mirror too
    data = place.hub.repositories[MODEL].files[BIG]
    partial_of(place, data).write_bytes(data[:CUT])
    env = dict(s3.env) | {"CAPTURE2MESH_WEIGHTS_MIRROR": "s3://assets/weights", "HF_HUB_OFFLINE": "1"}
    code, stdout, stderr = place.run("fetch", **env)
    assert code == 0, stderr
    assert whole(place, Path(stdout.strip()), bundle())
    assert place.hub.requests == []
    wrong = {"AWS_SECRET_ACCESS_KEY": "wrong"}
    shutil.rmtree(place.weights)
    code, _, stderr = place.run("fetch", **env | wrong)
    assert code == 1 and "AWS_" in stderr and "Traceback" not in stderr


def test_the_task_is_cached_once_the_folder_is_whole(
    place: Place, prefect_server: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    @flow(name="weights")
    def run() -> Weights:
        return fetch_weights(Weights.of(bundle()))

    # the first try fails for good, the task's retry finds the hub well again
    place.hub.busy[SMALL] = origins.FRUITLESS_TRIES
    timings = Timings()
    # heartbeats cost every flow a second; logs would still be sent after the server is gone
    updates = {
        PREFECT_API_URL: prefect_server,
        PREFECT_FLOWS_HEARTBEAT_FREQUENCY: None,
        PREFECT_LOGGING_TO_API_ENABLED: False,
    }
    with temporary_settings(updates=updates), observed_by(timings):
        first, second = run(), run()
    assert first == second == Weights.of(bundle())
    assert [(stage.name, stage.cached) for stage in timings.stages] == [
        ("fetch_weights", False),
        ("fetch_weights", True),
    ]
    recorded = task_runs(prefect_server, 2, flows={"name": {"any_": ["weights"]}})
    assert [task["state_name"] for task in recorded] == ["Completed", "Cached"]
    assert first.revisions[MODEL] == place.hub.repositories[MODEL].revision
    assert len(place.hub.ranges(SMALL)) == origins.FRUITLESS_TRIES + 1
