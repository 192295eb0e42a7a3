"""Random weights of TRELLIS-VGGT: of full size for time and memory, tiny for tests. Upstream's code is not needed.

`python -m tests.benchmarks.random_weights FOLDER [--tiny]` writes those of full size (8 GB, on the GPU), or tiny ones,
as a pinned bundle of this program's, and prints the variables with which the program takes it for its own.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from tasks.inference.trellis.process.network.aggregator import Aggregator
from tasks.inference.trellis.process.network.loader import (
    AGGREGATOR_KEYS,
    FEATURES,
    GEOMETRY,
    PIPELINE,
    WeightPlaces,
    constructed,
)
from tasks.inference.trellis.process.network.vision_transformer import VisionTransformer

REVISION = "0" * 40  # no commit has this name
GAIN, NORM_NOISE, LAYER_SCALE = 0.5, 0.05, 0.1
LAST_GAIN = 4.0  # of the last layers: else their biases would decide, and all voxels be empty

_FLOW = {
    "in_channels": 8, "out_channels": 8, "model_channels": 1024, "cond_channels": 1024, "num_blocks": 24,
    "num_heads": 16, "mlp_ratio": 4, "pe_mode": "ape", "qk_rms_norm": True, "use_fp16": True,
}  # fmt: skip
_DECODER = {
    "resolution": 64, "model_channels": 768, "latent_channels": 8, "num_blocks": 12, "num_heads": 12, "mlp_ratio": 4,
    "attn_mode": "swin", "window_size": 8, "use_fp16": True,
}  # fmt: skip
_GAUSSIANS = {
    "lr": {"_xyz": 1.0, "_features_dc": 1.0, "_opacity": 1.0, "_scaling": 1.0, "_rotation": 0.1},
    "perturb_offset": True, "voxel_size": 1.5, "num_gaussians": 32, "2d_filter_kernel_size": 0.1,
    "3d_filter_kernel_size": 0.0009, "scaling_bias": 0.004, "opacity_bias": 0.1, "scaling_activation": "softplus",
}  # fmt: skip

Models = dict[str, tuple[str, str, dict[str, Any]]]

# The published pipeline: its name for a model -> file, class, arguments. The last two's files were not seen: their
# arguments follow from the classes, the training script and the published numbers of parameters.
FULL: Models = {
    "sparse_structure_decoder": (
        "ckpts/ss_dec_conv3d_16l8_fp16",
        "SparseStructureDecoder",
        {
            "out_channels": 1, "latent_channels": 8, "num_res_blocks": 2, "num_res_blocks_middle": 2,
            "channels": [512, 128, 32], "use_fp16": True,
        },
    ),
    "sparse_structure_flow_model": (
        "ckpts/ss_flow_img_dit_L_16l8_fp16",
        "SparseStructureFlowModel",
        {"resolution": 16, "patch_size": 1, **_FLOW},
    ),
    "slat_flow_model": (
        "ckpts/slat_flow_img_dit_L_64l8p2_fp16",
        "SLatFlowModel",
        {"resolution": 64, "patch_size": 2, "num_io_res_blocks": 2, "io_block_channels": [128], **_FLOW},
    ),
    "slat_decoder_gs": (
        "ckpts/slat_dec_gs_swin8_B_64l8gs32_fp16",
        "SLatGaussianDecoder",
        {"representation_config": _GAUSSIANS, **_DECODER},
    ),
    "slat_decoder_mesh": (
        "ckpts/slat_dec_mesh_swin8_B_64l8m256c_fp16",
        "SLatMeshDecoder",
        {"representation_config": {"use_color": True}, **_DECODER},
    ),
    "sparse_structure_vggt_cond": (
        "ckpts/ss_vggt_cond",
        "ModulatedMultiViewCond",
        {
            "channels": 1024, "ctx_channels": 3072, "num_heads": 16, "mlp_ratio": 4, "qk_rms_norm": True,
            "use_fp16": True,
        },
    ),
    "slat_vggt_cond": (
        "ckpts/slat_vggt_cond",
        "ModulatedSLATMultiViewCond",
        {"channels": 1024, "ctx_channels": 3072, "use_fp16": True},
    ),
}  # fmt: skip
# Smaller arguments for each name; the resolutions go from 4^3 latents to 16^3 voxels and 64^3 cubes
_TINY_FLOW = {"model_channels": 64, "cond_channels": 64, "num_blocks": 2, "num_heads": 1}
_TINY_DECODER = {"resolution": 16, "model_channels": 256, "num_blocks": 2, "num_heads": 4}
_SMALLER: dict[str, dict[str, Any]] = {
    "sparse_structure_decoder": {"channels": [32, 16, 8]},
    "sparse_structure_flow_model": {"resolution": 4, **_TINY_FLOW},
    "slat_flow_model": {"resolution": 16, "io_block_channels": [32], **_TINY_FLOW},
    "slat_decoder_gs": _TINY_DECODER,
    "slat_decoder_mesh": _TINY_DECODER,
    "sparse_structure_vggt_cond": {"channels": 64, "ctx_channels": 192, "num_heads": 1, "num_init_tokens": 64},
    "slat_vggt_cond": {"channels": 64, "ctx_channels": 192},
}
TINY: Models = {name: (path, kind, args | _SMALLER[name]) for name, (path, kind, args) in FULL.items()}
FULL_CHANNELS, TINY_CHANNELS = 1024, 64


def make(folder: Path, models: Models, channels: int, device: str) -> dict[str, str]:
    """Write all files below `folder`. Gives the environment with which the model's process finds them."""
    torch.manual_seed(0)
    environment = {"HF_HOME": str(folder / "hf"), "TORCH_HOME": str(folder / "torch")}
    for repository in (PIPELINE, GEOMETRY):
        cache = folder / "hf" / "hub" / f"models--{repository.replace('/', '--')}"
        (cache / "refs").mkdir(parents=True)
        (cache / "refs" / "main").write_text(REVISION)
        (cache / "snapshots" / REVISION).mkdir(parents=True)
    (folder / "torch" / "hub" / "checkpoints").mkdir(parents=True)
    places = WeightPlaces.of(environment)
    (places.pipeline / "ckpts").mkdir()
    (places.pipeline / "pipeline.json").write_text(json.dumps(_config(models), indent=1))
    for path, name, arguments in models.values():
        (places.pipeline / f"{path}.json").write_text(json.dumps({"name": name, "args": arguments}, indent=1))
        with torch.device(device):
            save_file(_drawn(constructed(name, arguments)), places.pipeline / f"{path}.safetensors")
    with torch.device(device):
        drawn = _drawn(Aggregator(channels=channels, heads=channels // 64))
        save_file({f"{AGGREGATOR_KEYS}{key}": tensor for key, tensor in drawn.items()}, places.geometry)
        drawn = _drawn(VisionTransformer(channels=channels, heads=channels // 64))
        torch.save({key: tensor.cpu() for key, tensor in drawn.items()}, places.features.with_name(f"{FEATURES}.pth"))
    return environment


def _config(models: Models) -> dict[str, Any]:
    def sampler(strength: float) -> dict[str, Any]:
        params = {"steps": 25, "cfg_strength": strength, "cfg_interval": [0.5, 1.0], "rescale_t": 3.0}
        return {"name": "FlowEulerGuidanceIntervalSampler", "args": {"sigma_min": 1e-5}, "params": params}

    return {
        "name": "TrellisVGGTTo3DPipeline",
        "args": {
            "models": {name: path for name, (path, _, _) in models.items()},
            "sparse_structure_sampler": sampler(5.0),
            "slat_sampler": sampler(3.0),
            "slat_normalization": {"mean": [0.0] * 8, "std": [1.0] * 8},  # random latents have no other
            "image_cond_model": "dinov2_vitl14_reg",
        },
    }


@torch.no_grad()
def _drawn(module: nn.Module) -> dict[str, Tensor]:
    """Fill the parameters so that values neither grow nor vanish from block to block."""
    for key, parameter in module.named_parameters():
        noise = torch.randn(parameter.shape, device=parameter.device)
        if parameter.dim() <= 1 or "gamma" in key:
            is_scale = "norm" in key and (key.endswith("weight") or "gamma" in key)
            parameter.copy_(NORM_NOISE * noise + (1.0 if is_scale else LAYER_SCALE if ".ls" in key else 0.0))
        else:
            gain = LAST_GAIN if key.startswith("out_layer") else GAIN
            parameter.copy_(noise * gain / parameter[0].numel() ** 0.5)
    return {key: tensor.contiguous() for key, tensor in module.state_dict().items()}


def as_bundle(folder: Path) -> dict[str, str]:
    """Pin the files that `make` wrote to `folder`, and give the folder its bundle's name. Gives the program's settings.

    The list of pins goes beside the parent of `folder`.
    """
    # not at the top: the benchmark of the network alone needs no other package of the project
    from tasks.store.location import Manifest, file_sha256
    from tasks.weights.pins import Bundle, WeightFile, declared

    sources = []
    for source in declared().sources:
        placed = source.model_copy(update={"revision": REVISION}) if source.on_hub else source
        paths = {file.path: folder / placed.path_in_bundle(file.path) for file in placed.files}
        files = tuple(
            WeightFile(path=name, bytes=path.stat().st_size, sha256=file_sha256(path))
            for name, path in paths.items()
            if path.exists()
        )
        if files:
            sources.append(placed.model_copy(update={"files": files}))
    bundle = Bundle(sources=tuple(sources))
    manifest = Manifest(schema=1, files=bundle.entries())
    (folder / "manifest.json").write_text(manifest.model_dump_json(by_alias=True))
    weights = folder.parent
    os.replace(folder, weights / bundle.digest)
    pins = weights.with_name("weights.json")
    pins.write_text(bundle.model_dump_json(exclude_none=True))
    return {"CAPTURE2MESH_WEIGHTS": str(weights), "CAPTURE2MESH_WEIGHTS_LIST": str(pins)}


def main() -> None:
    folder = Path(sys.argv[1]).resolve() / "weights" / "new"
    if "--tiny" in sys.argv[2:]:
        make(folder, TINY, TINY_CHANNELS, "cpu")
    else:
        make(folder, FULL, FULL_CHANNELS, "cuda")
    for name, value in as_bundle(folder).items():
        print(f"export {name}={value}")


if __name__ == "__main__":
    main()
