"""Sparse voxels: their neighbours, windows, and the submanifold convolution.

Source: Graham et al. 2018 (submanifold convolution); the layout of weights is that of spconv's files.
"""

from __future__ import annotations

from functools import cached_property

import torch
from torch import Tensor, nn

from .attention import attend

KERNEL = 3
OFFSETS = KERNEL**3
# Values that are gathered at once for a convolution: 256 MB in half precision
GATHERED_VALUES = 2**27


class Voxels:
    """Occupied voxels (N, 3), unique, with tables of their neighbourhoods, which are made once.

    rows: number of rows of their feature tensors; the rows beyond N are padding, which no voxel sees.
    """

    def __init__(self, coords: Tensor, rows: int | None = None) -> None:
        self.coords = coords.long()
        self.rows = len(coords) if rows is None else rows
        self._windows: dict[int, Windows] = {}

    @cached_property
    def neighbours(self) -> Tensor:
        """(rows, 27) int32: the row of each neighbour, itself in the middle; `rows` where there is none."""
        count, size = len(self.coords), int(self.coords.max()) + KERNEL
        device = self.coords.device
        shifted = self.coords + 1
        code = (shifted[:, 0] * size + shifted[:, 1]) * size + shifted[:, 2]
        row_of = torch.full((size**3,), self.rows, dtype=torch.int32, device=device)
        row_of[code] = torch.arange(count, dtype=torch.int32, device=device)
        steps = torch.arange(-1, 2, device=device)
        x, y, z = torch.cartesian_prod(steps, steps, steps).unbind(1)
        table = torch.full((self.rows, OFFSETS), self.rows, dtype=torch.int32, device=device)
        table[:count] = row_of[code[:, None] + (x * size + y) * size + z]
        return table

    def windows(self, size: int, shift: int) -> Windows:
        """The windows of size^3 voxels, moved by `shift`."""
        if shift not in self._windows:
            self._windows[shift] = Windows(self.coords, size, shift)
        return self._windows[shift]


class Windows:
    """Attention of the voxels of a window to each other. Windows are padded to the longest of them."""

    def __init__(self, coords: Tensor, size: int, shift: int) -> None:
        window = (coords + shift) // size
        side = int(window.max()) + 1
        code = (window[:, 0] * side + window[:, 1]) * side + window[:, 2]
        _, which, count = code.unique(return_inverse=True, return_counts=True)
        self.order = torch.argsort(which, stable=True)
        self.window = which[self.order]
        start = torch.cumsum(count, 0) - count
        self.place = torch.arange(len(coords), device=coords.device) - start[self.window]
        self.shape = len(count), int(count.max())
        self.mask = (torch.arange(self.shape[1], device=coords.device) < count[:, None])[:, None, None]

    def __call__(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """(N, H, D) each -> (N, H, D)."""
        seen = attend(self._padded(q), self._padded(k), self._padded(v), self.mask)
        result = torch.empty_like(v)
        result[self.order] = seen[self.window, self.place]
        return result

    def _padded(self, x: Tensor) -> Tensor:
        padded = x.new_zeros(*self.shape, *x.shape[1:])
        padded[self.window, self.place] = x[self.order]
        return padded


class SubmanifoldConv(nn.Module):
    """Convolution of 3^3 voxels: out = bias + sum over the neighbours that exist of weight[:, offset] @ x.

    weight: (out, 3, 3, 3, in). One matrix product with fp32 sums: no atomic additions, so equal bytes at each run.
    """

    is_convolution = True

    def __init__(self, channels: int, out: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(out, KERNEL, KERNEL, KERNEL, channels))
        self.bias = nn.Parameter(torch.zeros(out))

    def forward(self, x: Tensor, voxels: Voxels) -> Tensor:
        """(rows, in) -> (rows, out)."""
        channels = x.shape[1]
        padded = torch.cat([x, x.new_zeros(1, channels)])
        weight = self.weight.flatten(1).t()
        parts = voxels.neighbours.split(max(1, GATHERED_VALUES // (OFFSETS * channels)))
        return torch.cat([torch.addmm(self.bias, padded[part].flatten(1), weight) for part in parts])


class PointwiseConv(nn.Module):
    """Convolution of one voxel. weight: (out, 1, 1, 1, in) in the files, whose memory spconv reads as (in, out)."""

    is_convolution = True

    def __init__(self, channels: int, out: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(out, 1, 1, 1, channels))
        self.bias = nn.Parameter(torch.zeros(out))

    def forward(self, x: Tensor) -> Tensor:
        return torch.addmm(self.bias, x, self.weight.view(x.shape[1], -1))


class NamedConv(nn.Module):
    """A convolution below the name `conv`, as the published files have it."""

    def __init__(self, channels: int, out: int) -> None:
        super().__init__()
        self.conv = SubmanifoldConv(channels, out)

    def forward(self, x: Tensor, voxels: Voxels) -> Tensor:
        return self.conv(x, voxels)


class NamedPointwise(nn.Module):
    """A convolution of one voxel below the name `conv`."""

    def __init__(self, channels: int, out: int) -> None:
        super().__init__()
        self.conv = PointwiseConv(channels, out)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x)
