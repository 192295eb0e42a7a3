"""The rule of the goldens: tiny arguments, weights and inputs of each network. The goldens' maker and tests use it.

Weights come from the names of their keys, so that nothing but outputs has to be stored.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

FLOW: dict[str, Any] = {
    "in_channels": 8, "out_channels": 8, "model_channels": 96, "cond_channels": 96, "num_blocks": 3, "num_heads": 4,
    "mlp_ratio": 4, "pe_mode": "ape", "qk_rms_norm": True,
}  # fmt: skip
GAUSSIANS: dict[str, Any] = {
    "lr": {"_xyz": 1.0, "_features_dc": 1.0, "_opacity": 1.0, "_scaling": 1.0, "_rotation": 0.1},
    "perturb_offset": True, "voxel_size": 1.5, "num_gaussians": 32, "2d_filter_kernel_size": 0.1,
    "3d_filter_kernel_size": 0.0009, "scaling_bias": 0.004, "opacity_bias": 0.1, "scaling_activation": "softplus",
}  # fmt: skip
DECODER: dict[str, Any] = {
    "resolution": 16, "model_channels": 256, "latent_channels": 8, "num_blocks": 4, "num_heads": 4, "mlp_ratio": 4,
    "attn_mode": "swin", "window_size": 8,
}  # fmt: skip
ARGUMENTS: dict[str, dict[str, Any]] = {
    "SparseStructureFlowModel": {"resolution": 8, "patch_size": 1, **FLOW},
    "SLatFlowModel": {
        "resolution": 16, "patch_size": 2, "num_io_res_blocks": 2, "io_block_channels": [32], **FLOW
    },
    "ModulatedMultiViewCond": {
        "channels": 96, "ctx_channels": 288, "num_heads": 4, "mlp_ratio": 4.0, "qk_rms_norm": True,
        "qk_rms_norm_cross": False, "num_init_tokens": 64,
    },
    "ModulatedSLATMultiViewCond": {"channels": 1024, "ctx_channels": 3072},
    "SparseStructureDecoder": {
        "out_channels": 1, "latent_channels": 8, "num_res_blocks": 2, "num_res_blocks_middle": 2,
        "channels": [64, 32, 16],
    },
    "SLatGaussianDecoder": {"representation_config": GAUSSIANS, **DECODER},
    "SLatMeshDecoder": {"representation_config": {"use_color": True}, **DECODER},
}  # fmt: skip
AGGREGATOR = {"channels": 64, "depth": 3, "heads": 4, "grid": 4, "patch": 14}
AGGREGATOR_PIXELS = AGGREGATOR["grid"] * AGGREGATOR["patch"]
VIEWS, TIME = 3, 700.0
SAMPLER = {"steps": 12, "rescale_t": 1.0, "cfg_interval": (0.5, 1.0)}  # the sixth step is at exactly 0.5
STRENGTH = 3.0
OCCUPIED, GRID, CUBE_GRID, CUBES_OCCUPIED = 0.12, 16, 10, 0.4
# Rows of a large output that are stored
GAUSSIAN_ROWS, FEATURE_ROWS = slice(None, None, 61), slice(None, None, 499)


def values(name: str, *shape: int) -> Tensor:
    """Normal values that the name decides, fp32; numpy keeps the stream of RandomState for ever."""
    random = np.random.RandomState(zlib.crc32(name.encode()))
    return torch.from_numpy(random.standard_normal(shape).astype(np.float32))


def weights(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Weights for these keys and shapes. Norms and gammas are near 1, other vectors near 0."""
    made = {}
    for key, tensor in state.items():
        drawn = values(key, *tensor.shape)
        if tensor.dim() <= 1 or "gamma" in key:
            made[key] = 0.1 * drawn + float("gamma" in key or ("norm" in key and key.endswith("weight")))
        else:
            made[key] = drawn * (1.2 / math.sqrt(tensor[0].numel()))
    return made


def occupied(name: str, side: int, share: float) -> Tensor:
    """About this share of a grid's cells, (N, 3) int64, in lexicographic order."""
    random = np.random.RandomState(zlib.crc32(name.encode()))
    return torch.from_numpy(random.rand(side, side, side) < share).nonzero()


def voxels() -> Tensor:
    """The voxels of the latents' flow and of the decoders."""
    return occupied("voxels", GRID, OCCUPIED)


def cubes() -> tuple[Tensor, Tensor]:
    """Cubes with random features: every case occurs. Coordinates and features (n, 101)."""
    coords = occupied("cubes", CUBE_GRID, CUBES_OCCUPIED)
    return coords, values("cube features", len(coords), 101)
