"""3D gaussians (Kerbl et al. 2023) that show a surface, and the colours that they give to places on it.

Engines that make gaussians give them in this form; the texture takes the colours from them.
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray
from scipy.spatial import cKDTree
from scipy.spatial.transform import Rotation

THREADS = 2
NEAREST = 16  # gaussians that are looked at for each place; those further away are mostly covered, or do not reach it
CHUNK_PLACES = 8192  # worked on at once: the arrays of a chunk fit the caches
INVISIBLE = 1 / 255  # opacity below which a gaussian shows nothing; rasterisers leave it out as well


@dataclass(frozen=True)
class Gaussians:
    """n gaussians whose colours do not depend on the view."""

    centres: NDArray[np.float32]
    """(n, 3)."""
    scales: NDArray[np.float32]
    """(n, 3), standard deviations along their own axes, in the unit of the centres."""
    rotations: NDArray[np.float32]
    """(n, 4), unit quaternions, w first: from their own axes to the frame of the centres."""
    opacities: NDArray[np.float32]
    """(n,), 0..1."""
    colours: NDArray[np.float32]
    """(n, 3) sRGB, 0..1."""

    def moved(self, similarity: NDArray[np.float64]) -> Gaussians:
        """The gaussians in another frame, to which the 4x4 similarity leads."""
        size = np.cbrt(np.linalg.det(similarity[:3, :3]))
        turned = Rotation.from_matrix(similarity[:3, :3] / size) * Rotation.from_quat(self.rotations, scalar_first=True)
        return replace(
            self,
            centres=(self.centres @ similarity[:3, :3].T + similarity[:3, 3]).astype(np.float32),
            scales=(self.scales * size).astype(np.float32),
            rotations=turned.as_quat(scalar_first=True).astype(np.float32),
        )


class SplatCompositor:
    """The gaussians as cameras far away see them that look along a surface's normals: prepared once for many places.

    Each place has its own camera, on its normal. The gaussians are projected along the normal, sorted by the depth of
    their centres and composited from front to back, as rasterisers do.
    """

    def __init__(self, gaussians: Gaussians) -> None:
        self._visible = np.flatnonzero(gaussians.opacities >= INVISIBLE)
        self._colours = gaussians.colours[self._visible]
        centres, scales = gaussians.centres[self._visible], gaussians.scales[self._visible]
        axes = Rotation.from_quat(gaussians.rotations[self._visible], scalar_first=True).as_matrix()
        # each matrix takes its gaussian to one of covariance 1; its rows come first, then its columns
        whitening = (axes / scales[:, None]).transpose(2, 1, 0).reshape(9, -1)
        self._table = np.concatenate([centres.T, gaussians.opacities[self._visible][None], whitening], dtype=np.float32)
        self._tree = cKDTree(centres, balanced_tree=False, compact_nodes=False)

    def colours(
        self, places: NDArray[np.float32], normals: NDArray[np.float32]
    ) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        """Colours (k, 3), sRGB 0..1, at k places on the surface, and the opacity there, (k,).

        places and normals: (k, 3), unit normals outwards. Of what is transparent no colour is known: the colours are
        those of the rest.
        """
        if not len(self._visible):
            return np.zeros_like(places), np.zeros(len(places), np.float32)

        def chunk(start: int) -> NDArray[np.float32]:
            part = slice(start, start + CHUNK_PLACES)
            index, weight = self._weights(places[part], normals[part])
            return np.column_stack([np.einsum("ckd,ck->kd", self._colours[index], weight), weight.sum(axis=0)])

        with ThreadPoolExecutor(THREADS) as pool:
            sums = np.concatenate([np.zeros((0, 4), np.float32), *pool.map(chunk, range(0, len(places), CHUNK_PLACES))])
        return sums[:, :3] / np.maximum(sums[:, 3:], np.finfo(np.float32).tiny), sums[:, 3]

    def _weights(
        self, places: NDArray[np.float32], normals: NDArray[np.float32]
    ) -> tuple[NDArray[np.intp], NDArray[np.float32]]:
        """The visible gaussians that k places may see, front first, and their shares of the place: (most, k) each."""
        _, nearest = self._tree.query(places, k=range(1, min(NEAREST, self._tree.n) + 1))
        near = np.take(self._table, nearest.T, axis=1)
        normal = normals.T[:, None]
        offset = near[:3] - places.T[:, None]
        whitening = near[4:].reshape(3, 3, *offset.shape[1:])
        own_offset, own_normal = (whitening * offset).sum(axis=1), (whitening * normal).sum(axis=1)
        # squared distance of the gaussian from the line along the normal, in standard deviations
        along = (own_offset * own_normal).sum(axis=0)
        squared = (own_offset**2).sum(axis=0) - along**2 / (own_normal**2).sum(axis=0)
        order = np.argsort(-(offset * normal).sum(axis=0), axis=0, kind="stable")
        weight = np.take_along_axis(near[3] * np.exp(-squared / 2), order, axis=0)
        weight[1:] *= np.cumprod(1 - weight[:-1], axis=0)
        return np.take_along_axis(nearest.T, order, axis=0), weight
