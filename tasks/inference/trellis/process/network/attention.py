"""Attention, norms and the feed-forward layer that the flows, the conditions and the decoders are built of.

Source: TRELLIS (Xiang et al. 2024), its transformer blocks. Tensors are (batch, tokens, channels) or, within an
attention, (batch, tokens, heads, channels of a head). Weights are fp32 or fp16; norms compute in fp32.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional

try:
    from torch.nn.attention.varlen import varlen_attn
except ImportError:  # before PyTorch 2.10
    varlen_attn = None

NORM_EPS = 1e-6
# Far below the square of any half-precision number: the norm never divides by it, only a zero vector meets it
RMS_EPS = 1e-12


def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
    """Attention of (B, L, H, D) queries to (B, S, H, D) keys. mask: broadcast to (B, H, L, S), False hides a key."""
    q, k, v = (each.transpose(1, 2) for each in (q, k, v))
    return functional.scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(1, 2)


def attend_apart(q: Tensor, k: Tensor, v: Tensor, bounds: Tensor) -> Tensor:
    """Attention of tokens to each other, (1, L, H, D) each, in two parts that do not see each other.

    bounds: (3) int32, 0, the length of the first part, and L. A CUDA graph reads it anew at each replay.
    """
    length = q.shape[1]
    if varlen_attn is not None and q.is_cuda and q.dtype == torch.float16:
        return varlen_attn(q[0], k[0], v[0], bounds, bounds, length, length)[None]
    behind = torch.arange(length, device=q.device) >= bounds[1]
    return attend(q, k, v, behind[:, None] == behind)


def plain_norm(x: Tensor, eps: float = NORM_EPS) -> Tensor:
    """Layer norm over the channels without weights. The kernel computes in fp32, whatever the dtype of x is."""
    return functional.layer_norm(x, x.shape[-1:], eps=eps)


def compute_in(root: nn.Module, dtype: torch.dtype) -> None:
    """Store the weights of all linear and convolution layers below `root` in this dtype; the norms keep theirs."""
    for module in root.modules():
        if isinstance(module, nn.Linear | nn.Conv2d | nn.Conv3d) or getattr(module, "is_convolution", False):
            module.to(dtype)


class AffineNorm(nn.LayerNorm):
    """Layer norm with fp32 weights on tensors of any dtype."""

    def forward(self, x: Tensor) -> Tensor:
        weight, bias = self.weight.to(x.dtype), self.bias.to(x.dtype)
        return functional.layer_norm(x, self.normalized_shape, weight, bias, self.eps)


class HeadNorm(nn.Module):
    """x / |x| * gamma * sqrt(d) for each head's vector; upstream's MultiHeadRMSNorm. gamma: (H, D), always fp32."""

    def __init__(self, head_channels: int, heads: int) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.ones(heads, head_channels))

    def forward(self, x: Tensor) -> Tensor:
        return functional.rms_norm(x, x.shape[-1:], eps=RMS_EPS) * self.gamma.to(x.dtype)


class SelfAttention(nn.Module):
    """Attention of tokens to each other. qk_norm: queries and keys are normalised first."""

    def __init__(self, channels: int, heads: int, qk_norm: bool) -> None:
        super().__init__()
        self.heads, self.qk_norm = heads, qk_norm
        self.to_qkv = nn.Linear(channels, 3 * channels)
        self.to_out = nn.Linear(channels, channels)
        if qk_norm:
            self.q_rms_norm = HeadNorm(channels // heads, heads)
            self.k_rms_norm = HeadNorm(channels // heads, heads)

    def forward(self, x: Tensor, attention: Callable[[Tensor, Tensor, Tensor], Tensor] = attend) -> Tensor:
        """(..., L, C) -> (..., L, C). attention: takes and gives (..., L, H, D)."""
        q, k, v = self.to_qkv(x).unflatten(-1, (3, self.heads, -1)).unbind(-3)
        if self.qk_norm:
            q, k = self.q_rms_norm(q), self.k_rms_norm(k)
        return self.to_out(attention(q, k, v).flatten(-2))


class CrossAttention(nn.Module):
    """Attention of tokens to one or more contexts. Several contexts, one of each view, give the mean of theirs."""

    def __init__(self, channels: int, context_channels: int, heads: int, qk_norm: bool) -> None:
        super().__init__()
        self.heads, self.qk_norm = heads, qk_norm
        self.to_q = nn.Linear(channels, channels)
        self.to_kv = nn.Linear(context_channels, 2 * channels)
        self.to_out = nn.Linear(channels, channels)
        if qk_norm:
            self.q_rms_norm = HeadNorm(channels // heads, heads)
            self.k_rms_norm = HeadNorm(channels // heads, heads)

    def keys_values(self, context: Tensor) -> Tensor:
        """(V, S, C of the context) -> keys and values (2, V, S, H, D). They depend on neither tokens nor time."""
        k, v = self.to_kv(context).unflatten(-1, (2, self.heads, -1)).unbind(-3)
        return torch.stack([self.k_rms_norm(k) if self.qk_norm else k, v])

    def forward(self, x: Tensor, keys_values: Tensor) -> Tensor:
        """(1, L, C) -> (1, L, C). Upstream averages `to_out` of each view; it is linear, so the mean goes first."""
        q = self.to_q(x).unflatten(-1, (self.heads, -1))
        if self.qk_norm:
            q = self.q_rms_norm(q)
        k, v = keys_values
        seen = attend(q.expand(len(k), -1, -1, -1), k, v)
        return self.to_out(seen.mean(0, keepdim=True, dtype=torch.float32).to(x.dtype).flatten(-2))

    def of_zeros(self) -> Tensor:
        """The output for contexts of zeros, (C): all keys are alike, so each token gets the bias of the values."""
        return self.to_out(self.to_kv.bias.chunk(2)[1])


class FeedForward(nn.Module):
    """Two linear layers with a GELU (tanh) between them."""

    def __init__(self, channels: int, ratio: float) -> None:
        super().__init__()
        hidden = int(channels * ratio)
        self.mlp = nn.Sequential(nn.Linear(channels, hidden), nn.GELU(approximate="tanh"), nn.Linear(hidden, channels))

    def forward(self, x: Tensor) -> Tensor:
        return self.mlp(x)
