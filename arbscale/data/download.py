"""Public data sets and weights, downloaded, checked, and unpacked completely or not at all.

The servers are not trusted: a file gets its name only when its SHA-256 is the one below, and a
folder only when all its images are there. The publishers give no digests, so these are those that
others have recorded: TensorFlow Datasets for DIV2K, UVCGANv2 for AFHQ, and for TAESD's encoder the
one of the copy in ComfyUI's portable release, which takes it from the repository below.
"""

from __future__ import annotations

import errno
import os
import shutil
import stat
import zipfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath

from tqdm.auto import tqdm

from arbscale import store
from arbscale.data.folders import EXTENSIONS
from arbscale.data.sets import data_root
from arbscale.store import InputError, StateError

TIMEOUT = 30.0  # seconds without a byte
RETRIES = 3  # of a download that failed
MAX_UNPACKED = 16 << 30  # bytes of one archive
_CHUNK = 1 << 20


@dataclass(frozen=True)
class Published:
    """A file to download, and what is taken from it where it is a zip archive."""

    url: str
    size: int  # bytes
    sha256: str
    target: str  # below the root: the file itself, or the folder of an archive's images
    members: Mapping[str, str] = field(default_factory=dict)  # archive's folder: target's folder
    images: int = 0


FILES = {
    "div2k": (
        Published(
            "https://data.vision.ee.ethz.ch/cvl/DIV2K/DIV2K_valid_HR.zip",
            448_993_893,
            "20dd31fd84d777bc1cf5d6b7654a3f569c0aec74458ae094122ad1d0489900fc",
            "div2k/DIV2K_valid_HR",
            {"DIV2K_valid_HR": ""},
            100,
        ),
        Published(
            "https://data.vision.ee.ethz.ch/cvl/DIV2K/DIV2K_train_HR.zip",
            3_530_603_713,
            "9d0b9c463f6e35b6c62cc6a930ee2224f670b34c1df841a57670f9acf0f6c335",
            "div2k/DIV2K_train_HR",
            {"DIV2K_train_HR": ""},
            800,
        ),
    ),
    "afhq": (
        Published(
            "https://www.dropbox.com/s/t9l9o3vsx2jai3z/afhq.zip?dl=1",
            729_484_677,
            "7f63dcc14ef58c0e849b59091287e1844da97016073aac20403ae6c6132b950f",
            "afhq_cats",
            {"afhq/train/cat": "train", "afhq/val/cat": "val"},
            5_653,
        ),
    ),
    "taesd": (
        Published(
            "https://github.com/comfyanonymous/taesd/raw/HEAD/taesd_encoder.safetensors",
            2_450_568,
            "a6b8c0fda4aad50784e543389e0239c72c5e31e9775c9e612ea8333bf3a77dcb",
            "taesd/taesd_encoder.safetensors",
        ),
    ),
}
TERMS = {
    "div2k": "DIV2K (Agustsson and Timofte 2017): for academic research only",
    "afhq": "AFHQ (Choi et al. 2020, NAVER Corp.): CC BY-NC 4.0, not for commercial use",
    "taesd": "TAESD (Ollin Boer Bohan 2023, github madebyollin/taesd): MIT licence",
}


def download(name: str, root: str | Path | None = None) -> list[Path]:
    """Download a data set or weights and return its folders or files; what is there is kept.

    `root` is by default the folder that ARBSCALE_DATA names, for "taesd" ARBSCALE_WEIGHTS. Raises
    ValueError for an unknown name, a wrong digest or a damaged archive, RuntimeError where the
    server does not deliver, OSError for a full disk. Rerun it after a failure: finished files stay.
    """
    if name not in FILES:
        raise InputError(f"no download {name!r}; there are {', '.join(FILES)}")
    variable = "ARBSCALE_WEIGHTS" if name == "taesd" else "ARBSCALE_DATA"
    root = Path(os.path.expanduser(root)) if root else data_root(variable)
    for file in FILES[name]:
        target = root / file.target
        if not file.members:
            fetch(file.url, target, file.size, file.sha256)
        elif target.exists():
            found = sum(path.suffix.lower() in EXTENSIONS for path in target.rglob("*"))
            if found != file.images:
                wanted = f"{found} images, wanted {file.images}"
                raise InputError(f"{target} holds {wanted}; move it away first")
        else:
            archive = target.with_name(PurePosixPath(file.url.partition("?")[0]).name)
            fetch(file.url, archive, file.size, file.sha256)
            unpack(archive, target, file.members, file.images)
            archive.unlink()
    return [root / file.target for file in FILES[name]]


def fetch(url: str, path: Path, size: int, sha256: str) -> None:
    """Download a file with a known digest, unless it is there already.

    Raises RuntimeError where the server does not deliver, ValueError for another digest, and
    OSError unless twice its size is free: for itself and for what is unpacked from it.
    """
    import pooch
    import requests

    if path.exists():
        if store.sha256(path) != sha256:
            raise InputError(f"{path} does not have SHA-256 {sha256}; delete it and run this again")
        return
    get = pooch.HTTPDownloader(progressbar=True, chunk_size=_CHUNK, timeout=TIMEOUT)
    with _partial(path) as folder, store.replacing(path) as draft:
        if (free := shutil.disk_usage(folder).free) < 2 * size:
            found = f"{free / 1e9:.1f} GB left and {2 * size / 1e9:.1f} are needed"
            raise OSError(f"{path.parent} has {found}; make room, or use another --output")
        try:
            pooch.create(
                folder, "", registry={path.name: sha256}, urls={path.name: url},
                retry_if_failed=RETRIES,
            ).fetch(path.name, downloader=get)  # fmt: skip
        except requests.RequestException as error:
            hint = f"if it has moved, download it by hand as {path} and run this again"
            raise StateError(f"{url}: {error}; {hint}") from error
        os.replace(folder / path.name, draft)


@contextmanager
def _partial(target: Path) -> Iterator[Path]:
    """Yield an empty hidden folder beside the target and remove it, as a killed run's, too."""
    folder = target.with_name(f".{target.name}.partial")  # hidden: not taken for images
    with store.locked(target):
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        try:
            yield folder
        finally:
            shutil.rmtree(folder, ignore_errors=True)


def unpack(archive: Path, target: Path, members: Mapping[str, str], images: int) -> None:
    """Unpack the images of some folders of a zip file into a new folder, all of them or none.

    `members` maps folders of the archive to folders below `target`. Raises ValueError for a damaged
    archive, another number of images, and anything that a data set does not need: a path that
    leaves the folder, a link, a device, a repeated name, more than `MAX_UNPACKED` bytes.
    """
    try:
        with _partial(target) as folder, zipfile.ZipFile(archive) as file:
            plan = _plan(file, members)
            if len(plan) != images:
                raise InputError(f"it holds {len(plan)} images, wanted {images}")
            for name in tqdm(plan, desc=f"unpacking {archive.name}", unit="file"):
                path = folder / name
                path.parent.mkdir(parents=True, exist_ok=True)
                with file.open(plan[name]) as source, open(path, "xb") as copy:
                    shutil.copyfileobj(source, copy, _CHUNK)
            if hasattr(os, "sync"):
                os.sync()  # or a power cut could leave the final name on files without content
            os.replace(folder, target)
    except Exception as error:  # zipfile, zlib and others raise many kinds for damage
        if isinstance(error, OSError) and error.errno != errno.EINVAL:
            raise  # a full disk, no permission; but not a seek beyond any file
        raise InputError(f"{archive} is not unpacked: {error}; delete it and run again") from error


def _plan(file: zipfile.ZipFile, members: Mapping[str, str]) -> dict[str, zipfile.ZipInfo]:
    """Return what goes where, by names relative to the target.

    A path outside the archive, a link or a device would not be followed; but an archive that holds
    one is not the one we want: ValueError.
    """
    if sum(info.file_size for info in file.infolist()) > MAX_UNPACKED:
        raise InputError(f"it unpacks to more than {MAX_UNPACKED} bytes")
    plan: dict[str, zipfile.ZipInfo] = {}
    for info in file.infolist():
        name, path = info.filename, PurePosixPath(info.filename)
        if path.is_absolute() or "\\" in name or ":" in name or ".." in path.parts:
            raise InputError(f"it holds {name!r}, outside its folder")
        if stat.S_IFMT(info.external_attr >> 16) not in (0, stat.S_IFREG, stat.S_IFDIR):
            raise InputError(f"it holds {name!r}, a link or a device")
        folder = members.get(path.parent.as_posix())
        if folder is None or path.suffix.lower() not in EXTENSIONS or path.name.startswith("."):
            continue
        place = (PurePosixPath(folder) / path.name).as_posix()
        if place in plan:
            raise InputError(f"it holds {name!r} twice")
        plan[place] = info
    return plan
