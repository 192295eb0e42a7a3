"""Loads the published files: arguments to classes on the meta device, weights straight to the device.

Strict: a missing, surplus or misshapen key and an unknown argument are refused by name. Upstream's loader would leave
the weights of a missing key random.
"""

from __future__ import annotations

import inspect
import json
import pickle
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from ..faults import Fault
from .aggregator import Aggregator
from .attention import compute_in
from .conditions import ModulatedMultiViewCond, ModulatedSLATMultiViewCond
from .decoders import LatentDecoder, SLatGaussianDecoder, SLatMeshDecoder, SparseStructureDecoder
from .latent_flow import SLatFlowModel
from .sampler import Sampling
from .structure_flow import SparseStructureFlowModel
from .vision_transformer import VisionTransformer

CLASSES: dict[str, type[nn.Module]] = {
    made.__name__: made
    for made in (
        SparseStructureFlowModel, SLatFlowModel, SparseStructureDecoder, SLatGaussianDecoder, SLatMeshDecoder,
        ModulatedMultiViewCond, ModulatedSLATMultiViewCond,
    )
} | {"ElasticSLatFlowModel": SLatFlowModel}  # fmt: skip
# Arguments of upstream's classes that are taken with one value only: what the published models have
FIXED: dict[str, Any] = {
    "pe_mode": "ape", "attn_mode": "swin", "norm_type": "layer", "use_skip_connection": True, "share_mod": False,
    "use_checkpoint": False, "use_rope": False, "num_head_channels": 64,
}  # fmt: skip
PATCH_SIZES = {"SparseStructureFlowModel": 1, "SLatFlowModel": 2, "ElasticSLatFlowModel": 2}
# Keys of the files that inference does not need
UNUSED = ("fuse_blocks.",)
LORA = ("lora_", "base_model.")
AGGREGATOR_KEYS = "aggregator."
SHOWN = 2
# Errors of a truncated or overwritten file; the second is in torch's message, a plain RuntimeError
DAMAGED, DAMAGED_ARCHIVE = (SafetensorError, pickle.UnpicklingError, EOFError), "PytorchStreamReader"
VISION_CHANNELS, HEAD_CHANNELS = 1024, 64

PIPELINE = "Stable-X/trellis-vggt-v0-2"
GEOMETRY = "Stable-X/vggt-object-v0-1"
FEATURES = "dinov2_vitl14_reg4_pretrain"


@dataclass(frozen=True)
class WeightPlaces:
    """Where the published files are."""

    pipeline: Path
    """Folder with `pipeline.json` and `ckpts`."""
    geometry: Path
    """VGGT's `model.safetensors`."""
    features: Path
    """DINOv2's checkpoint: `.safetensors`, or `.pth`, of which only tensors are read."""

    @staticmethod
    def of(environment: Mapping[str, str]) -> WeightPlaces:
        """The places in the Hugging Face cache HF_HOME and the torch hub TORCH_HOME. Raises FileNotFoundError."""
        hub = Path(environment["HF_HOME"]) / "hub"

        def snapshot(repository: str) -> Path:
            folder = hub / f"models--{repository.replace('/', '--')}"
            return folder / "snapshots" / (folder / "refs" / "main").read_text().strip()

        checkpoints = Path(environment["TORCH_HOME"]) / "hub" / "checkpoints"
        features = checkpoints / f"{FEATURES}.safetensors"
        if not features.exists():
            features = features.with_suffix(".pth")
        return WeightPlaces(snapshot(PIPELINE), snapshot(GEOMETRY) / "model.safetensors", features)


@dataclass(frozen=True)
class Networks:
    """All networks of the pipeline, on one device, and the values of `pipeline.json`."""

    aggregator: Aggregator
    features: VisionTransformer
    structure_condition: ModulatedMultiViewCond
    latent_condition: ModulatedSLATMultiViewCond
    structure_flow: SparseStructureFlowModel
    latent_flow: SLatFlowModel
    structure_decoder: SparseStructureDecoder
    gaussian_decoder: SLatGaussianDecoder
    mesh_decoder: SLatMeshDecoder
    structure_sampling: Sampling
    """Published sampling of the structure; a request overrides steps and strength."""
    latent_sampling: Sampling
    """The same of the latents."""
    mean: Tensor
    """(8) fp32, of the latents."""
    std: Tensor
    """(8) fp32, of the latents."""


def load(places: WeightPlaces, device: torch.device) -> Networks:
    """Read everything; blocks of the published files' dtypes on a GPU, fp32 on a CPU. Raises Fault for other files."""
    asked = json.loads((places.pipeline / "pipeline.json").read_text())["args"]
    models = asked["models"]
    on_gpu = device.type == "cuda"
    made = {
        field: _model(places.pipeline / models[name], device)
        for field, name in (
            ("structure_condition", "sparse_structure_vggt_cond"),
            ("latent_condition", "slat_vggt_cond"),
            ("structure_flow", "sparse_structure_flow_model"),
            ("latent_flow", "slat_flow_model"),
            ("structure_decoder", "sparse_structure_decoder"),
            ("gaussian_decoder", "slat_decoder_gs"),
            ("mesh_decoder", "slat_decoder_mesh"),
        )
    }
    # cards before Ampere have no bfloat16
    ampere = on_gpu and torch.cuda.get_device_capability(device) >= (8, 0)
    half = torch.float16 if on_gpu else torch.float32
    return Networks(
        aggregator=_vision(Aggregator, places.geometry, device, torch.bfloat16 if ampere else half, AGGREGATOR_KEYS),
        features=_vision(VisionTransformer, places.features, device, half),
        structure_sampling=_sampling(asked["sparse_structure_sampler"]),
        latent_sampling=_sampling(asked["slat_sampler"]),
        mean=torch.tensor(asked["slat_normalization"]["mean"], device=device),
        std=torch.tensor(asked["slat_normalization"]["std"], device=device),
        **made,
    )


def constructed(name: str, arguments: Mapping[str, Any]) -> nn.Module:
    """The network of an upstream class. Raises Fault for another class, argument, or value of one."""
    if name not in CLASSES:
        raise Fault("Unsupported", f"the weights are of another variant: class {name} is unknown")
    fixed = FIXED | ({"patch_size": PATCH_SIZES[name]} if name in PATCH_SIZES else {})
    # the decoders of latents pass their arguments on to their trunk
    maker = LatentDecoder if issubclass(CLASSES[name], LatentDecoder) else CLASSES[name]
    known = set(inspect.signature(maker).parameters)
    taken = {}
    for key, value in arguments.items():
        if key in known:
            taken[key] = value
        elif key not in fixed or value != fixed[key]:
            raise Fault("Unsupported", f"the weights are of another variant: {name} with {key}={value!r} is unknown")
    return CLASSES[name](**taken)


def _model(path: Path, device: torch.device) -> Any:
    described = json.loads(path.with_name(f"{path.name}.json").read_text())
    arguments = dict(described["args"])
    if device.type != "cuda":  # half precision is slower on a CPU, not faster
        arguments["use_fp16"] = False
    with torch.device("meta"):
        module = constructed(described["name"], arguments)
    file = path.with_name(f"{path.name}.safetensors")
    return filled(module, _tensors(file, device), file.name)


def _vision(made: Any, file: Path, device: torch.device, dtype: torch.dtype, prefix: str = "") -> Any:
    """A network of images. Its width is the file's, and the conditions' files have to fit it; the rest is fixed."""
    tensors = _tensors(file, device, prefix)
    register = next((tensor for key, tensor in tensors.items() if "register_token" in key), None)
    channels = VISION_CHANNELS if register is None else register.shape[-1]
    with torch.device("meta"):
        module = made(channels=channels, heads=channels // HEAD_CHANNELS)
    compute_in(module, dtype)
    return filled(module, tensors, file.name)


def _tensors(file: Path, device: torch.device, prefix: str = "") -> dict[str, Tensor]:
    """The tensors of a file whose keys begin with `prefix`, which is taken off. Others are not read.

    Raises Fault if the file is damaged; FileNotFoundError passes.
    """
    try:
        if file.suffix == ".pth":
            stored = torch.load(file, map_location=device, weights_only=True)
            return {key.removeprefix(prefix): tensor for key, tensor in stored.items() if key.startswith(prefix)}
        with safe_open(file, "pt", device=str(device)) as stored:
            return {key.removeprefix(prefix): stored.get_tensor(key) for key in stored.keys() if key.startswith(prefix)}  # noqa: SIM118
    except Exception as error:
        if not isinstance(error, DAMAGED) and DAMAGED_ARCHIVE not in str(error):
            raise
        raise Fault("WeightsCorrupt", f"{file.name} is damaged ({type(error).__name__}: {error})") from error


def filled(module: nn.Module, tensors: dict[str, Tensor], name: str) -> nn.Module:
    """Put the tensors into the module, cast to its dtypes. Raises Fault if keys or shapes are not the module's.

    Takes the tensors out of the dictionary, so that none is held in both dtypes longer than necessary.
    """
    wanted = module.state_dict()
    leftovers = [key for key in tensors if any(mark in key for mark in LORA)]
    if leftovers:
        raise Fault("Unsupported", f"{name}: {_some(leftovers)} of an adaptation (LoRA) that was not merged")
    missing = [key for key in wanted if key not in tensors]
    surplus = [key for key in tensors if key not in wanted and not key.startswith(UNUSED)]
    misshapen = [
        f"{key} {tuple(tensors[key].shape)} instead of {tuple(tensor.shape)}"
        for key, tensor in wanted.items()
        if key in tensors and tensors[key].shape != tensor.shape
    ]
    for keys, what in ((missing, "missing"), (surplus, "unknown"), (misshapen, "of another shape")):
        if keys:
            raise Fault("Unsupported", f"{name}: the weights are of another variant: {_some(keys)} {what}")
    state = {key: tensors.pop(key).to(tensor.dtype) for key, tensor in wanted.items()}
    module.load_state_dict(state, assign=True)
    return module.eval().requires_grad_(False)


def _some(keys: list[str]) -> str:
    more = f" and {len(keys) - SHOWN} more" if len(keys) > SHOWN else ""
    return f"{', '.join(keys[:SHOWN])}{more}"


def _sampling(described: Mapping[str, Any]) -> Sampling:
    params = described["params"]
    low, high = params["cfg_interval"]
    return Sampling(params["steps"], params["cfg_strength"], (low, high), params["rescale_t"])
