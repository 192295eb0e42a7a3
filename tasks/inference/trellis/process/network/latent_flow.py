"""The flow of the structured latents: eight values for each occupied voxel.

Source: TRELLIS (Xiang et al. 2024), a rectified flow transformer with residual blocks around it (600 M parameters).
Blocks in fp16, embeddings and the first and last layer in fp32.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor, nn
from torch.nn import functional

from .attention import NORM_EPS, AffineNorm, compute_in, plain_norm
from .sparse import NamedConv, Voxels
from .structure_flow import LAST_NORM_EPS, FlowBlock, TimestepEmbedder, position_embedding

CHILDREN = 8


@dataclass(frozen=True)
class Pyramid:
    """The voxels and their parents, the transformer's tokens, with all tables that a step reads.

    Padded rows, if any, are behind the real ones; no real row reads them.
    """

    fine: Voxels
    """The voxels."""
    coarse: Voxels
    """Their parents at half the resolution, in lexicographic order."""
    parent: Tensor
    """(rows of `fine`) int64: row of each voxel's parent; a padded voxel has the last row."""
    children: Tensor
    """(rows of `coarse`, 8) int64: rows of the voxels of a parent; the number of rows of `fine` where there is none."""
    count: Tensor
    """(rows of `coarse`, 1) fp32: number of children."""
    position: Tensor
    """(rows of `coarse`, C) fp32: embedding of the parents' positions."""
    bounds: Tensor | None
    """(3) int32: 0, the number of parents, the rows of `coarse`: attention keeps padding apart; None without any."""

    @staticmethod
    def of(coords: Tensor, channels: int, voxel_bucket: int = 1, token_bucket: int = 1) -> Pyramid:
        """Tables of voxels (N, 3) for a flow of so many channels, padded to multiples of the buckets."""
        coords, device = coords.long(), coords.device
        parents, parent = (coords // 2).unique(dim=0, return_inverse=True)
        padded = token_bucket > 1  # then one row at least is padding: padded voxels need a parent
        rows = _multiple(len(coords), voxel_bucket)
        tokens = _multiple(len(parents) + padded, token_bucket)
        slot = (coords % 2 * torch.tensor([4, 2, 1], device=device)).sum(1)  # CUDA has no product of integer matrices
        children = torch.full((tokens, CHILDREN), rows, device=device)
        children[parent, slot] = torch.arange(len(coords), device=device)
        made = Pyramid(
            fine=Voxels(coords, rows),
            coarse=Voxels(parents, tokens),
            parent=functional.pad(parent, (0, rows - len(coords)), value=tokens - 1),
            children=children,
            count=(children < rows).sum(1, keepdim=True).float(),
            position=functional.pad(position_embedding(parents, channels), (0, 0, 0, tokens - len(parents))),
            bounds=torch.tensor([0, len(parents), tokens], dtype=torch.int32, device=device) if padded else None,
        )
        _ = made.tables  # made now: a CUDA graph cannot record how
        return made

    @cached_property
    def tables(self) -> tuple[Tensor, ...]:
        """All tensors that a step reads."""
        bounds = () if self.bounds is None else (self.bounds,)
        neighbours = (self.fine.neighbours, self.coarse.neighbours)
        return (*neighbours, self.parent, self.children, self.count, self.position, *bounds)

    def refill(self, other: Pyramid) -> None:
        """Copy the tables of another pyramid with as many rows into this one's, which a CUDA graph reads."""
        for mine, new in zip(self.tables, other.tables, strict=True):
            mine.copy_(new)

    def pooled(self, x: Tensor) -> Tensor:
        """(rows of `fine`, C) -> (rows of `coarse`, C): the mean of the children.

        Upstream's mean also counts the zero that it starts from, and its networks are trained so.
        """
        padded = torch.cat([x, x.new_zeros(1, x.shape[1])])
        return (padded[self.children].sum(1, dtype=torch.float32) / (self.count + 1)).to(x.dtype)


def _multiple(count: int, bucket: int) -> int:
    return -(-count // bucket) * bucket


class SparseResidualBlock(nn.Module):
    """Two convolutions, modulated by the time: (rows, C) -> (rows, out)."""

    def __init__(self, channels: int, time_channels: int, out: int) -> None:
        super().__init__()
        self.norm1 = AffineNorm(channels, eps=NORM_EPS)
        self.conv1, self.conv2 = NamedConv(channels, out), NamedConv(out, out)
        self.emb_layers = nn.Sequential(nn.SiLU(), nn.Linear(time_channels, 2 * out))
        self.skip_connection = nn.Linear(channels, out) if channels != out else nn.Identity()

    def forward(self, x: Tensor, time: Tensor, voxels: Voxels) -> Tensor:
        scale, shift = self.emb_layers(time).chunk(2, 1)
        h = self.conv1(functional.silu(self.norm1(x)), voxels)
        h = self.conv2(functional.silu(plain_norm(h) * (1 + scale) + shift), voxels)
        return h + self.skip_connection(x)


class SLatFlowModel(nn.Module):
    """The velocity of the structured latents (rows, 8) fp32."""

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
        io_block_channels: list[int],
        num_io_res_blocks: int = 2,
        mlp_ratio: float = 4,
        qk_rms_norm: bool = False,
        qk_rms_norm_cross: bool = False,
        use_fp16: bool = False,
    ) -> None:
        super().__init__()
        self.resolution, self.in_channels, self.channels = resolution, in_channels, model_channels
        self.dtype = torch.float16 if use_fp16 else torch.float32
        (io,), c = io_block_channels, model_channels
        self.t_embedder = TimestepEmbedder(c)
        self.input_layer, self.out_layer = nn.Linear(in_channels, io), nn.Linear(io, out_channels)
        ends = num_io_res_blocks - 1
        self.input_blocks = nn.ModuleList(
            [*(SparseResidualBlock(io, c, io) for _ in range(ends)), SparseResidualBlock(io, c, c)]
        )
        self.blocks = nn.ModuleList(
            FlowBlock(c, cond_channels, num_heads, mlp_ratio, qk_rms_norm, qk_rms_norm_cross) for _ in range(num_blocks)
        )
        self.out_blocks = nn.ModuleList(
            [SparseResidualBlock(2 * c, c, io), *(SparseResidualBlock(2 * io, c, io) for _ in range(ends))]
        )
        for blocks in (self.input_blocks, self.blocks, self.out_blocks):
            compute_in(blocks, self.dtype)

    def keys_values(self, condition: Tensor) -> list[Tensor]:
        """Keys and values of the views' contexts (V, S, C), for each block (2, V, S, H, D): once for a sampling."""
        return [block.cross_attn.keys_values(condition.to(self.dtype)) for block in self.blocks]

    def forward(self, x: Tensor, t: Tensor, keys_values: list[Tensor] | None, pyramid: Pyramid) -> Tensor:
        """t: (1), 0..1000. keys_values: None for the unconditional velocity."""
        time = self.t_embedder(t).to(self.dtype)
        h, skips = self.input_layer(x).to(self.dtype), []
        *fine_blocks, coarse_block = self.input_blocks
        for block in fine_blocks:
            h = block(h, time, pyramid.fine)
            skips.append(h)
        h = coarse_block(pyramid.pooled(h), time, pyramid.coarse)
        skips.append(h)
        h = (h + pyramid.position.to(self.dtype))[None]
        for index, block in enumerate(self.blocks):
            h = block(h, time, None if keys_values is None else keys_values[index], pyramid.bounds)
        first, *others = self.out_blocks
        h = first(torch.cat([h[0], skips.pop()], 1)[pyramid.parent], time, pyramid.fine)
        for block in others:
            h = block(torch.cat([h, skips.pop()], 1), time, pyramid.fine)
        return self.out_layer(plain_norm(h, LAST_NORM_EPS).to(x.dtype))
