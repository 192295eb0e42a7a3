"""Random weights of TRELLIS-VGGT at their full size, as a pinned bundle of this program's: for time and memory only.

`random_weights.py --trellis-root ROOT --dinov2 FOLDER OUTPUT`, on a machine with a GPU. ROOT is upstream's checkout,
FOLDER one of facebookresearch/dinov2 at the pinned commit. OUTPUT gets `weights.json` and `weights/`: see `settings`.
The models are upstream's own classes, initialised by themselves, of the published sizes.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from tasks.store.location import Manifest, file_sha256
from tasks.weights.pins import Bundle, Source, WeightFile, declared

PIPELINE, VGGT = "Stable-X/trellis-vggt-v0-2", "Stable-X/vggt-object-v0-1"
REVISION = "0" * 40  # of what has no pin: no commit has this name
DINOV2 = "dinov2_vitl14_reg"
OUTPUT_STD = 0.02

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

# The published pipeline: its name for a model -> file, class, arguments. The last two's files were not seen: their
# arguments follow from the classes and from the published numbers of parameters.
MODELS: dict[str, tuple[str, str, dict[str, Any]]] = {
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
        {"channels": 1024, "ctx_channels": 3072, "num_heads": 16, "mlp_ratio": 4, "use_fp16": True},
    ),
    "slat_vggt_cond": (
        "ckpts/slat_vggt_cond",
        "ModulatedSLATMultiViewCond",
        {"channels": 1024, "ctx_channels": 3072, "use_fp16": True},
    ),
}  # fmt: skip


def _sampler(interval: list[float], strength: float) -> dict[str, Any]:
    params = {"steps": 25, "cfg_strength": strength, "cfg_interval": interval, "rescale_t": 3.0}
    return {"name": "FlowEulerGuidanceIntervalSampler", "args": {"sigma_min": 1e-5}, "params": params}


CONFIG = {
    "name": "TrellisVGGTTo3DPipeline",
    "args": {
        "models": {name: path for name, (path, _, _) in MODELS.items()},
        "sparse_structure_sampler": _sampler([0.5, 1.0], 5.0),
        "slat_sampler": _sampler([0.5, 1.0], 3.0),
        "slat_normalization": {"mean": [0.0] * 8, "std": [1.0] * 8},  # random latents have no other
        "image_cond_model": DINOV2,
    },
}


def settings(output: Path) -> dict[str, str]:
    """The environment with which this program takes the random weights for its own."""
    return {"CAPTURE2MESH_WEIGHTS": str(output / "weights"), "CAPTURE2MESH_WEIGHTS_LIST": str(output / "weights.json")}


def make(root: Path, dinov2: Path, output: Path) -> Bundle:
    """All files of the bundle's required part below `output`, hashed and pinned."""
    folder = output / "weights" / "new"
    sources = [_placed(source) for source in declared().sources]
    made = {PIPELINE: _pipeline, VGGT: _vggt}
    for source in sources:
        if source.on_hub:
            base = folder / source.path_in_bundle("")
            base.mkdir(parents=True)
            made[source.repository](base)
        elif source.has_revisions:
            for file in source.files:
                _copy(dinov2 / file.path, folder / source.path_in_bundle(file.path))
        else:
            _dinov2(dinov2, folder / source.path_in_bundle(source.files[0].path))
    with ThreadPoolExecutor() as pool:
        pinned = tuple(pool.map(lambda source: _pinned(source, folder), sources))
    bundle = Bundle(sources=pinned)
    for path, data in bundle.references.items():
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_bytes(data)
    manifest = Manifest(schema=1, files=bundle.entries())
    (folder / "manifest.json").write_text(manifest.model_dump_json(by_alias=True))
    os.replace(folder, folder.with_name(bundle.digest))
    (output / "weights.json").write_text(bundle.model_dump_json(exclude_none=True))
    return bundle


def _placed(source: Source) -> Source:
    return source if source.revision or not source.on_hub else source.model_copy(update={"revision": REVISION})


def _pinned(source: Source, folder: Path) -> Source:
    def pin(file: WeightFile) -> WeightFile:
        path = folder / source.path_in_bundle(file.path)
        found = WeightFile(path=file.path, bytes=path.stat().st_size, sha256=file_sha256(path))
        if file.sha256 not in (None, found.sha256):
            raise SystemExit(f"{source.repository}: {file.path} is not the pinned one; check out {source.revision}")
        return found

    with ThreadPoolExecutor() as pool:
        return source.model_copy(update={"files": tuple(pool.map(pin, source.files))})


def _pipeline(folder: Path) -> None:
    import torch
    from safetensors.torch import save_file
    from trellis import models

    (folder / "pipeline.json").write_text(json.dumps(CONFIG, indent=1))
    (folder / "ckpts").mkdir()
    for path, name, arguments in MODELS.values():
        (folder / f"{path}.json").write_text(json.dumps({"name": name, "args": arguments}, indent=1))
        with torch.device("cuda"):
            model = getattr(models, name)(**arguments)
        if "Decoder" in name and name.startswith("SLat"):  # upstream starts from zero: all colours would be one
            torch.nn.init.normal_(model.out_layer.weight, std=OUTPUT_STD)
        save_file(
            {key: value.contiguous() for key, value in model.state_dict().items()}, folder / f"{path}.safetensors"
        )


def _vggt(folder: Path) -> None:
    import torch
    from safetensors.torch import save_file
    from vggt.models import vggt

    arguments = {"img_size": 518, "patch_size": 14, "embed_dim": 1024}
    (folder / "config.json").write_text(json.dumps(arguments))
    with torch.device("cuda"):
        model = vggt.VGGT(**arguments)
    del model.depth_head, model.track_head  # upstream drops them when loaded
    save_file({key: value.contiguous() for key, value in model.state_dict().items()}, folder / "model.safetensors")


def _dinov2(checkout: Path, target: Path) -> None:
    import torch

    with torch.device("cuda"):
        model = torch.hub.load(str(checkout), DINOV2, source="local", pretrained=False)
    target.parent.mkdir(parents=True)
    torch.save({key: value.cpu() for key, value in model.state_dict().items()}, target)


def _copy(source: Path, target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(source, target)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--trellis-root", type=Path, required=True)
    parser.add_argument("--dinov2", type=Path, required=True)
    parser.add_argument("output", type=Path)
    asked = parser.parse_args()
    os.environ["SPCONV_ALGO"] = "native"
    sys.path[:0] = [str(asked.trellis_root), str(asked.trellis_root / "wheels" / "vggt")]
    begun = time.perf_counter()
    bundle = make(asked.trellis_root, asked.dinov2, asked.output.resolve())
    size = sum(entry.bytes for entry in bundle.entries())
    print(f"# {size / 1e9:.1f} GB of random weights in {time.perf_counter() - begun:.0f} s")
    for name, value in settings(asked.output.resolve()).items():
        print(f"export {name}={value}")


if __name__ == "__main__":
    main()
