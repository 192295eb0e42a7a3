"""All settings: `Parameters` change the result of a run, `Settings` say where and how a process works.

Read by all packages; the flows take `Parameters` as an argument.
"""

from __future__ import annotations

import os
import sys
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal

from platformdirs import user_cache_path
from pydantic import BaseModel, ConfigDict, Field, SecretStr, field_validator
from pydantic_settings import BaseSettings, SettingsConfigDict

PIPELINE_VERSION = "1"

EngineName = Literal["auto", "fusion", "trellis"]
MeshFormat = Literal["obj", "ply", "splat"]
ExporterName = Literal["native", "to_glb"]


class _Parameters(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class FusionParameters(_Parameters):
    """Used by fusion only."""

    voxel_m: float | None = Field(
        None, title="Voxel size (m)", gt=0, description="None: from the depth maps' own resolution."
    )
    max_voxels: int = Field(
        320,
        title="Voxels along the longest side",
        ge=32,
        le=1024,
        description="At most; limits memory and time. 32 to 1024.",
    )
    subject: Literal["auto", "object", "surface"] = Field(
        "auto",
        title="Subject",
        description="object: closed. surface: open, without what no view saw. auto: open if most would be invented.",
    )
    crumb_fraction: float = Field(
        0.02,
        title="Crumb size",
        ge=0,
        le=1,
        description="Pieces with less than this share of the largest piece's area are removed. 0 to 1.",
    )


class TrellisParameters(_Parameters):
    """Used by trellis only. A larger guidance s follows the views more closely: (1 + s) * with - s * without them."""

    ss_steps: int = Field(
        30,
        title="Steps: sparse structure",
        ge=1,
        le=1000,
        description="Of the first stage, the coarse shape. More is slower.",
    )
    ss_cfg: float = Field(7.5, title="Guidance: sparse structure", ge=0, description="Of the first stage. 0: none.")
    slat_steps: int = Field(
        12,
        title="Steps: latents",
        ge=1,
        le=1000,
        description="Of the second stage, detail and colours. More is slower.",
    )
    slat_cfg: float = Field(3.0, title="Guidance: latents", ge=0, description="Of the second stage. 0: none.")
    max_views: int = Field(
        16, title="Views at most", ge=1, le=64, description="Evenly spread over the capture; more need more GPU memory."
    )


class CameraParameters(_Parameters):
    """Parameters of the stage that gives every view its camera."""

    mode: Literal["auto", "given", "refine", "find"] = Field(
        "auto",
        title="Cameras",
        description="auto: found if none are given, refined if given ones contradict the depth. given: never changed.",
    )
    object_moves: Literal["auto", "true", "false"] = Field(
        "auto",
        title="The object moves",
        description="For cameras that are found. true: it turned before a background that stayed still, which is left"
        " out. false: the cameras moved around all that is seen. auto: by what stays the same in all views.",
    )

    @field_validator("object_moves", mode="before")
    @classmethod
    def _word(cls, value: Any) -> Any:
        """`true` on the command line."""
        return str(value).lower() if isinstance(value, bool) else value


class InferParameters(_Parameters):
    """Parameters of the engine, which makes geometry of the views."""

    seed: int = Field(
        42, title="Seed", ge=0, description="Another seed gives another result of trellis; fusion does not use it."
    )
    views: int | None = Field(
        None, title="Views used at most", ge=1, description="Evenly spread over the capture. None: all."
    )
    fusion: FusionParameters = Field(FusionParameters(), title="Fusion engine")
    trellis: TrellisParameters = Field(TrellisParameters(), title="TRELLIS engine")


class ExportParameters(_Parameters):
    """Parameters of the textured GLB."""

    faces: int = Field(
        20_000,
        title="Face budget",
        ge=100,
        le=30_000,
        description="About this many triangles at most, with exporter native. 100 to 30000.",
    )
    texture_px: Literal[256, 512, 1024, 2048, 4096] = Field(
        1024, title="Texture size (pixels)", description="Its width and its height."
    )
    # one Literal, not a union of two: the run form shows a union as two free text fields
    exporter: Literal["auto", "native", "to_glb"] = Field(
        "auto", title="Exporter", description="auto: native for fusion, upstream's to_glb for trellis."
    )
    simplify: float = Field(
        0.95,
        title="Share of faces removed",
        ge=0,
        lt=1,
        description="With exporter to_glb, instead of the face budget. From 0 to less than 1.",
    )


class Limits(_Parameters):
    """Limits of the checks. A mesh that fails a floor makes the run fail; the other limits only give a warning."""

    min_glb_bytes: int = Field(1024, title="Floor: bytes of the GLB", ge=1, description="At least.")
    min_vertices: int = Field(1000, title="Floor: vertices", ge=1, description="At least.")
    captured_share: float = Field(
        0.9,
        title="Floor: share of captured points near the mesh",
        ge=0,
        le=1,
        description="At least; checked if there is depth. 0 to 1.",
    )
    captured_distance: float | None = Field(
        None,
        title="Near, as a share of the diagonal",
        gt=0,
        le=1,
        description="How close to the mesh a captured point is near. None: by the sensor's noise and the voxels.",
    )
    max_components: int = Field(1, title="Components", ge=1, description="Separate pieces at most.")
    max_degenerate_faces: int = Field(0, title="Degenerate faces", ge=0, description="Faces without area at most.")
    max_invented_share: float = Field(
        0.15,
        title="Surface that no view saw",
        ge=0,
        le=1,
        description="Share of the closed surface at most that no view saw. 0 to 1.",
    )
    texture_coverage_floor: float = Field(
        0.3,
        title="Floor: texture seen by a view",
        ge=0,
        le=1,
        description="Share of the texture at least, else the mesh is rejected. 0 to 1.",
    )
    min_texture_coverage: float = Field(
        0.9,
        title="Texture seen by a view",
        ge=0,
        le=1,
        description="Share of the texture at least; the rest is filled in. 0 to 1.",
    )


class Parameters(_Parameters):
    """Everything that changes the result of a reconstruction, apart from the capture and the engine."""

    cameras: CameraParameters = Field(CameraParameters(), title="Cameras")
    infer: InferParameters = Field(InferParameters(), title="Inference")
    export: ExportParameters = Field(ExportParameters(), title="Export")
    formats: tuple[MeshFormat, ...] = Field(
        ("obj", "ply"), title="Formats beside GLB", description="splat: the gaussians of trellis."
    )
    limits: Limits = Field(Limits(), title="Limits")

    @field_validator("formats", mode="before")
    @classmethod
    def _split(cls, value: Any) -> Any:
        """`obj,ply` on the command line."""
        return tuple(filter(None, value.split(","))) if isinstance(value, str) else value


class Settings(BaseSettings):
    """Where and how this process works; read from `CAPTURE2MESH_*` environment variables."""

    # container files give an empty variable for an argument that is not set
    model_config = SettingsConfigDict(env_prefix="CAPTURE2MESH_", env_ignore_empty=True, frozen=True)

    store: str = Field(
        default_factory=lambda: str(user_cache_path("capture2mesh") / "store"),
        description="Folder or fsspec URL of the stages' results.",
    )
    store_shared: bool = Field(False, description="True if the store is a folder that other machines see as well.")
    scratch: Path = Field(
        default_factory=lambda: user_cache_path("capture2mesh") / "scratch",
        description="Folder for copies of remote files on this machine.",
    )
    weights: Path = Field(
        default_factory=lambda: user_cache_path("capture2mesh") / "weights",
        description="Folder of the engines' weights on this machine.",
    )
    weights_list: Path = Field(
        Path(__file__).with_name("weights") / "weights.json", description="File that lists the weights."
    )
    weights_lock: Path = Field(
        Path(__file__).parents[1] / "infra" / "weights.lock.json",
        description="File with the revision and digest of every weights file. Without it, the lock file beside the"
        " weights counts, which the first `weights fetch` writes.",
    )
    weights_mirror: str = Field("", description="fsspec URL of a copy of the weights; empty: the Hugging Face hub.")
    weights_parallel: int = Field(4, ge=1, description="Number of weights files that are downloaded at once.")
    trellis_root: Path | None = Field(
        None, description="Checkout of upstream's code, which then infers and exports; unset: our own networks."
    )
    trellis_python: Path = Field(
        Path(sys.executable), description="Python interpreter of the model's process, which imports torch."
    )
    trellis_device: Literal["cuda", "cpu"] = Field(
        "cuda", description="Device of the model's networks; on the CPU an inference takes minutes to hours."
    )
    trellis_time_limit_s: float = Field(1800.0, gt=0, description="Time limit of one inference of the model, seconds.")
    trellis_min_free_gib: float = Field(
        11.0, ge=0, description="GPU memory, GiB, that has to be free for up to 8 views. Upstream's code needs 18."
    )
    trellis_min_free_gib_many_views: float = Field(
        12.5, ge=0, description="GPU memory, GiB, that has to be free for more views. Upstream's code needs 20."
    )
    infer_deployment: str = Field("", description="Deployment that runs the inference; empty: this process.")
    batch_deployment: str = Field("", description="Deployment that runs a dataset's batches; empty: this process.")
    batch_processes: int = Field(
        default_factory=lambda: os.cpu_count() or 1,
        ge=1,
        description="Number of captures that a batch works on at once, each on one core.",
    )
    attempts: int = Field(3, ge=1, description="A capture that failed this often by its own fault is not tried again.")
    watched: str = Field("", description="Folder or URL that captures are uploaded to, for example s3://captures.")
    output: str = Field("", description="Folder or URL below which the assets of uploaded captures are published.")
    quiet_seconds: float = Field(
        60.0,
        gt=0,
        description="An upload without a manifest is complete after this time without a change, seconds.",
    )
    receive_host: str = Field("127.0.0.1", description="Address at which the receiver of notifications listens.")
    receive_port: int = Field(8380, ge=0, le=65535, description="Port of the receiver of notifications.")
    receive_token: SecretStr | None = Field(None, description="Bearer token that notifications must have.")
    receive_hmac_secret: SecretStr | None = Field(
        None, description="Key of the X-Signature (HMAC-SHA256) that notifications may have instead of the token."
    )
    receive_max_bytes: int = Field(2**20, ge=1, description="Notifications with a larger body, bytes, are refused.")
    receive_per_minute: int = Field(6000, ge=1, description="Number of notifications that are accepted in one minute.")
    sqs_queue_url: str = Field("", description="URL of the SQS queue to which S3 sends its notifications.")
    public_url: str = Field("", description="Base URL at which readers find the output.")
    max_pixels: int = Field(64_000_000, gt=0, description="Images with more pixels are refused before decoding.")


@lru_cache
def settings() -> Settings:
    """The settings of this process, read once."""
    return Settings()
