"""VGGT's aggregator: tokens of each view that know of all views.

Source: Wang et al. 2025, "VGGT: Visual Geometry Grounded Transformer" (909 M parameters).
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

from .vision_transformer import SPECIAL_TOKENS, Rotation, VisionBlock, VisionTransformer, normalised

# The layers whose tokens the conditions take
LAYERS = (4, 11, 17, 23)
AGGREGATOR_EPS = 1e-5
ROTATION_BASE = 100.0


def rotation_of(positions: Tensor, head_channels: int) -> Rotation:
    """Cosines and sines (L, D) of rotary embeddings for positions (L, 2), y and x: one half of the channels each."""
    half = head_channels // 2
    frequencies = ROTATION_BASE ** -(torch.arange(0, half, 2, device=positions.device).float() / half)
    angles = positions.float()[:, :, None] * frequencies
    angles = torch.cat([angles, angles], -1).flatten(1)
    return angles.cos(), angles.sin()


class Aggregator(nn.Module):
    """Alternates attention within each view and over all views.

    Images (V, 3, 518, 518) in 0..1 -> for each of `layers` (V, 1374, 2048) fp32. The first view is the reference: it
    has camera and register tokens of its own, so the order of the views matters.
    """

    def __init__(
        self,
        channels: int = 1024,
        depth: int = 24,
        heads: int = 16,
        grid: int = 37,
        patch: int = 14,
        layers: tuple[int, ...] = LAYERS,
    ) -> None:
        super().__init__()
        self.grid, self.head_channels, self.layers = grid, channels // heads, layers
        self.patch_embed = VisionTransformer(channels, depth, heads, grid, patch)
        self.frame_blocks, self.global_blocks = (
            nn.ModuleList(VisionBlock(channels, heads, AGGREGATOR_EPS, qk_norm=True) for _ in range(depth))
            for _ in range(2)
        )
        self.camera_token = nn.Parameter(torch.zeros(1, 2, 1, channels))
        self.register_token = nn.Parameter(torch.zeros(1, 2, SPECIAL_TOKENS - 1, channels))

    def forward(self, images: Tensor) -> list[Tensor]:
        views = len(images)
        patches = self.patch_embed.norm(self.patch_embed(normalised(images)))[:, SPECIAL_TOKENS:]
        special = torch.cat([self.camera_token, self.register_token], 2)[0]
        special = torch.cat([special[:1], special[1:].expand(views - 1, -1, -1)])
        x = torch.cat([special, patches], 1)
        within = self._rotation(images.device)
        over_all = (within[0].repeat(views, 1), within[1].repeat(views, 1))
        seen = []
        for layer, (frame_block, global_block) in enumerate(zip(self.frame_blocks, self.global_blocks, strict=True)):
            of_frame = frame_block(x, within)
            x = global_block(of_frame.flatten(0, 1)[None], over_all)[0].unflatten(0, (views, -1))
            if layer in self.layers:
                seen.append(torch.cat([of_frame, x], -1))
        return seen

    def _rotation(self, device: torch.device) -> Rotation:
        """Patches are at 1..grid along y and x, the special tokens at 0."""
        steps = torch.arange(self.grid, device=device)
        positions = functional.pad(torch.cartesian_prod(steps, steps) + 1, (0, 0, SPECIAL_TOKENS, 0))
        return rotation_of(positions, self.head_channels)
