"""The views as the networks take them: cut out, centred, 518 x 518, black around the object.

It gives the same bytes as upstream's `preprocess_image`, on whose output the networks were trained.
"""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch.nn import functional

from ..faults import Fault

PIXELS = 518
FOREGROUND = 0.8
MARGIN = 1.1


def prepared(name: str, image: NDArray[np.uint8], mask: NDArray[np.bool_]) -> NDArray[np.uint8]:
    """A view (H, W, 3) with its mask (H, W) -> (518, 518, 3). Raises Fault without a foreground."""
    if not mask.any():
        raise Fault("EmptyResult", f"view {name}: its mask has no foreground")
    rows, columns = np.nonzero(mask)
    height, width = mask.shape
    top, bottom, left, right = rows.min(), rows.max(), columns.min(), columns.max()
    reach = int(max(right - left, bottom - top) * MARGIN) // 2
    x, y = (left + right) / 2, (top + bottom) / 2
    # clipped at the image's borders, then padded to a square: so an object at a border leaves the centre
    crop = np.s_[
        max(0, int(y - reach)) : min(height, int(y + reach)), max(0, int(x - reach)) : min(width, int(x + reach))
    ]
    part = np.dstack([image[crop], mask[crop] * np.uint8(255)])
    if not part.size:
        raise Fault("EmptyResult", f"view {name}: its foreground is a single pixel")
    side = max(part.shape[:2])
    square = np.zeros((side, side, 4), np.float32)
    y0, x0 = ((side - length) // 2 for length in part.shape[:2])
    square[y0 : y0 + part.shape[0], x0 : x0 + part.shape[1]] = part
    tensor = torch.from_numpy(square).permute(2, 0, 1)[None] / 255
    resized = functional.interpolate(tensor, (PIXELS, PIXELS), mode="bilinear", align_corners=False)[0]
    colour = resized[:3] * (resized[3:] > FOREGROUND)
    return (colour * 255).to(torch.uint8).permute(1, 2, 0).contiguous().numpy()
