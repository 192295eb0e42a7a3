"""The flow of the sparse structure, and the transformer block and embeddings that both flows have.

Source: TRELLIS (Xiang et al. 2024), a rectified flow transformer (555 M parameters). Blocks in fp16, the rest fp32.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional

from .attention import attend, attend_apart, compute_in, plain_norm
from .conditions import ConditionBlock

LAST_NORM_EPS = 1e-5
TIME_FREQUENCIES = 128
LONGEST_PERIOD = 10000.0
MODULATIONS = 6


def position_embedding(coords: Tensor, channels: int) -> Tensor:
    """Sines, then cosines of each coordinate of (N, 3), zeros behind: (N, C) fp32."""
    count = channels // 3 // 2
    steps = torch.arange(count, dtype=torch.float32, device=coords.device) / count
    angles = coords.float()[:, :, None] * (1.0 / LONGEST_PERIOD**steps)
    embedding = torch.cat([angles.sin(), angles.cos()], -1).flatten(1)
    return functional.pad(embedding, (0, channels - embedding.shape[1]))


class TimestepEmbedder(nn.Module):
    """The embedding of a time 0..1000: (1) -> (1, C) fp32."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(2 * TIME_FREQUENCIES, channels), nn.SiLU(), nn.Linear(channels, channels))

    def forward(self, t: Tensor) -> Tensor:
        steps = torch.arange(TIME_FREQUENCIES, dtype=torch.float32, device=t.device) / TIME_FREQUENCIES
        angles = t[:, None] * torch.exp(-math.log(LONGEST_PERIOD) * steps)
        return self.mlp(torch.cat([angles.cos(), angles.sin()], -1))


class FlowBlock(ConditionBlock):
    """Transformer block whose self-attention and feed-forward layer are modulated by the time (adaLN)."""

    def __init__(
        self, channels: int, context_channels: int, heads: int, ratio: float, qk_norm: bool, qk_norm_cross: bool
    ) -> None:
        super().__init__(channels, context_channels, heads, ratio, qk_norm, qk_norm_cross)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(channels, MODULATIONS * channels))

    def forward(  # type: ignore[override]  # the condition's block takes the context itself
        self, x: Tensor, time: Tensor, keys_values: Tensor | None, bounds: Tensor | None = None
    ) -> Tensor:
        """(1, L, C) -> (1, L, C). keys_values: None for a context of zeros. bounds: of the real tokens and padding."""

        def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            return attend(q, k, v) if bounds is None else attend_apart(q, k, v, bounds)

        shift, scale, gate, shift_mlp, scale_mlp, gate_mlp = self.adaLN_modulation(time)[:, None].chunk(MODULATIONS, -1)
        x = x + gate * self.self_attn(plain_norm(x) * (1 + scale) + shift, attention)
        x = x + (self.cross_attn.of_zeros() if keys_values is None else self.cross_attn(self.norm2(x), keys_values))
        return x + gate_mlp * self.mlp(plain_norm(x) * (1 + scale_mlp) + shift_mlp)


class SparseStructureFlowModel(nn.Module):
    """The velocity of the structure's latents (1, 8, 16, 16, 16) fp32."""

    def __init__(
        self,
        *,
        resolution: int,
        in_channels: int,
        model_channels: int,
        cond_channels: int,
        out_channels: int,
        num_blocks: int,
        num_heads: int,
        mlp_ratio: float = 4,
        qk_rms_norm: bool = False,
        qk_rms_norm_cross: bool = False,
        use_fp16: bool = False,
    ) -> None:
        super().__init__()
        self.shape = (1, in_channels, resolution, resolution, resolution)
        self.dtype = torch.float16 if use_fp16 else torch.float32
        self.t_embedder = TimestepEmbedder(model_channels)
        self.input_layer = nn.Linear(in_channels, model_channels)
        self.out_layer = nn.Linear(model_channels, out_channels)
        self.register_buffer("pos_emb", torch.zeros(resolution**3, model_channels))  # in the file
        self.blocks = nn.ModuleList(
            FlowBlock(model_channels, cond_channels, num_heads, mlp_ratio, qk_rms_norm, qk_rms_norm_cross)
            for _ in range(num_blocks)
        )
        compute_in(self.blocks, self.dtype)

    def keys_values(self, condition: Tensor) -> list[Tensor]:
        """Keys and values of a condition (V, S, C), for each block (2, V, S, H, D): once for a sampling."""
        return [block.cross_attn.keys_values(condition.to(self.dtype)) for block in self.blocks]

    def forward(self, x: Tensor, t: Tensor, keys_values: list[Tensor] | None) -> Tensor:
        """t: (1), 0..1000. keys_values: None for the unconditional velocity."""
        h = self.input_layer(x.flatten(2).transpose(1, 2)) + self.pos_emb
        h, time = h.to(self.dtype), self.t_embedder(t).to(self.dtype)
        for index, block in enumerate(self.blocks):
            h = block(h, time, None if keys_values is None else keys_values[index])
        h = self.out_layer(plain_norm(h.to(x.dtype), LAST_NORM_EPS))
        return h.transpose(1, 2).reshape(x.shape)
