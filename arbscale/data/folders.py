"""Folders of pictures: what is found in them, in which split, and what is done with bad files.

| file | decision |
| --- | --- |
| BMP, GIF, JPEG, PNG, TIFF, WebP, found by its ending | used; the content decides, not the ending |
| greyscale, palette, CMYK, YCbCr | converted to RGB; colour profiles are not applied |
| 16 bits (grey, RGB) | converted to 8 bits |
| transparency | laid on white |
| EXIF orientation | turned upright; a damaged tag is ignored |
| animated, several pages | the first frame |
| a name in any script, or of bytes that are no text | used |
| a linked file | used; a linked folder is not entered, so no loop is endless |
| empty, no picture, damaged header, no permission | skipped with a counted warning |
| over `images.MAX_PIXELS` (a decompression bomb) | skipped so, before it is decoded |
| truncated, damaged (as far as the decoder notices), floats, over | when it is read: refused with |
| 16 bits, deleted after listing | ValueError or FileNotFoundError; for training (`substitute`) |
| | skipped with a counted warning, the next picture is taken instead |
| named in a split list and not there | the list is refused with FileNotFoundError |
| hidden, a folder named like a picture, a broken or circular link, a pipe | not looked at |

`python -m arbscale check FOLDER` reads every file and prints what becomes of it.
"""

from __future__ import annotations

import hashlib
import os
import warnings
from collections.abc import Sequence
from itertools import chain
from pathlib import Path

from torch import Tensor
from torch.utils.data import Dataset
from tqdm.auto import tqdm

from arbscale.data.images import load_image, open_image, reason, to_tensor, to_uint8

EXTENSIONS = {".bmp", ".gif", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp"}
SPLITS = ("train", "val", "test")
CACHE_BYTES = 1 << 30  # decoded pictures that one ImageFolder keeps in memory
_MANY = 10_000  # files whose headers take seconds: a bar is shown
_SUBFOLDERS = {  # of a data set that comes split
    "train": ("train", "DIV2K_train_HR"),
    "val": ("val", "valid", "validation", "DIV2K_valid_HR"),
    "test": ("test",),
}


class ImageFolder(Dataset):
    """Every picture below a folder, or those of a split list, in sorted or in listed order.

    `split_list` is a text file with one path relative to the folder per line, or these paths
    themselves. Item i is (3, H, W) in [-1, 1], of 8 bits. Decoded pictures stay in memory up to
    `CACHE_BYTES`. Opening reads every header: files that cannot be pictures are left out of `paths`
    and kept, with the reason, in `skipped`. With `substitute`, for training, a file that turns out
    damaged when it is read is replaced by the next one; else reading it raises ValueError.
    """

    def __init__(
        self,
        root: str | Path,
        split_list: str | Path | Sequence[str] | None = None,
        substitute: bool = False,
    ) -> None:
        root = Path(root).expanduser()
        if not root.is_dir():
            raise FileNotFoundError(f"there is no folder {root}; check the path")
        if split_list is None:
            names: Sequence[str] = scan_folder(root)[0]
        elif isinstance(split_list, (str, Path)):
            names = read_split_list(root, Path(split_list).expanduser())
        else:
            names = split_list
        self.root, self.substitute = root, substitute
        self.skipped: dict[Path, str] = {}
        bar = tqdm(names, desc="opening", unit="file", disable=len(names) < _MANY)
        self.paths = [path for path in (root / name for name in bar) if self._is_usable(path)]
        if self.skipped:
            self._warn("skipped when the folder was opened")
        if not self.paths:
            raise ValueError(
                f"no picture in {root}: none of {len(names)} files can be used; wanted files "
                f"ending in {', '.join(sorted(EXTENSIONS))}"
            )
        self._cache: dict[int, Tensor] = {}
        self._cached_bytes = 0

    def __len__(self) -> int:
        """Return the number of pictures."""
        return len(self.paths)

    def __getitem__(self, index: int) -> Tensor:
        """Return picture `index`, (3, H, W) in [-1, 1]."""
        first = range(len(self))[index]
        for index in chain(range(first, len(self)), range(first)):
            if self.paths[index] in self.skipped:
                continue
            try:
                return to_tensor(self._pixels(index))
            except (ValueError, FileNotFoundError) as error:
                if not self.substitute:
                    hint = f"`python -m arbscale check {self.root}` lists all such files"
                    raise type(error)(f"{error}; {hint}") from error
                self.skipped[self.paths[index]] = _why(error)
                self._warn("skipped, replaced by the next picture")
        raise ValueError(f"no picture in {self.root} can be read any more; is it still there?")

    def _pixels(self, index: int) -> Tensor:
        pixels = self._cache.get(index)
        if pixels is None:
            pixels = to_uint8(load_image(self.paths[index]))
            if self._cached_bytes + pixels.numel() <= CACHE_BYTES:
                self._cache[index] = pixels
                self._cached_bytes += pixels.numel()
        return pixels

    def _is_usable(self, path: Path) -> bool:
        try:
            with open_image(path):
                return True
        except (ValueError, FileNotFoundError) as error:
            self.skipped[path] = _why(error)
            return False

    def _warn(self, what: str) -> None:
        path, why = list(self.skipped.items())[-1]
        warnings.warn(
            f"{self.root}: {len(self.skipped)} unreadable so far, {what}; the last is {path.name} "
            f"({why}); `python -m arbscale check {self.root}` lists all",
            stacklevel=3,
        )


def _why(error: Exception) -> str:
    return reason(error.__cause__) if error.__cause__ else "no longer there"


def scan_folder(root: Path) -> tuple[list[str], list[tuple[str, str]]]:
    """Return the names of all picture files below a folder, sorted, and what else is there and why.

    Names are relative, with forward slashes. Linked folders are not entered; hidden ones neither.
    """
    names: list[str] = []
    passed: list[tuple[str, str]] = []

    def closed(error: OSError) -> None:
        passed.append((_relative(root, error.filename), "a folder that cannot be listed"))

    for folder, folders, files in os.walk(root, onerror=closed):
        for name in folders:
            if name.startswith("."):
                passed.append((_relative(root, folder, name), "a hidden folder"))
            elif os.path.islink(os.path.join(folder, name)):
                passed.append((_relative(root, folder, name), "a linked folder"))
        folders[:] = [name for name in folders if not name.startswith(".")]
        for name in files:
            why = _passed_over(os.path.join(folder, name))
            if why:
                passed.append((_relative(root, folder, name), why))
            else:
                names.append(_relative(root, folder, name))
    return sorted(names), sorted(passed)


def _relative(root: Path, *parts: str) -> str:
    return Path(*parts).relative_to(root).as_posix()


def _passed_over(path: str) -> str | None:
    """Return why a file is not looked at, or None."""
    name = os.path.basename(path)
    if name.startswith("."):
        return "a hidden file"
    if os.path.splitext(name)[1].lower() not in EXTENSIONS:
        return "no picture by its ending"
    return None if os.path.isfile(path) else "a broken link or no ordinary file"


def read_split_list(root: Path, split_list: Path) -> list[str]:
    """Return the names in a split list; errors name the first line that is bad."""
    names = _lines(split_list)
    for name in names:
        if Path(name).is_absolute() or ".." in Path(name).parts:
            raise ValueError(f"{split_list} names {name!r}; wanted paths inside {root}")
        if not os.path.isfile(root / name):
            raise FileNotFoundError(f"{split_list} names {name!r}, which {root} does not hold")
    if not names:
        raise ValueError(f"{split_list} names no picture; wanted one path per line")
    return names


def _lines(split_list: Path) -> list[str]:
    if not split_list.is_file():
        raise FileNotFoundError(f"there is no split list {split_list}; check the path")
    # A file name may be bytes that are no text, so a list of them may be, too.
    text = split_list.read_text(encoding="utf-8-sig", errors="surrogateescape")
    # Not splitlines(): some of what it takes for the end of a line may be part of a name.
    names = [line.strip(" \t\r") for line in text.split("\n")]
    return [name for name in names if name]


def open_folder(
    root: Path, split: str, parts: Sequence[float] = (0.8, 0.1, 0.1), seed: int = 0
) -> ImageFolder:
    """Return one split of a folder, as `data.open_dataset` describes it."""
    substitute = split == "train"  # a training goes on; a measurement must not
    if split == "all":
        return ImageFolder(root)
    if (root / f"{split}.txt").is_file():
        return _open_listed(root, root / f"{split}.txt", substitute)
    lists = [s for s in SPLITS if (root / f"{s}.txt").is_file()]
    if lists:
        raise FileNotFoundError(f"{root} has no {split}.txt; it has lists for {', '.join(lists)}")
    check_split(split)
    folders = {s: root / n for s in SPLITS for n in _SUBFOLDERS[s] if (root / n).is_dir()}
    if "train" in folders or (root / "DIV2K_valid_HR").is_dir():
        if split not in folders:
            raise ValueError(
                f"{root} has no pictures for {split!r}, only for {', '.join(folders)} (the test "
                "originals of DIV2K were never published; use 'val')"
            )
        return ImageFolder(folders[split], None, substitute)
    names = scan_folder(root)[0]
    beside = {s: _held(names, root.parent / f"{s}.txt") for s in SPLITS}
    if not any(beside.values()):
        return ImageFolder(root, partition(names, split, parts, seed), substitute)
    if not beside[split]:
        raise ValueError(f"{root.parent / split}.txt names none of the pictures in {root}")
    return ImageFolder(root, beside[split], substitute)


def check_split(split: str) -> None:
    """Raise ValueError for anything but the three splits."""
    if split not in SPLITS:
        raise ValueError(f"a split is one of {', '.join(SPLITS)}, got {split!r}")


def _open_listed(root: Path, split_list: Path, substitute: bool) -> ImageFolder:
    """Open a list whose paths start at the folder, at its `<split>/`, or at its `images/`."""
    first = next(iter(_lines(split_list)), None)
    places = [p for p in (root, root / split_list.stem, root / "images") if first]
    held = [p for p in places if os.path.isfile(p / str(first))]
    return ImageFolder(held[0] if held else root, split_list, substitute)


def _held(names: list[str], split_list: Path) -> list[str]:
    """Return those names that a split list has, too."""
    if not split_list.is_file():
        return []
    listed = set(_lines(split_list))
    return [name for name in names if name in listed]


def partition(
    names: Sequence[str], split: str, parts: Sequence[float] = (0.8, 0.1, 0.1), seed: int = 0
) -> list[str]:
    """Return one of three parts of a list of names, the same on every machine.

    The order is that of a hash of seed and name, so a name that comes or goes moves few others.
    `parts` for train, val and test are counts (three integers) or fractions; val and test get at
    least one picture each, unless their fraction is 0. What is left over is not used.
    """
    check_split(split)
    counts = dict(zip(SPLITS, _counts(len(names), parts), strict=True))
    if not counts[split]:
        raise ValueError(f"parts={tuple(parts)} leaves no picture for {split!r}")
    order = sorted(names, key=lambda name: _hash(f"{seed}/{name}"))
    start = {"val": 0, "test": counts["val"], "train": counts["val"] + counts["test"]}[split]
    return sorted(order[start : start + counts[split]])


def _hash(text: str) -> bytes:
    return hashlib.sha256(text.encode("utf-8", "surrogateescape")).digest()


def _counts(n: int, parts: Sequence[float]) -> tuple[int, int, int]:
    train, val, test = parts
    if all(isinstance(part, int) for part in parts):
        if min(parts) < 0 or sum(parts) > n:
            raise ValueError(f"parts={tuple(parts)} of a folder of {n} pictures; take fewer")
        return int(train), int(val), int(test)
    if min(parts) < 0 or sum(parts) > 1 + 1e-9:
        raise ValueError(f"parts={tuple(parts)}; wanted three counts, or fractions up to 1 in sum")
    if n < 3:
        raise ValueError(f"{n} pictures cannot be split in three; use split='all'")
    held_out = [max(1, int(n * part + 1e-9)) if part else 0 for part in (val, test)]
    wanted = n if sum(parts) > 1 - 1e-9 else int(n * sum(parts) + 1e-9)
    return max(0, wanted - sum(held_out)), held_out[0], held_out[1]
