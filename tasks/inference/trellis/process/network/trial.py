"""The smallest inference: the real networks, tiny, with random weights. `model.py` runs it for the doctor.

It shows that this machine's torch has everything that an inference needs, without any weights.
"""

from __future__ import annotations

import time

import numpy as np
import torch
from torch import nn

from .aggregator import Aggregator
from .attention import compute_in
from .conditions import CONDITION_LAYERS
from .loader import Networks, constructed
from .pipeline import Request, ViewsToMesh
from .sampler import Sampling
from .vision_transformer import VisionTransformer

CHANNELS, HEADS, DEPTH = 64, 1, 2
GRID, PATCH = 4, 14  # patches along a view's side, pixels along a patch's
PIXELS = GRID * PATCH
LATENT_SIDE, LATENT_VALUES = 2, 8
VOXEL_SIDE = 2 * LATENT_SIDE  # of the structure's decoder with two levels
DECODER_CHANNELS = 256  # the fewest that the norms' groups allow
STEPS = 2


def seconds_of_inference(device: torch.device) -> float:
    """Seconds of the tiny inference, of one view, with making the networks."""
    begun = time.perf_counter()
    view = np.zeros((PIXELS, PIXELS, 3), np.uint8)
    result = ViewsToMesh(networks(device)).run([view], Request(0, STEPS, 1.0, STEPS, 1.0), lambda _: None)
    result.gaussians["_xyz"].cpu()
    return time.perf_counter() - begun


@torch.no_grad()
def networks(device: torch.device) -> Networks:
    """Networks with random weights, for views of 56 x 56 pixels: half precision on a GPU, as the published ones."""
    half = device.type == "cuda"
    condition = {"channels": CHANNELS, "ctx_channels": 3 * CHANNELS, "use_fp16": half}
    flow = {
        "in_channels": LATENT_VALUES, "out_channels": LATENT_VALUES, "model_channels": CHANNELS,
        "cond_channels": CHANNELS, "num_blocks": DEPTH, "num_heads": HEADS, "qk_rms_norm": True, "use_fp16": half,
    }  # fmt: skip
    decoder = {
        "resolution": VOXEL_SIDE, "model_channels": DECODER_CHANNELS, "latent_channels": LATENT_VALUES,
        "num_blocks": DEPTH, "num_heads": HEADS, "use_fp16": half,
    }  # fmt: skip
    gaussians = {
        "lr": dict.fromkeys(("_xyz", "_features_dc", "_opacity", "_scaling", "_rotation"), 1.0),
        "perturb_offset": True, "voxel_size": 1.5, "num_gaussians": 4, "3d_filter_kernel_size": 9e-4,
        "scaling_bias": 4e-3, "opacity_bias": 0.1, "scaling_activation": "softplus",
    }  # fmt: skip
    with torch.device(device):
        structure_decoder = constructed(
            "SparseStructureDecoder",
            {
                "out_channels": 1, "latent_channels": LATENT_VALUES, "num_res_blocks": 1, "num_res_blocks_middle": 1,
                "channels": [CHANNELS, CHANNELS], "use_fp16": half,
            },
        )  # fmt: skip
        mesh_decoder = constructed("SLatMeshDecoder", {"representation_config": {"use_color": True}, **decoder})
        _show_something(structure_decoder, mesh_decoder)
        made = {
            "structure_condition": constructed(
                "ModulatedMultiViewCond", {"num_heads": HEADS, "num_init_tokens": LATENT_SIDE**3, **condition}
            ),
            "latent_condition": constructed("ModulatedSLATMultiViewCond", condition),
            "structure_flow": constructed("SparseStructureFlowModel", {"resolution": LATENT_SIDE, **flow}),
            "latent_flow": constructed(
                "SLatFlowModel", {"resolution": VOXEL_SIDE, "io_block_channels": [CHANNELS], **flow}
            ),
            "structure_decoder": structure_decoder,
            "gaussian_decoder": constructed("SLatGaussianDecoder", {"representation_config": gaussians, **decoder}),
            "mesh_decoder": mesh_decoder,
            "aggregator": Aggregator(
                CHANNELS, CONDITION_LAYERS, HEADS, GRID, PATCH, layers=tuple(range(CONDITION_LAYERS))
            ),
            "features": VisionTransformer(CHANNELS, DEPTH, HEADS, GRID, PATCH),
        }
        for vision in (made["aggregator"], made["features"]):
            compute_in(vision, torch.float16 if half else torch.float32)
        sampling = Sampling(STEPS, 1.0, (0.5, 1.0), 1.0)
        return Networks(
            structure_sampling=sampling,
            latent_sampling=sampling,
            mean=torch.zeros(LATENT_VALUES),
            std=torch.ones(LATENT_VALUES),
            **made,
        )


def _show_something(structure_decoder: nn.Module, mesh_decoder: nn.Module) -> None:
    """Make every voxel occupied, and signs differ from cube to cube: with random weights there might be no surface."""
    last = structure_decoder.out_layer[-1]
    last.weight.zero_()
    last.bias.fill_(1.0)
    mesh_decoder.out_layer.weight.normal_()
