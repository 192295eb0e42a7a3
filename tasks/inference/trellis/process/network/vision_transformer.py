"""DINOv2's vision transformer with registers, and the block that VGGT's aggregator shares with it.

Source: Oquab et al. 2023, Darcet et al. 2023 (ViT-L/14, 304 M parameters). Linear layers may be stored in half
precision: their inputs are cast to it. Norms, rotations and the sum of the branches stay in fp32.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

# The class token and four registers, before the patches' tokens
SPECIAL_TOKENS = 5
VISION_EPS = 1e-6
PIXEL_MEAN, PIXEL_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)

Rotation = tuple[Tensor, Tensor]


def normalised(images: Tensor) -> Tensor:
    """Images (V, 3, H, W) in 0..1, with ImageNet's mean and standard deviation taken out."""
    mean, std = (torch.tensor(each, device=images.device).view(1, 3, 1, 1) for each in (PIXEL_MEAN, PIXEL_STD))
    return (images - mean) / std


def rotated(x: Tensor, rotation: Rotation) -> Tensor:
    """Turn (B, H, L, D) by the cosines and sines (L, D). Each half of D, for y and x, is made of two halves."""
    cosine, sine = rotation
    first, second = x.unflatten(-1, (2, 2, -1)).unbind(-2)
    turned = torch.stack([-second, first], -2).flatten(-3)
    return x * cosine + turned * sine


class CastLinear(nn.Linear):
    """A linear layer that casts its input to the dtype of its weights."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.to(self.weight.dtype))


class VisionAttention(nn.Module):
    """Self-attention; with `qk_norm` queries and keys get a layer norm, with a rotation they are turned after it."""

    def __init__(self, channels: int, heads: int, qk_norm: bool) -> None:
        super().__init__()
        self.heads = heads
        self.qkv, self.proj = CastLinear(channels, 3 * channels), CastLinear(channels, channels)
        self.q_norm: nn.Module = nn.LayerNorm(channels // heads) if qk_norm else nn.Identity()
        self.k_norm: nn.Module = nn.LayerNorm(channels // heads) if qk_norm else nn.Identity()

    def forward(self, x: Tensor, rotation: Rotation | None) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)
        q, k = self.q_norm(q.float()), self.k_norm(k.float())
        if rotation is not None:
            q, k = rotated(q, rotation), rotated(k, rotation)
        seen = functional.scaled_dot_product_attention(q.to(v.dtype), k.to(v.dtype), v)
        return self.proj(seen.transpose(1, 2).flatten(-2))


class VisionFeedForward(nn.Module):
    """Two linear layers with an exact GELU between them."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.fc1, self.fc2 = CastLinear(channels, 4 * channels), CastLinear(4 * channels, channels)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(functional.gelu(self.fc1(x)))


class LayerScale(nn.Module):
    """Multiplies each channel by a learned factor, in fp32."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.ones(channels))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.gamma


class VisionBlock(nn.Module):
    """Pre-norm transformer block, (B, L, C) fp32 -> the same."""

    def __init__(self, channels: int, heads: int, eps: float, qk_norm: bool) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(channels, eps=eps), nn.LayerNorm(channels, eps=eps)
        self.attn, self.mlp = VisionAttention(channels, heads, qk_norm), VisionFeedForward(channels)
        self.ls1, self.ls2 = LayerScale(channels), LayerScale(channels)

    def forward(self, x: Tensor, rotation: Rotation | None = None) -> Tensor:
        x = x + self.ls1(self.attn(self.norm1(x), rotation))
        return x + self.ls2(self.mlp(self.norm2(x)))


class Patches(nn.Module):
    """The convolution that turns patches of pixels into tokens."""

    def __init__(self, channels: int, patch: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(3, channels, patch, patch)

    def forward(self, images: Tensor) -> Tensor:
        """(V, 3, H, W) -> (V, P, C)."""
        return self.proj(images.to(self.proj.weight.dtype)).flatten(2).transpose(1, 2)


class VisionTransformer(nn.Module):
    """dinov2_vitl14_reg: images (V, 3, 518, 518), normalised -> tokens (V, 1374, 1024) before the last norm.

    grid: patches along a side. The position embedding has exactly as many, so images of other sizes are not taken.
    """

    def __init__(self, channels: int = 1024, depth: int = 24, heads: int = 16, grid: int = 37, patch: int = 14) -> None:
        super().__init__()
        self.patch_embed = Patches(channels, patch)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, channels))
        self.pos_embed = nn.Parameter(torch.zeros(1, grid * grid + 1, channels))
        self.register_tokens = nn.Parameter(torch.zeros(1, SPECIAL_TOKENS - 1, channels))
        self.mask_token = nn.Parameter(torch.zeros(1, channels))  # in the files; only training uses it
        self.blocks = nn.ModuleList(VisionBlock(channels, heads, VISION_EPS, qk_norm=False) for _ in range(depth))
        self.norm = nn.LayerNorm(channels, eps=VISION_EPS)

    def forward(self, images: Tensor) -> Tensor:
        views = len(images)
        patches = self.patch_embed(images).to(self.pos_embed.dtype)
        x = torch.cat([self.cls_token.expand(views, -1, -1), patches], 1) + self.pos_embed
        # the registers come after the positions are added: they have none
        x = torch.cat([x[:, :1], self.register_tokens.expand(views, -1, -1), x[:, 1:]], 1)
        for block in self.blocks:
            x = block(x)
        return x
