"""Data sets by name: sequences of images, each a float32 tensor (3, H, W) in [-1, 1].

Scenes and sample photographs need no download. DIV2K, AFHQ's cats and any folder are read by
`folders.py`, which lists what happens to bad files; CelebA, LSUN and Flowers102 by torchvision.
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import ConcatDataset, Dataset, Subset

from arbscale.coords import Size, check_size
from arbscale.data.folders import SPLITS, check_split, open_folder
from arbscale.data.images import load_image, to_tensor, training_crop
from arbscale.data.scenes import render_scenes, sample_scenes
from arbscale.store import InputError, StateError

_SCENES_PER_SPLIT = 1 << 28
_SAMPLE_PHOTOS = {
    "astronaut": "astronaut.png",
    "cat": "chelsea.png",
    "coffee": "coffee.png",
    "galaxies": "hubble_deep_field.jpg",
    "motorcycle": "motorcycle_left.png",
    "retina": "retina.jpg",
    "rocket": "rocket.jpg",
    "tissue": "ihc.png",
}
_SAMPLE_SPLITS = {"val": ("coffee", "rocket"), "test": ("astronaut", "cat")}


class ContinuousScenes(Dataset):
    """Procedural landscapes rendered at `size`: item i is always the same image (3, H, W).

    The three splits are disjoint ranges of the endless sequence that `seed` names.
    """

    def __init__(
        self, count: int = 10_000, size: int | Size = 64, seed: int = 0, split: str = "train"
    ) -> None:
        check_split(split)
        if not 0 < count <= _SCENES_PER_SPLIT:
            raise InputError(f"count is from 1 to {_SCENES_PER_SPLIT}, got {count}")
        self.count, self.size, self.seed = count, check_size(size), seed
        self.first = SPLITS.index(split) * _SCENES_PER_SPLIT

    def __len__(self) -> int:
        """Return the number of scenes."""
        return self.count

    def __getitem__(self, index: int) -> Tensor:
        """Return image `index`, (3, H, W) in [-1, 1]."""
        return self.batch(range(self.count)[index], 1)[0]

    def batch(self, start: int, n: int) -> Tensor:
        """Return images `start` to `start + n - 1`, (n, 3, H, W): faster than one by one."""
        if not 0 <= start <= start + n <= self.count:
            raise InputError(f"images {start} to {start + n - 1} are not in 0..{self.count - 1}")
        return render_scenes(sample_scenes(n, self.seed, self.first + start), self.size)


def sample_photos() -> dict[str, Tensor]:
    """Return the colour photographs inside scikit-image's wheel, by name; nothing is downloaded.

    Raises FileNotFoundError where scikit-image or all of its photographs are missing.
    """
    spec = importlib.util.find_spec("skimage")
    folder = Path(spec.submodule_search_locations[0]) / "data" if spec else Path()
    paths = {name: folder / file for name, file in _SAMPLE_PHOTOS.items()}
    photos = {name: load_image(path) for name, path in paths.items() if path.is_file()}
    if not photos:
        raise FileNotFoundError("scikit-image's photographs are missing: pip install scikit-image")
    return photos


class PatchDataset(Dataset):
    """Random crops (3, *size) of images, one of each image per epoch, half of them flipped.

    A crop is a function of the seed, the index and `epoch`, so set `epoch` before each pass
    (persistent workers do not see it).
    """

    def __init__(self, images: Sequence[Tensor] | Dataset, size: int | Size, seed: int = 0) -> None:
        self.images, self.size, self.seed, self.epoch = images, check_size(size), seed, 0

    def __len__(self) -> int:
        """Return the number of images."""
        return len(self.images)

    def __getitem__(self, index: int) -> Tensor:
        """Return a crop of image `index`, (3, *size) in [-1, 1]."""
        index = range(len(self))[index]
        key = np.random.SeedSequence((self.seed, index, self.epoch)).generate_state(1)
        return training_crop(self.images[index], self.size, int(key[0]))


def data_root(variable: str = "ARBSCALE_DATA") -> Path:
    """Return the folder that an environment variable names; FileNotFoundError where it does not."""
    value = os.environ.get(variable, "")
    root = Path(os.path.expanduser(value))
    if not value or not root.is_dir():
        hint = f"`export {variable}=/an/existing/folder`, or name a folder yourself"
        raise FileNotFoundError(f"{variable} is {value!r}, not a folder: {hint}")
    return root


def open_dataset(
    name: str | Path,
    split: str = "train",
    subset: int | None = None,
    parts: Sequence[float] = (0.8, 0.1, 0.1),
    seed: int = 0,
) -> Sequence[Tensor] | Dataset:
    """Return the images of one split of a data set, each (3, H, W) in [-1, 1].

    Parameters
    ----------
    name
        "scenes" or "photos", which need no files; "celeba", "flowers102" or "lsun_<category>", read
        by torchvision below `data_root()`; a folder, or one below `data_root()`: "div2k" and
        "afhq_cats" are put there by `python -m arbscale download`.
    split
        "train", "val", "test", or "all". A folder is split by the first of these that it has: the
        list `<split>.txt`, whose paths start at the folder, at its `<split>/` or at its `images/`;
        sub-folders `train`, `val`, `test` (DIV2K: `DIV2K_train_HR`, `DIV2K_valid_HR`); the lists
        beside the folder; else a seeded partition. In a folder's "train" split, a file that turns
        out damaged is replaced by the next; in the others reading it is an error.
    subset
        Keep this many images of the split, drawn by the seed; a larger subset contains a smaller.
    parts
        Of the partition: counts such as (800, 100, 100), or fractions.
    seed
        Of the partition and the subset.

    """
    images = _open(name, split, parts, seed)
    if subset is None:
        return images
    if not 1 <= subset <= len(images):
        raise InputError(f"a subset of {len(images)} images has 1 to that many, got {subset}")
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(seed))
    return Subset(images, sorted(order[:subset].tolist()))


def _open(
    name: str | Path, split: str, parts: Sequence[float], seed: int
) -> Sequence[Tensor] | Dataset:
    if name == "scenes" and split == "all":
        return ConcatDataset([_open(name, s, parts, seed) for s in SPLITS])
    if name == "scenes":
        return ContinuousScenes(10_000 if split == "train" else 1_000, split=split)
    if name == "photos":
        photos = sample_photos()
        if split == "all":
            return list(photos.values())
        check_split(split)
        held_out = {n: s for s, names in _SAMPLE_SPLITS.items() for n in names}
        return [photo for n, photo in photos.items() if held_out.get(n, "train") == split]
    if isinstance(name, str) and _set_of(name) in _TORCHVISION:
        return _open_torchvision(name, split, data_root())
    return open_folder(find_folder(name), split, parts, seed)


def find_folder(name: str | Path) -> Path:
    """Return the folder of that path, or of that name below `data_root()`; FileNotFoundError."""
    value = os.environ.get("ARBSCALE_DATA", "")
    for path in (name, os.path.join(value, name)):
        if (root := Path(os.path.expanduser(path))).is_dir():
            return root
    download = {"div2k": "div2k", "afhq_cats": "afhq"}.get(str(name))
    hint = f"; `python -m arbscale download {download}` fetches it" if download else ""
    place = f"here or below ARBSCALE_DATA, {value!r}"
    raise FileNotFoundError(f"{str(name)!r} is neither a data set nor a folder {place}{hint}")


_TORCHVISION = {  # and how to get them
    "celeba": "fetch it with torchvision.datasets.CelebA(ARBSCALE_DATA, download=True)",
    "flowers102": "fetch it with torchvision.datasets.Flowers102(ARBSCALE_DATA, download=True)",
    "lsun": "fetch and unzip it with github.com/fyu/lsun; names are lsun_tower, lsun_bedroom, ...",
}


class _ImagesAlone(Dataset):
    """The images (3, H, W) in [-1, 1] of a data set of pairs (PIL image, target)."""

    def __init__(self, pairs: Dataset) -> None:
        self.pairs = pairs

    def __len__(self) -> int:
        return len(self.pairs)

    def __getitem__(self, index: int) -> Tensor:
        return to_tensor(self.pairs[range(len(self))[index]][0])


def _open_torchvision(name: str, split: str, root: Path) -> Dataset:
    """Open torchvision's CelebA, Flowers102 or LSUN ("lsun_tower", ...).

    They are read from where torchvision puts them below `root`: `celeba/`, `flowers-102/`, and
    LSUN's databases `lsun/tower_train_lmdb/`, ... For LSUN, torchvision keeps a list of keys, as a
    pickle, in the current folder and reads it again: work in a folder that you own.
    """
    if split != "all":
        check_split(split)
    splits = [s for s in SPLITS if split in ("all", s)]
    if name.startswith("lsun"):
        splits = [s for s in splits if s != "test"]  # its test images have no category
    if not splits:
        raise InputError(f"{name} has no {split!r}; it has train and val")
    try:
        return _ImagesAlone(ConcatDataset([_torchvision(name, s, root) for s in splits]))
    except ImportError as error:
        raise StateError(f"{name} needs a package: pip install {error.name}") from error
    except (RuntimeError, OSError) as error:
        hint = _TORCHVISION[_set_of(name)]
        raise FileNotFoundError(f"{name} is not whole in {root} ({error}); {hint}") from error


def _set_of(name: str) -> str:
    """Return the key in `_TORCHVISION`; a folder may still be called celeba_hq."""
    return "lsun" if name == "lsun" or name.startswith("lsun_") else name


def _torchvision(name: str, split: str, root: Path) -> Dataset:
    from torchvision import datasets

    if name == "celeba":
        return datasets.CelebA(root, "valid" if split == "val" else split, target_type=[])
    if name == "flowers102":
        return datasets.Flowers102(root, split)
    category = name.removeprefix("lsun_")
    database = root / "lsun" / f"{category}_{split}_lmdb"
    if not database.is_dir():  # lmdb would make it
        raise FileNotFoundError(f"there is no folder {database}")
    return datasets.LSUN(str(root / "lsun"), [f"{category}_{split}"])
