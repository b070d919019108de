"""Data sets: sequences of pictures.

A picture is a float32 tensor (3, H, W) in [-1, 1]. `ContinuousScenes` and `sample_photos` need no
download; `ImageFolder` opens any folder. What is done to a single picture is in `images.py` and can
be imported from here too.
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from .coords import Size, check_size
from .images import load_image, low_high_pair, random_crop, resize, to_pil, to_tensor, to_uint8
from .scenes import render_scenes, sample_scenes

__all__ = [
    "ContinuousScenes",
    "ImageFolder",
    "PatchDataset",
    "data_root",
    "load_image",
    "low_high_pair",
    "open_dataset",
    "random_crop",
    "resize",
    "sample_photos",
    "to_pil",
    "to_tensor",
]

EXTENSIONS = {".bmp", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp"}
SPLITS = ("train", "val", "test")
CACHE_BYTES = 1 << 30  # decoded pictures that one ImageFolder keeps in memory
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


def _check_split(split: str) -> None:
    if split not in SPLITS:
        raise ValueError(f"a split is one of {', '.join(SPLITS)}, got {split!r}")


class ContinuousScenes(Dataset):
    """Procedural landscapes rendered at `size`: item i is always the same picture (3, H, W).

    The three splits are disjoint stretches of the endless sequence that `seed` names.
    """

    def __init__(
        self, count: int = 10_000, size: int | Size = 64, seed: int = 0, split: str = "train"
    ) -> None:
        _check_split(split)
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


class ImageFolder(Dataset):
    """Every picture below a folder, or those of a split list, in sorted or in listed order.

    `split_list` is a text file with one path relative to the folder per line. Item i is (3, H, W)
    in [-1, 1], of 8 bits. Decoded pictures stay in memory up to `CACHE_BYTES`.
    """

    def __init__(self, root: str | Path, split_list: str | Path | None = None) -> None:
        root = Path(root).expanduser()
        if not root.is_dir():
            raise FileNotFoundError(f"there is no folder {root}; check the path")
        if split_list is None:
            found = (p for p in root.rglob("*") if p.suffix.lower() in EXTENSIONS and p.is_file())
            visible = (p for p in found if not p.name.startswith("."))
            self.paths = sorted(visible, key=lambda p: p.relative_to(root).as_posix())
        else:
            self.paths = _listed(root, Path(split_list).expanduser())
        if not self.paths:
            raise ValueError(
                f"no picture in {split_list or root}; wanted files ending in "
                f"{', '.join(sorted(EXTENSIONS))}"
            )
        self.root = root
        self._cache: dict[int, Tensor] = {}
        self._cached_bytes = 0

    def __len__(self) -> int:
        """Return the number of pictures."""
        return len(self.paths)

    def __getitem__(self, index: int) -> Tensor:
        """Return picture `index`, (3, H, W) in [-1, 1]."""
        index = range(len(self))[index]
        pixels = self._cache.get(index)
        if pixels is None:
            pixels = to_uint8(load_image(self.paths[index]))
            if self._cached_bytes + pixels.numel() <= CACHE_BYTES:
                self._cache[index] = pixels
                self._cached_bytes += pixels.numel()
        return to_tensor(pixels)


def _listed(root: Path, split_list: Path) -> list[Path]:
    """Return the files that a split list names; errors name the first bad line."""
    if not split_list.is_file():
        raise FileNotFoundError(f"there is no split list {split_list}; check the path")
    lines = split_list.read_text(encoding="utf-8-sig").splitlines()
    names = [line.strip() for line in lines if line.strip()]
    for name in names:
        if Path(name).is_absolute() or ".." in Path(name).parts:
            raise ValueError(f"{split_list} names {name!r}; wanted paths inside {root}")
        if not (root / name).is_file():
            raise FileNotFoundError(f"{split_list} names {name!r}, which {root} does not hold")
    return [root / name for name in names]


class PatchDataset(Dataset):
    """Random crops (3, size, size) of pictures, one of each picture per epoch.

    With `augment` half of them are flipped left to right. A crop is a function of the seed, the
    index and `epoch`, so set `epoch` before each pass (persistent workers do not see it).
    """

    def __init__(
        self, images: Sequence[Tensor] | Dataset, size: int, augment: bool = True, seed: int = 0
    ) -> None:
        self.images, self.size, self.augment, self.seed = images, check_size(size), augment, seed
        self.epoch = 0

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
        return crop.contiguous()


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


def open_dataset(name: str | Path, split: str = "train") -> Sequence[Tensor] | Dataset:
    """Return the pictures of one split of "scenes", "photos" or a folder, each (3, H, W).

    A folder is a path, or relative to `data_root()`. Its splits are, in this order: the list
    `<split>.txt`, whose paths start at the folder, at its `<split>/` or at its `images/`; DIV2K's
    `DIV2K_train_HR` and `DIV2K_valid_HR`; else a seeded 80/10/10 partition. "all" is every picture.
    """
    if name in ("scenes", "photos"):
        _check_split(split)
        if name == "scenes":
            return ContinuousScenes(10_000 if split == "train" else 1_000, split=split)
        photos = sample_photos()
        held_out = {n: s for s, names in _SAMPLE_SPLITS.items() for n in names}
        return [photo for n, photo in photos.items() if held_out.get(n, "train") == split]
    root = Path(name).expanduser()
    root = root if root.is_dir() else data_root() / name
    if not root.is_dir():
        raise FileNotFoundError(
            f"{str(name)!r} is neither 'scenes', 'photos', a folder, nor a folder in {data_root()}"
        )
    if split == "all":
        return ImageFolder(root)
    split_list = root / f"{split}.txt"
    if split_list.is_file():
        first = split_list.read_text(encoding="utf-8-sig").partition("\n")[0].strip()
        places = [p for p in (root, root / split, root / "images") if (p / first).is_file()]
        return ImageFolder(places[0] if first and places else root, split_list)
    lists = [s for s in SPLITS if (root / f"{s}.txt").is_file()]
    if lists:
        raise FileNotFoundError(f"{root} has no {split}.txt; it has lists for {', '.join(lists)}")
    _check_split(split)
    div2k = {"train": root / "DIV2K_train_HR", "val": root / "DIV2K_valid_HR"}
    if any(folder.is_dir() for folder in div2k.values()):
        if split not in div2k:
            raise ValueError("DIV2K's test originals were never published; use its 'val'")
        return ImageFolder(div2k[split])
    return _partition(ImageFolder(root), split)


def _partition(images: ImageFolder, split: str) -> ImageFolder:
    """Keep one part of a folder: a tenth for val, a tenth for test, the rest for train."""
    n = len(images)
    tenth = max(1, n // 10)
    if n < 3:
        raise ValueError(f"{n} pictures in {images.root} cannot be split in three; use split='all'")
    order = torch.randperm(n, generator=torch.Generator().manual_seed(0)).tolist()
    parts = {"val": order[:tenth], "test": order[tenth : 2 * tenth], "train": order[2 * tenth :]}
    images.paths = [images.paths[i] for i in sorted(parts[split])]
    return images
