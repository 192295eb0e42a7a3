"""Every setting in one place: what a run is asked for (`Parameters`) and where it runs (`Settings`)."""

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
        description="At most; bounds memory and time. 32 to 1024.",
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
    """Used by trellis only. More guidance s follows the views more closely: (1 + s) * with - s * without them."""

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
        16, title="Views at most", ge=1, le=64, description="Evenly spread over the capture; more need GPU memory."
    )


class InferParameters(_Parameters):
    """How the engine turns the views into geometry."""

    seed: int = Field(
        42, title="Seed", ge=0, description="Another seed, another result of trellis; fusion does not use it."
    )
    views: int | None = Field(
        None, title="Views used at most", ge=1, description="Evenly spread over the capture. None: all."
    )
    fusion: FusionParameters = Field(FusionParameters(), title="Fusion engine")
    trellis: TrellisParameters = Field(TrellisParameters(), title="TRELLIS engine")


class ExportParameters(_Parameters):
    """How the reconstruction becomes a textured GLB."""

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
    # one Literal, not a union of two: the run form shows a union as two free texts
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
    """What the mesh has to reach. Below a floor the run fails; beyond the others it completes with a warning."""

    min_glb_bytes: int = Field(1024, title="Floor: bytes of the GLB", ge=1, description="At least.")
    min_vertices: int = Field(1000, title="Floor: vertices", ge=1, description="At least.")
    captured_share: float = Field(
        0.9,
        title="Floor: share of captured points near the mesh",
        ge=0,
        le=1,
        description="At least, where there is depth. 0 to 1.",
    )
    captured_distance: float = Field(
        0.05,
        title="Near, as a share of the diagonal",
        gt=0,
        le=1,
        description="How close to the mesh a captured point counts as near; the diagonal is of its bounding box.",
    )
    max_components: int = Field(1, title="Components", ge=1, description="Separate pieces at most.")
    max_degenerate_faces: int = Field(0, title="Degenerate faces", ge=0, description="Faces without area at most.")
    min_texture_coverage: float = Field(
        0.9,
        title="Texture seen by a view",
        ge=0,
        le=1,
        description="Share of the texture at least; the rest is filled in. 0 to 1.",
    )


class Parameters(_Parameters):
    """Everything that changes the result of a reconstruction, apart from the capture and the engine."""

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

    # an empty variable is what container files make of an argument that is not given
    model_config = SettingsConfigDict(env_prefix="CAPTURE2MESH_", env_ignore_empty=True, frozen=True)

    store: str = Field(
        default_factory=lambda: str(user_cache_path("capture2mesh") / "store"),
        description="Where the stages' results are kept: a folder or any fsspec URL.",
    )
    store_shared: bool = Field(False, description="A `file:` store that other machines see as well.")
    scratch: Path = Field(
        default_factory=lambda: user_cache_path("capture2mesh") / "scratch",
        description="Where remote files are materialised on this machine.",
    )
    weights: Path = Field(
        default_factory=lambda: user_cache_path("capture2mesh") / "weights",
        description="Where the engines' weights lie on this machine.",
    )
    weights_list: Path = Field(
        Path(__file__).parents[1] / "infra" / "weights.json", description="The list of weights and their pins."
    )
    weights_mirror: str = Field("", description="fsspec URL that has the weights; empty: the Hugging Face hub.")
    weights_parallel: int = Field(4, ge=1, description="Files of weights downloaded at once.")
    trellis_root: Path | None = Field(
        None, description="Upstream's checkout, where `trellis` is not an installed package."
    )
    trellis_python: Path = Field(
        Path(sys.executable), description="Python in which upstream's `trellis` can be imported."
    )
    trellis_time_limit_s: float = Field(1800.0, gt=0, description="One inference of the model, seconds.")
    trellis_min_free_gib: float = Field(18.0, ge=0, description="GPU memory that has to be free for up to 8 views.")
    trellis_min_free_gib_many_views: float = Field(20.0, ge=0, description="The same for more views.")
    infer_deployment: str = Field("", description="Deployment that runs the inference; empty: this process.")
    batch_deployment: str = Field("", description="Deployment that runs a dataset's batches; empty: this process.")
    batch_processes: int = Field(
        default_factory=lambda: os.cpu_count() or 1, ge=1, description="Captures worked on at once, each on one core."
    )
    attempts: int = Field(3, ge=1, description="How often a capture may fail by its own fault before it is left alone.")
    watched: str = Field("", description="Folder or URL that captures are uploaded to, for example s3://captures.")
    output: str = Field("", description="Folder or URL below which what is uploaded is published.")
    quiet_seconds: float = Field(
        60.0, gt=0, description="After this long without change an upload that declares nothing is complete."
    )
    receive_host: str = Field("127.0.0.1", description="Address that the receiver of notifications listens on.")
    receive_port: int = Field(8380, ge=0, le=65535, description="Port of the receiver.")
    receive_token: SecretStr | None = Field(None, description="Bearer token that notifications have to carry.")
    receive_hmac_secret: SecretStr | None = Field(None, description="Or: key of their X-Signature (HMAC-SHA256).")
    receive_max_bytes: int = Field(2**20, ge=1, description="Notifications with larger bodies are refused.")
    receive_per_minute: int = Field(6000, ge=1, description="Notifications taken in one minute.")
    sqs_queue_url: str = Field("", description="SQS queue that S3 sends its notifications to.")
    public_url: str = Field("", description="Base URL under which the output is served to readers.")
    max_pixels: int = Field(64_000_000, gt=0, description="Images with more pixels are refused before decoding.")


@lru_cache
def settings() -> Settings:
    """This process's settings, read once."""
    return Settings()
