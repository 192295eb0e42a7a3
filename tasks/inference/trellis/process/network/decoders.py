"""The decoders: latents to occupied voxels, to gaussians, and to the features of cubes.

Source: TRELLIS (Xiang et al. 2024). Blocks in fp16, the first and last layer in fp32.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from .attention import FeedForward, SelfAttention, compute_in, plain_norm
from .sparse import NamedConv, NamedPointwise, Voxels
from .structure_flow import LAST_NORM_EPS, position_embedding

NORM_GROUPS = 32
SUBDIVISIONS = 2
# The order of a voxel's parts in the mesh decoder: z fastest
CHILD_OFFSETS = tuple((i >> 2 & 1, i >> 1 & 1, i & 1) for i in range(8))
# Of each cube: signed distances and deformations of 8 corners, 21 weights, and RGB and normal of 8 corners
CUBE_CHANNELS, COLOUR_CHANNELS = 8 + 24 + 21, 48
# The gaussians' parts in the order of the last layer's channels
PARTS = {"_xyz": (3,), "_features_dc": (1, 3), "_scaling": (3,), "_rotation": (4,), "_opacity": (1,)}


class ChannelNorm(nn.LayerNorm):
    """Layer norm over the channels of (B, C, X, Y, Z), in fp32."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.movedim(1, -1).float()).to(x.dtype).movedim(-1, 1)


class DenseResidualBlock(nn.Module):
    """Two 3^3 convolutions: (B, C, X, Y, Z) -> the same."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = ChannelNorm(channels), ChannelNorm(channels)
        self.conv1 = nn.Conv3d(channels, channels, 3, padding=1)
        self.conv2 = nn.Conv3d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv1(functional.silu(self.norm1(x)))
        return x + self.conv2(functional.silu(self.norm2(h)))


class DenseUpsampling(nn.Module):
    """A convolution to eight times the channels, which become 2^3 voxels."""

    def __init__(self, channels: int, out: int) -> None:
        super().__init__()
        self.conv = nn.Conv3d(channels, out * 8, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        parts = self.conv(x).unflatten(1, (-1, 2, 2, 2))
        return parts.permute(0, 1, 5, 2, 6, 3, 7, 4).flatten(6, 7).flatten(4, 5).flatten(2, 3)


class SparseStructureDecoder(nn.Module):
    """Latents (1, 8, 16, 16, 16) -> logits of the occupancy (1, 1, 64, 64, 64) fp32."""

    def __init__(
        self,
        *,
        out_channels: int,
        latent_channels: int,
        num_res_blocks: int,
        channels: list[int],
        num_res_blocks_middle: int = 2,
        use_fp16: bool = False,
    ) -> None:
        super().__init__()
        self.dtype = torch.float16 if use_fp16 else torch.float32
        self.input_layer = nn.Conv3d(latent_channels, channels[0], 3, padding=1)
        self.middle_block = nn.Sequential(*(DenseResidualBlock(channels[0]) for _ in range(num_res_blocks_middle)))
        blocks: list[nn.Module] = []
        for level, width in enumerate(channels):
            blocks += [DenseResidualBlock(width) for _ in range(num_res_blocks)]
            if level + 1 < len(channels):
                blocks.append(DenseUpsampling(width, channels[level + 1]))
        self.blocks = nn.ModuleList(blocks)
        last = nn.Conv3d(channels[-1], out_channels, 3, padding=1)
        self.out_layer = nn.Sequential(ChannelNorm(channels[-1]), nn.SiLU(), last)
        compute_in(self.middle_block, self.dtype)
        compute_in(self.blocks, self.dtype)

    def forward(self, x: Tensor) -> Tensor:
        h = self.middle_block(self.input_layer(x).to(self.dtype))
        for block in self.blocks:
            h = block(h)
        return self.out_layer(h.to(x.dtype))


class DecoderBlock(nn.Module):
    """Transformer block whose attention stays within windows: (N, C) -> (N, C)."""

    def __init__(self, channels: int, heads: int, ratio: float, qk_norm: bool) -> None:
        super().__init__()
        self.attn, self.mlp = SelfAttention(channels, heads, qk_norm), FeedForward(channels, ratio)

    def forward(self, x: Tensor, voxels: Voxels, window: int, shift: int) -> Tensor:
        x = x + self.attn(plain_norm(x), voxels.windows(window, shift))
        return x + self.mlp(plain_norm(x))


class LatentDecoder(nn.Module):
    """The trunk of both decoders of structured latents: (N, 8) fp32 -> (N, C) fp16. A subclass adds its head."""

    def __init__(
        self,
        *,
        resolution: int,
        model_channels: int,
        latent_channels: int,
        num_blocks: int,
        num_heads: int,
        representation_config: dict[str, Any],
        mlp_ratio: float = 4,
        window_size: int = 8,
        qk_rms_norm: bool = False,
        use_fp16: bool = False,
    ) -> None:
        super().__init__()
        self.resolution, self.channels, self.window = resolution, model_channels, window_size
        self.representation = representation_config
        self.dtype = torch.float16 if use_fp16 else torch.float32
        self.input_layer = nn.Linear(latent_channels, model_channels)
        self.blocks = nn.ModuleList(
            DecoderBlock(model_channels, num_heads, mlp_ratio, qk_rms_norm) for _ in range(num_blocks)
        )
        compute_in(self.blocks, self.dtype)

    def trunk(self, x: Tensor, voxels: Voxels) -> Tensor:
        """Every second block has its windows moved by half a window."""
        h = (self.input_layer(x) + position_embedding(voxels.coords, self.channels)).to(self.dtype)
        for index, block in enumerate(self.blocks):
            h = block(h, voxels, self.window, self.window // 2 * (index % 2))
        return h


class SLatGaussianDecoder(LatentDecoder):
    """The gaussians of each voxel, as upstream's raw tensors: positions in 0..1, the rest before its activations."""

    def __init__(self, **arguments: Any) -> None:
        super().__init__(**arguments)
        self.count = self.representation["num_gaussians"]
        channels = self.count * sum(math.prod(shape) for shape in PARTS.values())
        self.out_layer = nn.Linear(self.channels, channels)
        self.register_buffer("offset_perturbation", torch.zeros(self.count, 3))  # in the file

    def forward(self, x: Tensor, voxels: Voxels) -> dict[str, Tensor]:
        """(N, 8) -> (N * count, ...) fp32 by the name of each part."""
        h = self.trunk(x, voxels).to(x.dtype)
        h = self.out_layer(plain_norm(h, LAST_NORM_EPS))
        sizes = [self.count * math.prod(shape) for shape in PARTS.values()]
        parts = {
            name: values.unflatten(1, (self.count, *shape)) * self.representation["lr"][name]
            for (name, shape), values in zip(PARTS.items(), h.split(sizes, 1), strict=True)
        }
        offset = parts["_xyz"]
        if self.representation["perturb_offset"]:
            offset = offset + self.offset_perturbation
        centre = (voxels.coords.float() + 0.5)[:, None] / self.resolution
        reach = 0.5 * self.representation["voxel_size"] / self.resolution
        parts["_xyz"] = centre + offset.tanh() * reach
        return {name: values.flatten(0, 1) for name, values in parts.items()}

    @property
    def gaussian_init(self) -> dict[str, Any]:
        """The arguments with which upstream constructs its `Gaussian`, for readers of the raw tensors."""
        chosen = self.representation
        return {
            "aabb": [-0.5, -0.5, -0.5, 1.0, 1.0, 1.0],
            "sh_degree": 0,
            "mininum_kernel_size": chosen["3d_filter_kernel_size"],
            "scaling_bias": chosen["scaling_bias"],
            "opacity_bias": chosen["opacity_bias"],
            "scaling_activation": chosen["scaling_activation"],
        }


class VoxelGroupNorm(nn.GroupNorm):
    """Group norm over all voxels (N, C), in fp32."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.float().t()[None])[0].t().to(x.dtype)


class Subdivision(nn.Module):
    """Each voxel becomes 2^3: (N, C) -> (8 N, out)."""

    def __init__(self, channels: int, out: int) -> None:
        super().__init__()
        self.act_layers = nn.Sequential(VoxelGroupNorm(NORM_GROUPS, channels), nn.SiLU())
        self.out_layers = nn.ModuleList(
            [NamedConv(channels, out), VoxelGroupNorm(NORM_GROUPS, out), nn.SiLU(), NamedConv(out, out)]
        )
        self.skip_connection = NamedPointwise(channels, out)

    def forward(self, x: Tensor, finer: Voxels) -> Tensor:
        first, norm, activation, second = self.out_layers
        h = first(self.act_layers(x).repeat_interleave(8, 0), finer)
        h = second(activation(norm(h)), finer)
        # of one voxel: the same before the subdivision as after it
        return h + self.skip_connection(x).repeat_interleave(8, 0)


class SLatMeshDecoder(LatentDecoder):
    """The features of the cubes at four times the resolution, of which `cubes.py` makes a mesh."""

    def __init__(self, **arguments: Any) -> None:
        super().__init__(**arguments)
        widths = [self.channels // ratio for ratio in (1, 4, 8)]
        self.upsample = nn.ModuleList(Subdivision(widths[level], widths[level + 1]) for level in range(SUBDIVISIONS))
        self.has_colour = bool(self.representation.get("use_color"))
        self.out_layer = nn.Linear(widths[-1], CUBE_CHANNELS + (COLOUR_CHANNELS if self.has_colour else 0))
        compute_in(self.upsample, self.dtype)

    @property
    def cube_resolution(self) -> int:
        """Number of cubes along a side of the model's space."""
        return self.resolution * 2**SUBDIVISIONS

    def forward(self, x: Tensor, voxels: Voxels) -> tuple[Tensor, Tensor]:
        """(N, 8) -> coordinates (64 N, 3) and features (64 N, 101) fp32 of the cubes."""
        h, coords = self.trunk(x, voxels), voxels.coords
        offsets = torch.tensor(CHILD_OFFSETS, device=coords.device)
        for subdivision in self.upsample:
            coords = (coords[:, None] * 2 + offsets).flatten(0, 1)
            h = subdivision(h, Voxels(coords))
        return coords, self.out_layer(h.to(x.dtype))
