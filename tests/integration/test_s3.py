"""Capture, store and output on S3: a real server that checks keys and conditions."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime
from pathlib import Path

import httpx
import pytest

from tasks.mesh.publish import Latest, _move_latest
from tasks.store.location import Location
from tasks.store.results import Store, StoredResult
from tests.support.running import STAGES, TIMEOUT, CommandLine, Finished, assert_published, kill_group, post
from tests.support.running_s3 import S3

MANIFEST = "manifest.json"
THREADS = 8


@pytest.fixture(scope="module")
def ball(capture: Callable[[str], Path]) -> Path:
    return capture("ball")


@pytest.fixture(scope="module")
def uploaded(s3: S3, ball: Path) -> str:
    """The small capture in the bucket `captures`."""
    return s3.upload(ball, "captures/today/ball")


def on_s3(s3: S3, folder: Path, server: str, prefix: str, **env: str) -> CommandLine:
    """A command line whose store is a prefix of the bucket `store`."""
    return CommandLine(folder, server, {**s3.env, "CAPTURE2MESH_STORE": f"s3://store/{prefix}", **env})


def asset_of(s3: S3, prefix: str) -> tuple[str, dict[str, bytes]]:
    """The key of the only asset below a prefix, and its files."""
    (marker,) = [path for path in s3.admin.find(prefix) if path.endswith("/_SUCCESS")]
    folder = marker.removesuffix("/_SUCCESS")
    return folder, s3.keys(folder)


def assert_complete(s3: S3, prefix: str, finished: Finished) -> None:
    """One asset below the prefix, complete, and latest.json names it."""
    folder, contents = asset_of(s3, prefix)
    assert_published(contents, [entry.path for entry in finished.report.outputs])
    latest = Latest.model_validate_json(s3.admin.cat_file(f"{prefix}/ball/latest.json"))
    assert folder == f"{prefix}/ball/{latest.run_key}"


def assert_store_layout(s3: S3, prefix: str) -> None:
    """`<stage>/<key>/<attempt>/...`, and a manifest beside the attempt that it names."""
    keys = s3.keys(prefix)
    manifests = [path for path in keys if path.endswith(f"/{MANIFEST}")]
    assert sorted(path.split("/")[0] for path in manifests) == sorted(STAGES)
    expected = set[str]()
    for path in manifests:
        stage, key, name = path.split("/")
        assert name == MANIFEST
        manifest = json.loads(keys[path])
        attempt = manifest["attempt"]
        assert attempt
        files = {f"{stage}/{key}/{attempt}/{file['path']}": file["bytes"] for file in manifest["files"]}
        assert {path: len(keys[path]) for path in files} == files
        expected |= {path, *files}
    assert set(keys) == expected


@pytest.fixture(scope="module")
def remote(
    s3: S3, uploaded: str, prefect_server: str, tmp_path_factory: pytest.TempPathFactory
) -> tuple[CommandLine, Finished]:
    """A run with everything on S3.

    Its links are public: SeaweedFS serves a bucket's objects to strangers where the identity `anonymous` may read it.
    """
    public = {"CAPTURE2MESH_PUBLIC_URL": f"{s3.endpoint}/assets"}
    flows = on_s3(s3, tmp_path_factory.mktemp("remote"), prefect_server, "same", **public)
    return flows, flows.reconstruct(uploaded, "s3://assets/same")


def test_everything_on_s3_gives_what_a_local_run_gives(
    s3: S3, uploaded: str, ball: Path, remote: tuple[CommandLine, Finished], prefect_server: str, tmp_path: Path
) -> None:
    local = CommandLine(tmp_path / "local", prefect_server)
    here = local.reconstruct(ball)
    flows, there = remote
    assert there.code == 0, there.stderr
    assert there.report.status == "normal"
    assert there.ran == list(STAGES)
    assert there.report.capture.digest == here.report.capture.digest
    assert_complete(s3, "assets/same", there)
    (mesh,) = local.output.glob("ball/*/mesh.glb")
    folder, contents = asset_of(s3, "assets/same")
    assert contents["mesh.glb"] == mesh.read_bytes()
    assert folder.endswith(mesh.parent.name)  # the same work has the same run key
    assert_store_layout(s3, "store/same")

    before = {path: info["LastModified"] for path, info in s3.admin.find(folder, detail=True).items()}
    again = flows.reconstruct(uploaded, "s3://assets/same")
    assert again.code == 0, again.stderr
    assert again.ran == []
    assert {path: info["LastModified"] for path, info in s3.admin.find(folder, detail=True).items()} == before

    # another machine: nothing in scratch, and the results of both come from the store
    elsewhere = on_s3(s3, tmp_path / "elsewhere", prefect_server, "same")
    retextured = elsewhere.reconstruct(uploaded, "s3://assets/retextured", export__texture_px="512")
    assert retextured.code == 0, retextured.stderr
    assert retextured.ran == ["export_glb", "convert_formats", "validate_mesh"]


@pytest.mark.faults
def test_concurrent_runs_make_one_asset(s3: S3, uploaded: str, prefect_server: str, tmp_path: Path) -> None:
    lines = [on_s3(s3, tmp_path / name, prefect_server, "race") for name in ("one", "two")]
    processes = [flows.start(*flows.reconstruct_arguments(uploaded, "s3://assets/race")) for flows in lines]
    try:
        runs = []
        for process in processes:
            stdout, stderr = process.communicate(timeout=TIMEOUT)
            runs.append(Finished(process.returncode, stdout, stderr))
    finally:
        for process in processes:
            kill_group(process)
    for finished in runs:
        assert finished.code == 0, finished.stderr
    assert runs[0].report.outputs == runs[1].report.outputs
    assert_complete(s3, "assets/race", runs[0])
    assert_store_layout(s3, "store/race")


class Number(StoredResult):
    """A result with a value of its own."""

    value: int


@pytest.mark.parametrize("broken", [False, True], ids=["empty store", "broken entry"])
def test_one_of_racing_commits_wins(broken: bool, s3: S3, worker_here: None) -> None:
    prefix = f"store/commits-{broken}"
    shared = Store(Location.of(f"s3://{prefix}"))
    if broken:
        s3.admin.pipe_file(f"{prefix}/infer/key/manifest.json", b"{")

    def commit(value: int) -> Number:
        with shared.working_folder("infer", "key") as folder:
            (folder / "number.txt").write_text(str(value))
            return shared.commit("infer", "key", folder, Number(value=value))

    with ThreadPoolExecutor(THREADS) as pool:
        results = set(pool.map(commit, range(THREADS)))
    kept = shared.load("infer", "key", Number)
    assert kept is not None
    assert shared.read(kept, "number.txt") == str(kept.value).encode()
    assert results == {kept}
    assert sorted(s3.keys(f"{prefix}/infer/key")) == sorted([f"{kept.attempt}/number.txt", MANIFEST])


def test_latest_only_moves_forward_in_a_race(s3: S3, worker_here: None) -> None:
    pointer = Location.of("s3://assets/pointer/latest.json")
    uploads = [datetime(2026, 1, 1, hour, tzinfo=UTC) for hour in range(THREADS)]

    def move(hour: int) -> None:
        key = f"key-{hour}"
        _move_latest(pointer, Latest(run_key=key, upload_key="", uploaded_at=uploads[hour], report=key))

    with ThreadPoolExecutor(THREADS) as pool:
        list(pool.map(move, random.Random(3).sample(range(THREADS), THREADS)))
    assert Latest.model_validate_json(s3.admin.cat_file("assets/pointer/latest.json")).uploaded_at == uploads[-1]


@pytest.mark.parametrize(
    ("env", "output", "reason"),
    [
        ({"AWS_SECRET_ACCESS_KEY": "wrong-secret-9876543210"}, "s3://assets/wrong", "AWS_"),
        ({}, "s3://no-such-bucket/wrong", "no-such-bucket"),
        ({"CAPTURE2MESH_STORE": "s3://no-such-bucket/store"}, "s3://assets/wrong", "no-such-bucket"),
        ({"CAPTURE2MESH_STORE": "s3://captures/store"}, "s3://assets/wrong", "captures/store"),
    ],
    ids=["wrong secret", "no such output bucket", "no such store bucket", "store that may not be written"],
)
def test_storage_that_refuses_is_told(
    env: dict[str, str], output: str, reason: str, s3: S3, uploaded: str, prefect_server: str, tmp_path: Path
) -> None:
    finished = on_s3(s3, tmp_path, prefect_server, "wrong", **env).reconstruct(uploaded, output)
    assert finished.code == 1, finished.stderr
    assert finished.stdout == ""
    assert "error: " in finished.stderr
    assert reason in finished.stderr
    assert "Traceback" not in finished.stderr
    for secret in (s3.env["AWS_SECRET_ACCESS_KEY"], "wrong-secret-9876543210"):
        assert secret not in finished.stderr
    assert not s3.admin.exists("assets/wrong")


def test_bucket_of_captures_that_does_not_exist(s3: S3, prefect_server: str, tmp_path: Path) -> None:
    finished = on_s3(s3, tmp_path, prefect_server, "wrong").reconstruct("s3://no-such-bucket/ball", "s3://assets/wrong")
    assert finished.code in (1, 2)  # S3 does not tell a stranger whether a bucket exists
    assert "no-such-bucket" in finished.stderr
    assert "Traceback" not in finished.stderr


def test_key_that_leaves_its_capture_is_refused(s3: S3, ball: Path, prefect_server: str, tmp_path: Path) -> None:
    """A manifest may name what a server would not store."""
    url = s3.upload(ball, "captures/escaping/ball")
    files = [{"path": "../../secrets/view_000.png", "bytes": 1}]
    s3.admin.pipe_file("captures/escaping/ball/manifest.json", json.dumps({"files": files}).encode())
    finished = on_s3(s3, tmp_path, prefect_server, "escaping").reconstruct(url, "s3://assets/escaping")
    assert finished.code == 2
    assert "../../secrets/view_000.png: leaves the capture folder" in finished.stderr
    assert not s3.admin.exists("assets/escaping")


def test_links_are_public_and_artifacts_hold_no_secret(
    s3: S3, remote: tuple[CommandLine, Finished], prefect_server: str
) -> None:
    _, finished = remote
    assert finished.code == 0, finished.stderr
    folder, contents = asset_of(s3, "assets/same")
    link = f"{s3.endpoint}/assets/{folder.removeprefix('assets/')}/mesh.glb"

    artifacts = post(prefect_server, "/artifacts/filter", limit=200)
    everything = json.dumps(artifacts)
    assert link in everything
    told = {
        each["data"]
        for each in artifacts
        if each["type"] == "markdown"
        and link in str(each["data"])
        and "](" in each["data"]
        and each["key"].startswith("mesh")
    }
    assert told == {f"[ball: mesh.glb]({link})"}
    assert httpx.get(link).raise_for_status().content == contents["mesh.glb"]
    for secret in (s3.env["AWS_ACCESS_KEY_ID"], s3.env["AWS_SECRET_ACCESS_KEY"], "X-Amz-Signature", "Signature="):
        assert secret not in everything
