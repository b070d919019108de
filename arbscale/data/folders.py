"""Folders of images: which files are found, in which split, and what happens to bad ones.

| file | decision |
| --- | --- |
| BMP, GIF, JPEG, PNG, TIFF, WebP, found by its ending | used; the content decides, not the ending |
| any mode, depth, colour profile, transparency, orientation | converted as `pixels.py` says |
| animated, several pages | the first frame |
| a name in any script, or of bytes that are not text | used |
| a linked file | used; a linked folder is not entered, so loops cannot occur |
| empty, not an image, damaged header, no permission | skipped with a counted warning |
| over `images.MAX_PIXELS` (a decompression bomb) | skipped with a warning, before it is decoded |
| a PNG with over 1 MB of text or profile | the pixels are used, text and profile ignored |
| truncated, damaged, of values refused by `pixels.py`, deleted after listing | see below |
| named in a split list but missing | the list is refused with FileNotFoundError |
| hidden, a folder named like an image, a broken or circular link, a pipe | passed over |

What is found broken only when it is read raises ValueError or FileNotFoundError; in training it is
skipped with a counted warning, and the next image takes its place.

`python -m arbscale check FOLDER` reads every file and prints what happens to it.
"""

from __future__ import annotations

import hashlib
import os
import warnings
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

from torch import Tensor
from torch.utils.data import Dataset, Subset
from tqdm.auto import tqdm

from arbscale.coords import Size
from arbscale.data.images import load_pixels, open_image, open_upright, reason, to_tensor
from arbscale.store import InputError

EXTENSIONS = {".bmp", ".gif", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp"}
SPLITS = ("train", "val", "test")
SHOWN = 5  # names printed of each group
CACHE_BYTES = 1 << 30  # decoded images that one ImageFolder keeps in memory
_MANY = 10_000  # files whose headers take seconds: a bar is shown
_SUBFOLDERS = {  # of a data set that comes split
    "train": ("train", "DIV2K_train_HR"),
    "val": ("val", "valid", "validation", "DIV2K_valid_HR"),
    "test": ("test",),
}


class ImageFolder(Dataset):
    """Every image below a folder, or those of a split list, in sorted or in listed order.

    `split_list` is a text file with one path relative to the folder per line, or these paths
    themselves. Item i is (3, H, W) in [-1, 1], of 8 bits. Decoded images stay in memory up to
    `CACHE_BYTES`. Opening reads every header: files that cannot be images are left out of `paths`
    and kept, with the reason, in `skipped`. With `substitute`, for training, a file that turns out
    damaged when it is read is replaced by the next one; else reading it raises ValueError.
    """

    def __init__(
        self,
        root: str | Path,
        split_list: str | Path | Sequence[str] | None = None,
        substitute: bool = False,
    ) -> None:
        self.root, self.substitute = Path(root).expanduser(), substitute
        if not self.root.is_dir():
            raise FileNotFoundError(f"there is no folder {root}; check the path")
        if split_list is None:
            names: Sequence[str] = scan_folder(self.root)[0]
        elif isinstance(split_list, (str, Path)):
            names = read_split_list(self.root, Path(split_list).expanduser())
        else:
            names = split_list
        self.skipped: dict[Path, str] = {}
        bar = tqdm(names, desc="opening", unit="file", disable=len(names) < _MANY)
        self.paths = [path for path in (self.root / name for name in bar) if self._is_usable(path)]
        if self.skipped:
            self._warn("skipped when the folder was opened")
        if not self.paths:
            raise InputError(
                f"no image in {root}: none of {len(names)} files can be used; wanted files "
                f"ending in {', '.join(sorted(EXTENSIONS))}"
            )
        self._cache: dict[int, Tensor] = {}
        self._cached_bytes = 0

    def __len__(self) -> int:
        """Return the number of images."""
        return len(self.paths)

    def __getitem__(self, index: int) -> Tensor:
        """Return image `index`, (3, H, W) in [-1, 1]."""
        first = range(len(self))[index]
        for index in chain(range(first, len(self)), range(first)):
            path = self.paths[index]
            if path in self.skipped:
                continue
            try:
                return to_tensor(self._pixels(index))
            except (InputError, FileNotFoundError) as error:
                if not self.substitute:
                    hint = f"`python -m arbscale check {self.root}` lists all such files"
                    raise type(error)(f"{error}; {hint}") from error
                self.skipped[path] = reason(error.__cause__ or error)
                self._warn("replaced by the next image")
        raise InputError(f"no image in {self.root} can be read any more; is it still there?")

    def _pixels(self, index: int) -> Tensor:
        pixels = self._cache.get(index)
        if pixels is None:
            pixels = load_pixels(self.paths[index])
            if self._cached_bytes + pixels.numel() <= CACHE_BYTES:
                self._cache[index] = pixels
                self._cached_bytes += pixels.numel()
        return pixels

    def _is_usable(self, path: Path) -> bool:
        try:
            with open_image(path):
                return True
        except (InputError, FileNotFoundError) as error:
            self.skipped[path] = reason(error.__cause__ or error)
            return False

    def _warn(self, what: str) -> None:
        path, why = list(self.skipped.items())[-1]
        warnings.warn(
            f"{self.root}: {len(self.skipped)} unreadable so far, {what}; the last is {path.name} "
            f"({why}); `python -m arbscale check {self.root}` lists all",
            stacklevel=3,
        )


def image_files(images: Any) -> list[tuple[str, int, int]] | None:
    """Return images' files by name, length and time of change; None where there are no files."""
    if isinstance(images, Subset):
        files = image_files(images.dataset)
        return files and [files[i] for i in images.indices]
    if not hasattr(images, "paths"):
        return None
    stats = [(path.relative_to(images.root).as_posix(), path.stat()) for path in images.paths]
    return [(name, s.st_size, s.st_mtime_ns) for name, s in stats]


def image_name(images: Sequence[Tensor], index: int) -> str:
    """Return the path of an image, or its number where it has no file."""
    return str(images.paths[index]) if hasattr(images, "paths") else f"image {index}"


def scan_folder(root: Path) -> tuple[list[str], list[tuple[str, str]]]:
    """Return the names of all image files below a folder, sorted, and what else is there and why.

    Names are relative, with forward slashes. Linked folders are not entered; hidden ones neither.
    """
    names: list[str] = []
    passed: list[tuple[str, str]] = []

    def note(path: str, why: str | None) -> None:
        name = Path(path).relative_to(root).as_posix()
        if why:
            passed.append((name, why))
        else:
            names.append(name)

    def closed(error: OSError) -> None:
        note(error.filename, "a folder that cannot be listed")

    for folder, folders, files in os.walk(root, onerror=closed):
        for path in (os.path.join(folder, name) for name in folders):
            if os.path.basename(path).startswith("."):
                note(path, "a hidden folder")
            elif os.path.islink(path):
                note(path, "a linked folder")
        folders[:] = [name for name in folders if not name.startswith(".")]
        for path in (os.path.join(folder, name) for name in files):
            note(path, _passed_over(path))
    return sorted(names), sorted(passed)


def _passed_over(path: str) -> str | None:
    """Return why a file is not read, or None."""
    name = os.path.basename(path)
    if name.startswith("."):
        return "a hidden file"
    if os.path.splitext(name)[1].lower() not in EXTENSIONS:
        return "not an image by its ending"
    return None if os.path.isfile(path) else "a broken link or not a regular file"


def read_split_list(root: Path, split_list: Path) -> list[str]:
    """Return the names in a split list; errors name the first line that is bad."""
    names = _lines(split_list)
    for name in names:
        if Path(name).is_absolute() or ".." in Path(name).parts:
            raise InputError(f"{split_list} names {name!r}; wanted paths inside {root}")
        if not os.path.isfile(root / name):
            raise FileNotFoundError(f"{split_list} names {name!r}, which is not in {root}")
    if not names:
        raise InputError(f"{split_list} names no image; wanted one path per line")
    return names


def _lines(split_list: Path) -> list[str]:
    # A file name may be bytes that are not text, so a list of them may be, too.
    text = split_list.read_text(encoding="utf-8-sig", errors="surrogateescape")
    # Not splitlines(): some of what it takes for the end of a line may be part of a name.
    names = [line.strip(" \t\r") for line in text.split("\n")]
    return [name for name in names if name]


def open_folder(
    root: Path, split: str, parts: Sequence[float] = (0.8, 0.1, 0.1), seed: int = 0
) -> ImageFolder:
    """Return one split of a folder, as `data.open_dataset` describes it."""
    substitute = split == "train"  # training continues; an evaluation must not
    if split == "all":
        return ImageFolder(root)
    own = root / f"{split}.txt"
    if own.is_file():
        first = "".join(_lines(own)[:1])
        places = [p for p in (root, root / split, root / "images") if os.path.isfile(p / first)]
        return ImageFolder(places[0] if places else root, own, substitute)
    if lists := [s for s in SPLITS if (root / f"{s}.txt").is_file()]:
        raise FileNotFoundError(f"{root} has no {split}.txt; it has lists for {', '.join(lists)}")
    check_split(split)
    folders = {s: root / n for s in SPLITS for n in _SUBFOLDERS[s] if (root / n).is_dir()}
    if "train" in folders or (root / "DIV2K_valid_HR").is_dir():
        if split not in folders:
            raise InputError(f"{root} has no images for {split!r}, only for {', '.join(folders)}")
        return ImageFolder(folders[split], None, substitute)
    names = scan_folder(root)[0]
    beside = {s: root.parent / f"{s}.txt" for s in SPLITS}
    listed = {s: set(_lines(file)) for s, file in beside.items() if file.is_file()}
    held = {s: [name for name in names if name in listed[s]] for s in listed}
    if not any(held.values()):
        return ImageFolder(root, partition(names, split, parts, seed), substitute)
    if not held.get(split):
        raise InputError(f"{beside[split]} names none of the images in {root}")
    return ImageFolder(root, held[split], substitute)


def check_split(split: str) -> None:
    """Raise ValueError for anything but the three splits."""
    if split not in SPLITS:
        raise InputError(f"a split is one of {', '.join(SPLITS)}, got {split!r}")


def partition(
    names: Sequence[str], split: str, parts: Sequence[float] = (0.8, 0.1, 0.1), seed: int = 0
) -> list[str]:
    """Return one of three parts of a list of names, the same on every machine.

    The order is that of a hash of seed and name, so adding or removing a name moves few others.
    `parts` for train, val and test are counts (three integers) or fractions; val and test get at
    least one image each, unless their fraction is 0. The rest is not used. Raises ValueError for
    parts that are empty or do not fit.
    """
    check_split(split)
    counts = dict(zip(SPLITS, _counts(len(names), parts), strict=True))
    if not counts[split]:
        raise InputError(f"parts={tuple(parts)} leaves no image for {split!r}")
    keys = {name: f"{seed}/{name}".encode("utf-8", "surrogateescape") for name in names}
    order = sorted(names, key=lambda name: hashlib.sha256(keys[name]).digest())
    start = {"val": 0, "test": counts["val"], "train": counts["val"] + counts["test"]}[split]
    return sorted(order[start : start + counts[split]])


def _counts(n: int, parts: Sequence[float]) -> tuple[int, int, int]:
    train, val, test = parts
    whole = all(isinstance(part, int) for part in parts)
    if min(parts) < 0 or sum(parts) > (n if whole else 1 + 1e-9):
        raise InputError(f"parts={tuple(parts)} of {n} images; wanted counts, or fractions up to 1")
    if whole:
        return int(train), int(val), int(test)
    if n < 3:
        raise InputError(f"{n} images cannot be split in three; use split='all'")
    held_out = [max(1, int(n * part + 1e-9)) if part else 0 for part in (val, test)]
    wanted = n if sum(parts) > 1 - 1e-9 else int(n * sum(parts) + 1e-9)
    return max(0, wanted - sum(held_out)), held_out[0], held_out[1]


# The check ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class FileReport:
    """What happens to one file: its size (height, width) if it is used, else the problem."""

    name: str
    size: Size | None = None
    conversions: tuple[str, ...] = ()
    problem: str = ""


@dataclass(frozen=True)
class FolderReport:
    """What happens to a folder's image files, and which other files are passed over and why."""

    root: Path
    files: list[FileReport]
    passed_over: list[tuple[str, str]]

    @property
    def used(self) -> list[FileReport]:
        """Return the files that can be used."""
        return [file for file in self.files if not file.problem]

    def summary(self) -> str:
        """Return counts, with the names of the first files of each kind."""
        lines = [f"{self.root}: {len(self.used)} of {len(self.files)} image files can be used"]
        if sizes := sorted((h * w, h, w) for h, w in (f.size for f in self.used if f.size)):
            small, large = (f"{h} x {w}" for _, h, w in (sizes[0], sizes[-1]))
            lines.append(f"sizes (height x width): from {small} to {large}")
        lines += _grouped("converted", [(f.name, c) for f in self.files for c in f.conversions])
        lines += _grouped("skipped", [(f.name, f.problem) for f in self.files if f.problem])
        return "\n".join(lines + _grouped("passed over", self.passed_over))

    def listing(self) -> str:
        """Return one line per file: its size or "skipped", its name, and what happens to it."""
        lines = []
        for file in self.files:
            size = f"{file.size[0]} x {file.size[1]}" if file.size else "skipped"
            why = "; ".join(file.conversions) or file.problem
            lines.append(f"{size:>13}  {file.name}" + (f"  ({why})" if why else ""))
        return "\n".join(lines)


def check_folder(root: str | Path) -> FolderReport:
    """Decode every image below a folder and report what `ImageFolder` makes of it."""
    root = Path(root)
    names, passed_over = scan_folder(root)
    files = [check_file(root, name) for name in tqdm(names, desc="checking", unit="file")]
    return FolderReport(root, files, passed_over)


def check_file(root: Path, name: str) -> FileReport:
    """Decode one image and report what happens to it."""
    try:
        with open_image(root / name) as image:
            rgb, _, notes = open_upright(image)
            notes = _by_content(image, root / name) + notes
            return FileReport(name, tuple(rgb.shape[1:]), tuple(notes))
    except (InputError, FileNotFoundError) as error:
        return FileReport(name, problem=reason(error.__cause__ or error))


def splits(root: Path) -> str:
    """Return how many images `open_dataset` would find in each split."""
    lines = []
    for split in SPLITS:
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # the report has said it already
                lines.append(f"{split}: {len(open_folder(root, split))}")
        except (InputError, FileNotFoundError) as error:
            lines.append(f"{split}: none ({error})")
    return "\n".join(lines)


def _by_content(image: Any, path: Path) -> list[str]:
    """Return a note where a file's ending names another format than its content."""
    from PIL import Image

    wanted = Image.registered_extensions().get(path.suffix.lower())
    same = image.format in (wanted, "MPO" if wanted == "JPEG" else wanted)
    return [] if same else [f"{image.format} by its content"]


def _grouped(title: str, pairs: Sequence[tuple[str, str]]) -> list[str]:
    """Return lines for (name, kind), grouped by kind, the largest group first."""
    groups = defaultdict(list)
    for name, kind in pairs:
        groups[kind].append(name)
    lines = [f"{title}:"] if pairs else []
    for kind, names in sorted(groups.items(), key=lambda group: -len(group[1])):
        more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
        lines.append(f"{len(names):6} {kind}: {', '.join(names[:SHOWN])}{more}")
    return lines
