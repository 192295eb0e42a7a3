"""The networks that turn the views' tokens into the conditions of the two flows.

Source: ReconViaGen (2025). Both take VGGT's tokens of four layers, each (V, P, 2C), and DINOv2's (V, P, C), fp32.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from .attention import NORM_EPS, AffineNorm, CrossAttention, FeedForward, SelfAttention, compute_in, plain_norm
from .vision_transformer import SPECIAL_TOKENS

CONDITION_LAYERS = 4


class ConditionBlock(nn.Module):
    """Transformer block without modulation. The block of the flows is built on it: the same parts."""

    def __init__(
        self, channels: int, context_channels: int, heads: int, ratio: float, qk_norm: bool, qk_norm_cross: bool
    ) -> None:
        super().__init__()
        self.norm2 = AffineNorm(channels, eps=NORM_EPS)
        self.self_attn = SelfAttention(channels, heads, qk_norm)
        self.cross_attn = CrossAttention(channels, context_channels, heads, qk_norm_cross)
        self.mlp = FeedForward(channels, ratio)

    def forward(self, x: Tensor, context: Tensor) -> Tensor:
        """(1, L, C), (1, S, context's C) -> (1, L, C)."""
        x = x + self.self_attn(plain_norm(x))
        x = x + self.cross_attn(self.norm2(x), self.cross_attn.keys_values(context))
        return x + self.mlp(plain_norm(x))


class ModulatedMultiViewCond(nn.Module):
    """The condition of the structure's flow: learned tokens (1, 4096, C) that look at the patches of all views."""

    def __init__(
        self,
        *,
        channels: int,
        ctx_channels: int,
        num_heads: int,
        mlp_ratio: float = 4,
        qk_rms_norm: bool = False,
        qk_rms_norm_cross: bool = False,
        num_init_tokens: int = 4096,
        use_fp16: bool = False,
    ) -> None:
        super().__init__()
        self.dtype = torch.float16 if use_fp16 else torch.float32
        self.cond_blocks = nn.ModuleList(
            ConditionBlock(channels, ctx_channels, num_heads, mlp_ratio, qk_rms_norm, qk_rms_norm_cross)
            for _ in range(CONDITION_LAYERS)
        )
        self.multiview_cond_tokens = nn.Parameter(torch.zeros(1, num_init_tokens, channels, dtype=self.dtype))
        compute_in(self.cond_blocks, self.dtype)

    def forward(self, aggregated: Sequence[Tensor], features: Tensor) -> Tensor:
        x = self.multiview_cond_tokens
        for block, tokens in zip(self.cond_blocks, aggregated, strict=True):
            patches = torch.cat([tokens[:, SPECIAL_TOKENS:], features[:, SPECIAL_TOKENS:]], -1)
            x = block(x, patches.flatten(0, 1)[None].to(self.dtype))
        return x


class ModulatedSLATMultiViewCond(nn.Module):
    """The condition of the latents' flow: one context (P, C) of each view, all tokens, together (V, P, C)."""

    def __init__(self, *, channels: int, ctx_channels: int, use_fp16: bool = False) -> None:
        super().__init__()
        self.dtype = torch.float16 if use_fp16 else torch.float32
        self.linear_blocks = nn.ModuleList(
            nn.Sequential(nn.Linear(ctx_channels, channels), nn.ReLU()) for _ in range(CONDITION_LAYERS)
        )
        compute_in(self, self.dtype)

    def forward(self, aggregated: Sequence[Tensor], features: Tensor) -> Tensor:
        features = features.to(self.dtype)
        x = features
        for block, tokens in zip(self.linear_blocks, aggregated, strict=True):
            x = block(torch.cat([tokens.to(self.dtype), x], -1)) + features
        return x
