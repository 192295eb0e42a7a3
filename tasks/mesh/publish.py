"""The step publish: the asset appears at `<output>/<capture id>/<run key>/`, and `latest.json` moves to it.

A local asset appears whole or not at all; on object storage it counts once `_SUCCESS` is there. Called by the flows.
The planning of datasets and the receivers of uploads ask here for what is published.
"""

from __future__ import annotations

from datetime import datetime
from pathlib import Path

from pydantic import BaseModel, ConfigDict

from tasks.cameras.find_cameras import CaptureCameras
from tasks.capture.capture_checks import CaptureReport
from tasks.capture.stage_capture import Capture
from tasks.errors import StorageUnavailable, grouped, storage_errors
from tasks.geometry.registration import MIN_INLIERS
from tasks.inference.reconstruction import Reconstruction
from tasks.inference.registry import EngineChoice
from tasks.mesh.convert import Formats
from tasks.mesh.export import Mesh
from tasks.mesh.validate import MeshReport
from tasks.progress import StageTiming
from tasks.report import CamerasSummary, CaptureSummary, Check, EngineSummary, Report, SensorSummary, status_of
from tasks.settings import PIPELINE_VERSION, Parameters
from tasks.stage import retried, step
from tasks.store.local_files import locked, take_place, working_folder, write_atomically
from tasks.store.location import FileEntry, Location, Manifest, parsed_or_none, sha256_of
from tasks.store.results import cache_key, store

RUN_KEY_LENGTH = 16
PUBLISH_RETRIES = 3
_POINTER_TRIES = 10


class Published(BaseModel):
    """A published asset."""

    model_config = ConfigDict(frozen=True)

    url: str
    """Path or URL of its folder."""
    report: Report
    """Its report, with the timing of `publish` too."""


class Latest(BaseModel):
    """latest.json: the newest result of a capture."""

    run_key: str
    """Key of the run that made it; names its folder."""
    upload_key: str
    """Key of the upload that it was made of, with engine and parameters."""
    uploaded_at: datetime
    """Time of the newest file of that upload."""
    report: str
    """Path of its report.json, relative to the capture's folder."""


class Results(BaseModel):
    """The results of all stages of a run, ready to be published."""

    model_config = ConfigDict(frozen=True)

    capture: Capture
    """The capture by content."""
    capture_report: CaptureReport
    """Its views and warnings."""
    cameras: CaptureCameras
    """The cameras of its views."""
    engine: EngineChoice
    """The engine, and why it was chosen."""
    reconstruction: Reconstruction
    """The raw geometry."""
    mesh: Mesh
    """The textured GLB."""
    formats: Formats
    """The other formats."""
    mesh_report: MeshReport
    """Measurements, checks and previews of the mesh."""

    def report(self, parameters: Parameters, stages: tuple[StageTiming, ...]) -> Report:
        """Make the content of report.json."""
        checks = (*self.mesh_report.checks, *self._checks())
        surface = self.reconstruction.surface
        return Report(
            capture=CaptureSummary(
                id=self.capture.id,
                uri=self.capture.uri,
                digest=self.capture.digest,
                views=len(self.capture_report.views),
                views_used=len(self.reconstruction.views),
                has_cameras=self.capture_report.has_cameras,
            ),
            engine=EngineSummary(**self.engine.model_dump(), parameters=parameters.model_dump(mode="json")),
            weights=self.reconstruction.weights,
            cameras=self._cameras(),
            sensor=None if surface is None else SensorSummary.model_validate(surface, from_attributes=True),
            subject="" if surface is None else f"{surface.subject.kind}: {surface.subject.reason}",
            mesh=self.mesh_report.mesh,
            registration=self.reconstruction.registration,
            status=status_of(checks),
            checks=checks,
            warnings=(*grouped((*self.capture_report.warnings, *self.cameras.warnings)), *self._warnings()),
            stages=stages,
            outputs=self.outputs,
        )

    @property
    def outputs(self) -> tuple[FileEntry, ...]:
        """The published files, sorted by path, without report, manifest and marker."""
        previews = [entry for entry in self.mesh_report.outputs if entry.path.startswith("previews/")]
        return tuple(sorted((*self.mesh.outputs, *self.formats.outputs, *previews), key=lambda entry: entry.path))

    def read(self, path: str) -> bytes:
        """Read the content of a published file from the stage that made it."""
        owner = next(
            result
            for result in (self.mesh, self.formats, self.mesh_report)
            if any(entry.path == path for entry in result.outputs)
        )
        return store().read(owner, path)

    def _cameras(self) -> CamerasSummary:
        cameras = self.cameras
        return CamerasSummary(
            source=cameras.source,
            focal_px=cameras.focal_px,
            posed=len(cameras.views),
            left_out=tuple(view.name for view in cameras.left_out),
            residual_m=cameras.residual_m,
            agreement=cameras.agreement,
            conflict=cameras.conflict,
            correction_deg=cameras.correction_deg,
            correction_m=cameras.correction_m,
        )

    def _warnings(self) -> list[str]:
        """Warnings beside the capture's own."""
        reconstruction = self.reconstruction
        used, asked = reconstruction.views, reconstruction.views_asked
        if len(used) == asked:
            return []
        if not reconstruction.reusable:
            return [f"{len(used)} of {asked} views were used: too little free GPU memory for more"]
        missed = [name for name in self.capture.view_names if name not in used]
        named = f": {', '.join(missed)}" if len(missed) == asked - len(used) else ""
        return [f"{asked - len(used)} view(s) do not show the subject and were left out{named}"]

    def _checks(self) -> list[Check]:
        warnings = len(self.capture_report.warnings)
        doubts = len(self.cameras.warnings)
        used, asked = len(self.reconstruction.views), self.reconstruction.views_asked
        return [
            Check(name="capture_warnings", passed=not warnings, value=warnings, limit=0),
            Check(name="camera_warnings", passed=not doubts, value=doubts, limit=0),
            Check(name="views_used", passed=used >= asked, value=used, limit=asked),
            *(
                [Check(name="registered", passed=found.accepted, value=round(found.inlier_share, 4), limit=MIN_INLIERS)]
                if (found := self.reconstruction.registration) is not None
                else []
            ),
            *(
                Check(name=f"format_{failure.format}", passed=False, value=failure.reason, limit="converted")
                for failure in self.formats.failures
            ),
        ]


def run_key(reconstruction: Reconstruction, capture: Capture, parameters: Parameters) -> str:
    """Make a short digest of all that determines the asset: the same work is published in the same place.

    A result of fewer views than asked for (for lack of memory) is other work.
    """
    engine, weights = reconstruction.engine, reconstruction.weights
    content = [capture.digest, engine.name, engine.version, parameters, weights.bundle if weights else None]
    if len(reconstruction.views) < reconstruction.views_asked:
        content.append(reconstruction.views)
    return cache_key("run", PIPELINE_VERSION, content)[:RUN_KEY_LENGTH]


@step(**retried(PUBLISH_RETRIES, StorageUnavailable))
def publish(results: Results, report: Report, output: str, key: str, upload: str) -> str:
    """Publish the asset and give the URL of its folder; a whole asset that is there already is not written again.

    key: run key. upload: upload key.
    """
    root = Location.of(output) / results.capture.id
    folder = root / key
    if not is_published(folder):
        files = {entry.path: results.read(entry.path) for entry in report.outputs}
        files["report.json"] = report.model_dump_json(indent=1).encode()
        _write(folder, files)
    if report.status != "failure":
        _move_latest(
            root / "latest.json",
            Latest(
                run_key=key,
                upload_key=upload,
                uploaded_at=results.capture.uploaded_at,
                report=f"{key}/report.json",
            ),
        )
    return folder.url


def is_published(folder: Location) -> bool:
    """Return whether `_SUCCESS` is there and the content of every file has the digest in the manifest."""
    if (folder / "_SUCCESS").size() is None:
        return False
    manifest = parsed_or_none(Manifest, (folder / "manifest.json").read_or_none())
    return manifest is not None and all(
        (content := (folder / entry.path).read_or_none()) is not None and sha256_of(content) == entry.sha256
        for entry in manifest.files
    )


def published_folder(output: str, capture_id: str, upload_key: str) -> str | None:
    """Find the newest result of a capture; None if it is of another upload or was removed.

    Gives its folder, relative to the output.
    """
    published = Location.of(output) / capture_id
    latest = parsed_or_none(Latest, (published / "latest.json").read_or_none())
    if latest is None or latest.upload_key != upload_key:
        return None
    return None if (published / latest.run_key / "_SUCCESS").size() is None else f"{capture_id}/{latest.run_key}"


def _write(folder: Location, files: dict[str, bytes]) -> None:
    """Write all files, then the manifest, then `_SUCCESS`; a local folder appears by one rename."""
    entries = [FileEntry(path=path, bytes=len(data), sha256=sha256_of(data)) for path, data in sorted(files.items())]
    manifest = Manifest(schema=1, files=tuple(entries)).model_dump_json(by_alias=True, indent=1).encode()
    contents = {**files, "manifest.json": manifest, "_SUCCESS": b""}
    if folder.local:
        final = Path(folder.path)
        with working_folder(final.parent, final.name) as temporary, storage_errors(str(final)):
            for path, data in contents.items():
                write_atomically(temporary / path, data)
            take_place(temporary, final, lambda: is_published(folder) or None)
    else:
        (folder / "_SUCCESS").delete()
        for path, data in contents.items():
            (folder / path).write(data)


def _move_latest(pointer: Location, latest: Latest) -> None:
    """Let latest.json name this result, unless it names one of a newer upload."""
    if pointer.local:
        path = Path(pointer.path)
        path.parent.mkdir(parents=True, exist_ok=True)
        with locked(path.parent), storage_errors(str(path)):
            for abandoned in path.parent.glob(f".{path.name}.*.tmp"):
                abandoned.unlink()  # a process that still wrote it would hold the lock
            if _newer(latest, pointer.read_or_none()):
                pointer.write(_json(latest))
        return
    for _ in range(_POINTER_TRIES):
        etag = pointer.etag()
        if not _newer(latest, pointer.read_or_none()) or pointer.write_if(etag, _json(latest)):
            return
    raise StorageUnavailable(f"{pointer.url}: other runs keep moving it")


def _newer(latest: Latest, content: bytes | None) -> bool:
    """True if `latest` may replace the pointer of this content; one that cannot be read may be replaced."""
    current = parsed_or_none(Latest, content)
    return current is None or current.uploaded_at <= latest.uploaded_at


def _json(latest: Latest) -> bytes:
    return latest.model_dump_json(indent=1).encode()
