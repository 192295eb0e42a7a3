"""Every setting in one place: what a run is asked for (`Parameters`) and where it runs (`Settings`)."""

from __future__ import annotations

import sys
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal

from platformdirs import user_cache_path
from pydantic import BaseModel, ConfigDict, Field, field_validator
from pydantic_settings import BaseSettings, SettingsConfigDict

PIPELINE_VERSION = "1"

EngineName = Literal["auto", "fusion", "trellis"]
MeshFormat = Literal["obj", "ply", "splat"]
ExporterName = Literal["native", "to_glb"]


class _Parameters(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class FusionParameters(_Parameters):
    """Settings of the `fusion` engine."""

    voxel_m: float | None = Field(
        None, title="Voxel size (m)", gt=0, description="Empty: chosen from the capture's own depth resolution."
    )
    max_voxels: int = Field(
        320, title="Voxels along the longest side", ge=32, le=1024, description="Bounds memory and time."
    )
    crumb_fraction: float = Field(
        0.02,
        title="Crumb size",
        ge=0,
        le=1,
        description="Pieces with less than this share of the largest piece's area are removed.",
    )


class TrellisParameters(_Parameters):
    """Settings of the `trellis` engine; strengths are of the formula (1 + s) * p - s * n."""

    ss_steps: int = Field(30, title="Steps: sparse structure", ge=1, le=1000)
    ss_cfg: float = Field(7.5, title="Guidance: sparse structure", ge=0)
    slat_steps: int = Field(12, title="Steps: latents", ge=1, le=1000)
    slat_cfg: float = Field(3.0, title="Guidance: latents", ge=0)
    max_views: int = Field(16, title="Views at most", ge=1, le=64, description="Evenly spread over the capture.")


class InferParameters(_Parameters):
    """What the inference is asked for."""

    seed: int = Field(42, title="Seed", ge=0, description="Of engines that sample; fusion does not.")
    views: int | None = Field(
        None, title="Views used at most", ge=1, description="Evenly spread over the capture. Empty: all."
    )
    fusion: FusionParameters = Field(FusionParameters(), title="Fusion engine")
    trellis: TrellisParameters = Field(TrellisParameters(), title="TRELLIS engine")


class ExportParameters(_Parameters):
    """How the reconstruction becomes a textured GLB."""

    faces: int = Field(
        20_000, title="Face budget", ge=100, le=30_000, description="Triangles of the published mesh (native)."
    )
    texture_px: Literal[256, 512, 1024, 2048, 4096] = Field(1024, title="Texture size (pixels)")
    exporter: Literal["auto"] | ExporterName = Field(
        "auto", title="Exporter", description="auto: native for fusion, upstream's to_glb for trellis."
    )
    simplify: float = Field(
        0.95, title="Share of faces removed", ge=0, lt=1, description="By to_glb, whose budget this is."
    )


class Limits(_Parameters):
    """What a published mesh has to reach. Below the floor: failure. Beyond the others: warning."""

    min_glb_bytes: int = Field(1024, title="Floor: bytes of the GLB", ge=1)
    min_vertices: int = Field(1000, title="Floor: vertices", ge=1)
    captured_share: float = Field(
        0.9, title="Floor: share of captured points near the mesh", ge=0, le=1, description="Where there is depth."
    )
    captured_distance: float = Field(
        0.05, title="Near, as a share of the diagonal", gt=0, le=1, description="Of the mesh's bounding box."
    )
    max_components: int = Field(1, title="Components", ge=1)
    max_degenerate_faces: int = Field(0, title="Degenerate faces", ge=0)
    min_texture_coverage: float = Field(
        0.9, title="Texture seen by a view", ge=0, le=1, description="Share of the surface's texels."
    )


class Parameters(_Parameters):
    """Everything that changes the result of a reconstruction, apart from the capture and the engine."""

    infer: InferParameters = Field(InferParameters(), title="Inference")
    export: ExportParameters = Field(ExportParameters(), title="Export")
    formats: tuple[MeshFormat, ...] = Field(("obj", "ply"), title="Formats beside GLB")
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
    public_url: str = Field("", description="Base URL under which the output is served to readers.")
    max_pixels: int = Field(64_000_000, gt=0, description="Images with more pixels are refused before decoding.")


@lru_cache
def settings() -> Settings:
    """This process's settings, read once."""
    return Settings()
