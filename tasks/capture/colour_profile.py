"""Colours of a picture with an embedded ICC profile (Display P3, Adobe RGB) -> sRGB; `images` calls it."""

from __future__ import annotations

import io
from functools import lru_cache

import numpy as np
from PIL import Image, ImageCms

_KEPT_PROFILES = 8
# sRGB profiles of different makers differ by so many levels of 255: their pictures stay as they are.
_SAME_COLOURS = 2
_GRID = np.stack(np.meshgrid(*[np.arange(0, 256, 15, dtype=np.uint8)] * 3), axis=-1).reshape(1, -1, 3)


def to_srgb(image: Image.Image, profile: bytes | None) -> Image.Image:
    """The picture (mode RGB or RGBA) in sRGB; as it is without a profile, or if the profile is of no use.

    A profile that cannot be read, or is not one of RGB, is ignored: browsers and viewers do the same.
    """
    transform = _transform(profile) if profile else None
    if transform is None:
        return image
    converted = transform.apply(image.convert("RGB"))
    if image.mode == "RGBA":
        converted.putalpha(image.getchannel("A"))
    return converted


@lru_cache(maxsize=_KEPT_PROFILES)
def _transform(profile: bytes) -> ImageCms.ImageCmsTransform | None:
    """The way from a profile to sRGB; None if it changes nothing or cannot be known."""
    try:
        source = ImageCms.ImageCmsProfile(io.BytesIO(profile))
        target = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB"))
        transform = ImageCms.ImageCmsTransform(source, target, "RGB", "RGB", ImageCms.Intent.RELATIVE_COLORIMETRIC)
    except (ImageCms.PyCMSError, OSError, ValueError):
        return None
    grid = Image.fromarray(_GRID)
    change = np.abs(np.asarray(transform.apply(grid), np.int16) - _GRID)
    return None if change.max() <= _SAME_COLOURS else transform
