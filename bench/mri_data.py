"""Real input: the ICBM152 head that nilearn ships, corrupted, with its tissue labels."""

from typing import NamedTuple

import numpy as np
import torch
from nilearn.datasets import (
    load_mni152_gm_template,
    load_mni152_template,
    load_mni152_wm_template,
)
from scipy.ndimage import gaussian_filter
from torch import Tensor

TISSUES = ("CSF", "grey matter", "white matter")
OUTSIDE = -1

_NOISE = 0.1  # standard deviation, in units of the brightest voxel
_BIAS, _BIAS_MM = 0.15, 25.0  # log-amplitude and smoothness of the bias field
_TEST = (0.45, 0.65)  # of the head's height
_GAP_MM = 8.0


class Slices(NamedTuple):
    """Axial slices: corrupted and clean T1 [n, 1, H, W] (zero outside the head), tissue [n, H, W]
    (index into TISSUES, or OUTSIDE)."""

    image: Tensor
    clean: Tensor
    label: Tensor


def load(resolution: int, multiple: int, seed: int = 0) -> tuple[Slices, Slices]:
    """Slices for training and for testing, `resolution` mm apart; H and W are padded to multiples
    of `multiple`.

    The test slices are a slab around the middle of the head; a gap on both sides keeps it apart
    from those for training. (Left and right of this template are mirror images, so they would
    not do as training and test.)
    """
    loaders = (load_mni152_template, load_mni152_gm_template, load_mni152_wm_template)
    # Every resolution-th voxel of the 1 mm volumes: interpolation would ring around the head, and
    # T1 > 0 would no longer tell where it is.
    t1, grey, white = (loader(resolution=1).get_fdata(dtype=np.float32) for loader in loaders)
    box = tuple(slice(i.min(), i.max() + 1, resolution) for i in np.nonzero(t1))
    t1, grey, white = t1[box], grey[box], white[box]
    inside = t1 > 0
    label = np.where(inside, np.argmax([1 - grey - white, grey, white], axis=0), OUTSIDE)
    clean = t1 / t1.max()

    random = np.random.default_rng(seed)
    field = gaussian_filter(random.standard_normal(t1.shape), _BIAS_MM / resolution)
    bias = np.exp(_BIAS * (field - field.mean()) / field.std())
    image = np.where(inside, clean * bias + _NOISE * random.standard_normal(t1.shape), 0)

    heights, gap = np.arange(t1.shape[2]), round(_GAP_MM / resolution)
    low, high = (round(f * len(heights)) for f in _TEST)
    test = heights[low:high]
    train = np.concatenate([heights[: low - gap], heights[high + gap :]])

    pad = [(0, -size % multiple) for size in t1.shape[:2]]

    def slices(volume, at, outside):
        axial = np.pad(volume, (*pad, (0, 0)), constant_values=outside)[:, :, at]
        return torch.from_numpy(np.ascontiguousarray(axial.transpose(2, 0, 1)))

    return tuple(
        Slices(
            slices(image, at, 0).float().unsqueeze(1),
            slices(clean, at, 0).float().unsqueeze(1),
            slices(label, at, OUTSIDE).long(),
        )
        for at in (train, test)
    )


def dice(predicted: Tensor, label: Tensor) -> list[float]:
    """Dice overlap of each tissue over all voxels inside the head; both are [n, H, W]."""
    inside = label != OUTSIDE
    scores = []
    for tissue in range(len(TISSUES)):
        p, t = (predicted == tissue) & inside, label == tissue
        scores.append((2 * (p & t).sum() / (p.sum() + t.sum())).item())
    return scores


def two_thresholds(
    train_image: Tensor, train_label: Tensor, test_image: Tensor, test_label: Tensor
) -> list[float]:
    """Dice of each tissue when two thresholds on the brightness tell the tissues apart, the two
    that give the best mean Dice on the training slices."""
    train_image, test_image = train_image[:, 0], test_image[:, 0]
    bins = 256
    inside = train_label != OUTSIDE
    edges = torch.linspace(*train_image[inside].aminmax(), bins + 1)
    counts = torch.stack(
        [torch.histogram(train_image[train_label == t], edges).hist for t in range(len(TISSUES))]
    )
    below = torch.nn.functional.pad(counts.cumsum(1), (1, 0))  # [tissue, edge]
    total = below[:, -1]
    # [first edge, second edge]: voxels of the tissue, and all voxels, between the thresholds
    zero = torch.zeros(bins + 1, bins + 1)
    first, second = below[:, :, None] + zero, below[:, None, :] + zero
    ranges = (first, second - first, total[:, None, None] - second)
    score = sum(
        2 * between[t] / (between.sum(0) + total[t]) for t, between in enumerate(ranges)
    ).triu()
    i, j = divmod(int(score.argmax()), bins + 1)
    return dice((test_image >= edges[i]).long() + (test_image >= edges[j]).long(), test_label)
