"""Data sets: sequences of pictures.

A picture is a float32 tensor (3, H, W) in [-1, 1]. `open_dataset` opens one by name or by path:
scenes and sample photographs need no download; DIV2K, AFHQ's cats and any folder are read by
`folders.py`, which says what becomes of bad files; CelebA, LSUN and Flowers102 by torchvision. Any
of them goes into `PatchDataset` and `PairDataset`. What is done to a single picture is in
`images.py`.
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
from arbscale.data.images import load_image, low_high_pair, random_crop, to_tensor
from arbscale.data.scenes import render_scenes, sample_scenes

__all__ = [
    "ContinuousScenes",
    "PairDataset",
    "PatchDataset",
    "TorchvisionPictures",
    "data_root",
    "find_folder",
    "open_dataset",
    "sample_photos",
]

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
    """Procedural landscapes rendered at `size`: item i is always the same picture (3, H, W).

    The three splits are disjoint stretches of the endless sequence that `seed` names.
    """

    def __init__(
        self, count: int = 10_000, size: int | Size = 64, seed: int = 0, split: str = "train"
    ) -> None:
        check_split(split)
        if not 0 < count <= _SCENES_PER_SPLIT:
            raise ValueError(f"count is from 1 to {_SCENES_PER_SPLIT}, got {count}")
        self.count, self.size, self.seed = count, check_size(size), seed
        self.first = SPLITS.index(split) * _SCENES_PER_SPLIT

    def __len__(self) -> int:
        """Return the number of scenes."""
        return self.count

    def __getitem__(self, index: int) -> Tensor:
        """Return picture `index`, (3, H, W) in [-1, 1]."""
        return self.batch(range(self.count)[index], 1)[0]

    def batch(self, start: int, n: int) -> Tensor:
        """Return pictures `start` to `start + n - 1`, (n, 3, H, W): faster than one by one."""
        if not 0 <= start <= start + n <= self.count:
            raise ValueError(
                f"pictures {start} to {start + n - 1} are not all in 0..{self.count - 1}"
            )
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
    """Random crops (3, size, size) of pictures, one of each picture per epoch.

    With `augment` half of them are flipped left to right; with `rotate`, for pictures without an
    upright, they are turned by a random multiple of 90 degrees, too. A crop is a function of the
    seed, the index and `epoch`, so set `epoch` before each pass (persistent workers do not see it).
    """

    def __init__(
        self,
        images: Sequence[Tensor] | Dataset,
        size: int | Size,
        augment: bool = True,
        seed: int = 0,
        rotate: bool = False,
    ) -> None:
        self.images, self.size, self.augment, self.seed = images, check_size(size), augment, seed
        if rotate and self.size[0] != self.size[1]:
            raise ValueError(f"rotate needs a square crop, got {self.size}")
        self.rotate, self.epoch = rotate, 0

    def __len__(self) -> int:
        """Return the number of pictures."""
        return len(self.images)

    def __getitem__(self, index: int) -> Tensor:
        """Return a crop of picture `index`, (3, size, size) in [-1, 1]."""
        index = range(len(self))[index]
        key = np.random.SeedSequence((self.seed, index, self.epoch)).generate_state(1)
        generator = torch.Generator().manual_seed(int(key[0]))
        crop = random_crop(self.images[index], self.size, generator)
        if self.augment and torch.rand((), generator=generator) < 0.5:
            crop = crop.flip(-1)
        if self.rotate:
            crop = crop.rot90(int(torch.randint(4, (), generator=generator)), (-2, -1))
        return crop.contiguous()


class PairDataset(Dataset):
    """Low- and high-resolution pairs of pictures, whole or patches, at any real scale of 1 or more.

    Item i is `low_high_pair(images[i], scale)`: the low picture by antialiased bicubic reduction,
    the high one of exactly `round(scale * low)`.
    """

    def __init__(self, images: Sequence[Tensor] | Dataset, scale: float) -> None:
        self.images, self.scale = images, scale

    def __len__(self) -> int:
        """Return the number of pairs."""
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        """Return pair `index`: (3, h, w) and (3, H, W), in [-1, 1]."""
        return low_high_pair(self.images[range(len(self))[index]], self.scale)


def data_root() -> Path:
    """Return the folder that the environment variable ARBSCALE_DATA names."""
    value = os.environ.get("ARBSCALE_DATA")
    if not value:
        raise FileNotFoundError(
            "ARBSCALE_DATA is not set: `export ARBSCALE_DATA=/folder/with/data`, give the path of "
            "a folder, or use 'scenes' or 'photos', which need no files"
        )
    root = Path(value).expanduser()
    if not root.is_dir():
        raise FileNotFoundError(f"ARBSCALE_DATA names {root}, which is no folder; correct it")
    return root


def open_dataset(
    name: str | Path,
    split: str = "train",
    subset: int | None = None,
    parts: Sequence[float] = (0.8, 0.1, 0.1),
    seed: int = 0,
) -> Sequence[Tensor] | Dataset:
    """Return the pictures of one split of a data set, each (3, H, W) in [-1, 1].

    Parameters
    ----------
    name
        "scenes", "photos"; "celeba", "flowers102" or "lsun_<category>", read by torchvision below
        `data_root()`; a folder, or one below `data_root()`: "div2k" and "afhq_cats" are put there
        by `python -m arbscale download`.
    split
        "train", "val", "test", or "all". Those of a folder are, in this order: the list
        `<split>.txt`, whose paths start at the folder, at its `<split>/` or at its `images/`; its
        sub-folders `train`, `val`, `test` (DIV2K: `DIV2K_train_HR`, `DIV2K_valid_HR`); the lists
        beside the folder; else a seeded partition. Of a folder's "train" a file that turns out
        damaged is replaced by the next; in the others reading it is an error.
    subset
        Keep this many pictures of the split, drawn by the seed; a larger subset holds a smaller.
    parts
        Of the partition: counts such as (800, 100, 100), or fractions.
    seed
        Of the partition and the subset.

    """
    images = _open(name, split, parts, seed)
    if subset is None:
        return images
    if not 1 <= subset <= len(images):
        raise ValueError(f"a subset of {len(images)} pictures has 1 to that many, got {subset}")
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(seed))
    return Subset(images, sorted(order[:subset].tolist()))


def _open(
    name: str | Path, split: str, parts: Sequence[float], seed: int
) -> Sequence[Tensor] | Dataset:
    if name == "scenes":
        return ContinuousScenes(10_000 if split == "train" else 1_000, split=split)
    if name == "photos":
        check_split(split)
        photos = sample_photos()
        held_out = {n: s for s, names in _SAMPLE_SPLITS.items() for n in names}
        return [photo for n, photo in photos.items() if held_out.get(n, "train") == split]
    if isinstance(name, str) and _set_of(name) in _TORCHVISION:
        return TorchvisionPictures(name, split, data_root())
    return open_folder(find_folder(name), split, parts, seed)


def find_folder(name: str | Path) -> Path:
    """Return the folder of that path, or of that name below `data_root()`."""
    root = Path(name).expanduser()
    root = root if root.is_dir() else data_root() / name
    if root.is_dir():
        return root
    hint = {"div2k": "div2k", "afhq_cats": "afhq"}.get(str(name))
    raise FileNotFoundError(
        f"{str(name)!r} is neither the name of a data set, a folder, nor a folder in {data_root()}"
        + (f"; `python -m arbscale download {hint}` fetches it" if hint else "")
    )


class TorchvisionPictures(Dataset):
    """The pictures alone of torchvision's CelebA, Flowers102 or LSUN ("lsun_tower", ...).

    They are looked for where torchvision puts them below `root`: `celeba/`, `flowers-102/`, and
    LSUN's databases `lsun/tower_train_lmdb/`, ... Of LSUN torchvision keeps a list of keys, as a
    pickle, in the current folder and reads it again: work in a folder that is yours.
    """

    def __init__(self, name: str, split: str, root: Path) -> None:
        if split != "all":
            check_split(split)
        splits = [s for s in SPLITS if split in ("all", s)]
        if name.startswith("lsun"):
            splits = [s for s in splits if s != "test"]  # its test pictures have no category
        if not splits:
            raise ValueError(f"{name} has no {split!r}; it has train and val")
        try:
            self.images = ConcatDataset([_torchvision(name, s, root) for s in splits])
        except ImportError as error:
            raise RuntimeError(f"{name} needs a package: pip install {error.name}") from error
        except (RuntimeError, OSError) as error:
            raise FileNotFoundError(
                f"{name} is not in {root}, or not whole ({error}); {_TORCHVISION[_set_of(name)]}"
            ) from error

    def __len__(self) -> int:
        """Return the number of pictures."""
        return len(self.images)

    def __getitem__(self, index: int) -> Tensor:
        """Return picture `index`, (3, H, W) in [-1, 1]."""
        return to_tensor(self.images[range(len(self))[index]][0])


_TORCHVISION = {  # and where they come from
    "celeba": "fetch it with torchvision.datasets.CelebA(ARBSCALE_DATA, download=True)",
    "flowers102": "fetch it with torchvision.datasets.Flowers102(ARBSCALE_DATA, download=True)",
    "lsun": "fetch and unzip it with github.com/fyu/lsun; names are lsun_tower, lsun_bedroom, ...",
}


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
    if not database.is_dir():
        raise FileNotFoundError(f"there is no folder {database}")
    return datasets.LSUN(str(root / "lsun"), [f"{category}_{split}"])
