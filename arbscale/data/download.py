"""Public data sets fetched from their homes: resumed, checked, unpacked whole or not at all.

The servers are not trusted. What counts are the length and the SHA-256 below; a file has its final
name only when both are right, and a folder only when all its pictures are there. The publishers
print no digests; these are the ones that others have recorded (TensorFlow Datasets for DIV2K,
UVCGANv2 for AFHQ).
"""

from __future__ import annotations

import errno
import hashlib
import os
import shutil
import stat
import time
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from http.client import HTTPException, HTTPResponse
from pathlib import Path, PurePosixPath
from urllib.error import HTTPError
from urllib.request import Request, urlopen

from tqdm.auto import tqdm

from arbscale.data.folders import EXTENSIONS

TIMEOUT = 30.0  # seconds without a byte
TRIES = 6  # in a row that bring nothing new
WAIT = 1.0  # seconds before the second try; doubled before each further one
MAX_UNPACKED = 16 << 30  # bytes of one archive
_CHUNK = 1 << 20


@dataclass(frozen=True)
class Archive:
    """A zip file and what is taken from it."""

    url: str
    size: int  # bytes
    sha256: str
    folder: str  # where its pictures go, below the data folder
    members: Mapping[str, str]  # folder in the archive: folder below `folder`
    pictures: int

    @property
    def name(self) -> str:
        """Return the file's name."""
        return PurePosixPath(self.url.partition("?")[0]).name


ARCHIVES = {
    "div2k": (
        Archive(
            "https://data.vision.ee.ethz.ch/cvl/DIV2K/DIV2K_valid_HR.zip",
            448_993_893,
            "20dd31fd84d777bc1cf5d6b7654a3f569c0aec74458ae094122ad1d0489900fc",
            "div2k/DIV2K_valid_HR",
            {"DIV2K_valid_HR": ""},
            100,
        ),
        Archive(
            "https://data.vision.ee.ethz.ch/cvl/DIV2K/DIV2K_train_HR.zip",
            3_530_603_713,
            "9d0b9c463f6e35b6c62cc6a930ee2224f670b34c1df841a57670f9acf0f6c335",
            "div2k/DIV2K_train_HR",
            {"DIV2K_train_HR": ""},
            800,
        ),
    ),
    "afhq": (
        Archive(
            "https://www.dropbox.com/s/t9l9o3vsx2jai3z/afhq.zip?dl=1",
            729_484_677,
            "7f63dcc14ef58c0e849b59091287e1844da97016073aac20403ae6c6132b950f",
            "afhq_cats",
            {"afhq/train/cat": "train", "afhq/val/cat": "val"},
            5_653,
        ),
    ),
}
TERMS = {
    "div2k": "DIV2K (Agustsson and Timofte 2017): for academic research only",
    "afhq": "AFHQ (Choi et al. 2020, NAVER Corp.): CC BY-NC 4.0, not for commercial use",
}


class _Interrupted(Exception):
    """The connection or the server failed in a way that another try may mend."""


def download(name: str, root: str | Path) -> list[Path]:
    """Fetch a data set into a folder and return its folders of pictures; what is there is kept.

    Raises ValueError for an unknown name, a wrong digest or a damaged archive, RuntimeError when
    the server does not deliver, and OSError for a full disk. Run again to go on.
    """
    if name not in ARCHIVES:
        raise ValueError(f"no download {name!r}; there are {', '.join(ARCHIVES)}")
    root = Path(root).expanduser()
    targets = []
    for archive in ARCHIVES[name]:
        target = root / archive.folder
        targets.append(target)
        if target.exists():
            _check_present(target, archive.pictures)
            continue
        target.parent.mkdir(parents=True, exist_ok=True)
        file = target.parent / archive.name
        _check_space(file, archive.size)
        fetch(archive.url, file, archive.size, archive.sha256)
        unpack(file, target, archive.members, archive.pictures)
        file.unlink()
    return targets


def fetch(url: str, path: Path, size: int, sha256: str) -> None:
    """Download a file of known length and digest; go on where an earlier call stopped.

    It grows as `<name>.part`. Raises RuntimeError when the server does not deliver, ValueError for
    a wrong digest, after which the part is removed.
    """
    if path.exists():
        _verify(path, size, sha256)
        return
    part = _part(path)
    _receive_all(url, part, size)
    try:
        _verify(part, size, sha256)
    except ValueError:
        part.unlink()
        _mark(part).unlink(missing_ok=True)
        raise
    os.replace(part, path)
    _mark(part).unlink(missing_ok=True)


def _receive_all(url: str, part: Path, size: int) -> None:
    """Try until the part has its full length, or `TRIES` times in a row nothing new came."""
    best = have = _length(part)
    failures = 0
    with tqdm(total=size, initial=have, unit="B", unit_scale=True, desc=part.stem) as bar:
        while have < size:
            try:
                _receive(url, part, size, bar)
                problem = "the connection ended early"
            except _Interrupted as error:
                problem = str(error)
            bar.set_postfix_str(problem if _length(part) < size else "")
            have = _length(part)
            failures = 0 if have > best else failures + 1
            best = max(best, have)
            if failures == TRIES:
                raise RuntimeError(
                    f"{url}: {TRIES} tries brought nothing new ({problem}); {have} of {size} bytes "
                    "are kept, run it again to go on"
                )
            if have < size:
                time.sleep(min(60.0, WAIT * 2 ** max(0, failures - 1)))


def _receive(url: str, part: Path, size: int, bar: tqdm) -> None:
    """Ask for what is missing and append it, until the full length or the connection's end."""
    with _ask(url, part) as response:
        start = _start(response, part, size)
        if start == 0:
            _mark(part).write_text(_validator(response), encoding="utf-8")
        with open(part, "r+b" if part.exists() else "wb") as file:
            file.truncate(start)
            file.seek(start)
            bar.n = start
            while start < size and (data := _read(response, min(_CHUNK, size - start))):
                file.write(data)
                start += len(data)
                bar.update(len(data))
            file.flush()
            os.fsync(file.fileno())


def _ask(url: str, part: Path) -> HTTPResponse:
    """Request the file from the part's end on, provided that it is still the same file."""
    headers = {"User-Agent": "arbscale"}
    if _length(part):
        headers["Range"] = f"bytes={_length(part)}-"
        headers |= {"If-Range": _known(part)} if _known(part) else {}
    try:
        return urlopen(Request(url, headers=headers), timeout=TIMEOUT)
    except HTTPError as error:
        error.close()
        if error.code == 416:  # the part is longer than the server's file
            part.unlink(missing_ok=True)
        if error.code in (408, 416, 425, 429) or error.code >= 500:
            raise _Interrupted(f"the server answered {error.code} {error.reason}") from error
        raise RuntimeError(
            f"{url}: the server answered {error.code} {error.reason}; if the data set has moved, "
            f"fetch it by hand as {part.with_suffix('')}, and run this again"
        ) from error
    except (OSError, HTTPException) as error:
        raise _Interrupted(str(error) or type(error).__name__) from error


def _start(response: HTTPResponse, part: Path, size: int) -> int:
    """Return the place in the file that a response begins at.

    A server that ignores ranges, or has another file by now, begins anew. One that announces
    another length must not overwrite what is there: it is often a page with an error.
    """
    if response.status != 206:
        announced = response.headers.get("Content-Length", str(size))
        if announced != str(size):
            raise _Interrupted(f"the server announces {announced} bytes, wanted {size}")
        return 0
    announced = response.headers.get("Content-Range", "")
    right_place = announced.startswith(f"bytes {_length(part)}-")
    right_size = announced.rpartition("/")[2] in (str(size), "*")
    same_file = not _known(part) or _validator(response) in ("", _known(part))
    if right_place and right_size and same_file:
        return _length(part)
    part.unlink(missing_ok=True)
    raise _Interrupted(f"the server sent the range {announced!r}, or of another file")


def _read(response: HTTPResponse, size: int) -> bytes:
    try:
        return response.read(size)
    except (OSError, HTTPException) as error:
        raise _Interrupted(str(error) or type(error).__name__) from error


def _validator(response: HTTPResponse) -> str:
    """Return what names this version of the file: a strong ETag, or else its date."""
    etag = response.headers.get("ETag", "")
    return etag if etag.startswith('"') else response.headers.get("Last-Modified", "")


def _part(path: Path) -> Path:
    return path.with_name(path.name + ".part")


def _mark(part: Path) -> Path:
    """Return where the validator of a part is kept."""
    return part.with_name(part.name + ".version")


def _known(part: Path) -> str:
    return _mark(part).read_text(encoding="utf-8") if _mark(part).is_file() else ""


def _length(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0


def _verify(path: Path, size: int, sha256: str) -> None:
    """Raise ValueError unless a file has that length and that SHA-256."""
    digest = hashlib.sha256()
    bar = tqdm(total=size, unit="B", unit_scale=True, desc="checking", leave=False)
    with bar, open(path, "rb") as file:
        while data := file.read(_CHUNK):
            digest.update(data)
            bar.update(len(data))
    if _length(path) != size or digest.hexdigest() != sha256:
        raise ValueError(
            f"{path} has {_length(path)} bytes and SHA-256 {digest.hexdigest()}; wanted {size} and "
            f"{sha256}: damaged, or another version. Delete it if it is there, and run this again"
        )


def unpack(archive: Path, target: Path, members: Mapping[str, str], pictures: int) -> None:
    """Unpack the pictures of some folders of a zip file into a new folder, all of them or none.

    `members` maps folders of the archive to folders below `target`. Raises ValueError for a damaged
    archive, another number of pictures, and anything that a data set has no need of: a path that
    leaves the folder, a link, a device, a repeated name, a size over `MAX_UNPACKED`.
    """
    partial = target.with_name(f".{target.name}.partial")  # hidden: not taken for pictures
    shutil.rmtree(partial, ignore_errors=True)
    try:
        with zipfile.ZipFile(archive) as file:
            plan = _plan(file, members)
            if len(plan) != pictures:
                raise ValueError(f"it holds {len(plan)} pictures, wanted {pictures}")
            for name in tqdm(plan, desc=f"unpacking {archive.name}", unit="file"):
                path = partial / name
                path.parent.mkdir(parents=True, exist_ok=True)
                with file.open(plan[name]) as source, open(path, "xb") as copy:
                    shutil.copyfileobj(source, copy, _CHUNK)
        if hasattr(os, "sync"):
            os.sync()  # or a power cut could leave the final name on files without content
        os.replace(partial, target)
    except Exception as error:  # zipfile, zlib and others meet damage in many ways
        if isinstance(error, OSError) and error.errno != errno.EINVAL:
            raise  # a full disk, no permission; but not a seek to where no file reaches
        raise ValueError(f"{archive} is not unpacked: {error}; delete it and run again") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _plan(file: zipfile.ZipFile, members: Mapping[str, str]) -> dict[str, zipfile.ZipInfo]:
    """Return what goes where, by names relative to the target."""
    infos = file.infolist()
    if sum(info.file_size for info in infos) > MAX_UNPACKED:
        raise ValueError(f"it unpacks to more than {MAX_UNPACKED} bytes")
    plan: dict[str, zipfile.ZipInfo] = {}
    for info in infos:
        _check_member(info)
        path = PurePosixPath(info.filename)
        folder = members.get(path.parent.as_posix())
        if folder is None or path.suffix.lower() not in EXTENSIONS or path.name.startswith("."):
            continue
        name = (PurePosixPath(folder) / path.name).as_posix()
        if name in plan:
            raise ValueError(f"it holds {info.filename!r} twice")
        plan[name] = info
    return plan


def _check_member(info: zipfile.ZipInfo) -> None:
    """Raise ValueError for a path that leaves the folder, and for anything but files and folders.

    `_plan` would not follow such a path; but an archive that has one is not the one we want.
    """
    name = info.filename
    if name.startswith("/") or "\\" in name or ":" in name or ".." in PurePosixPath(name).parts:
        raise ValueError(f"it holds {name!r}, outside its folder")
    if stat.S_IFMT(info.external_attr >> 16) not in (0, stat.S_IFREG, stat.S_IFDIR):
        raise ValueError(f"it holds {name!r}, a link or a device")


def _check_present(target: Path, pictures: int) -> None:
    found = sum(path.suffix.lower() in EXTENSIONS for path in target.rglob("*"))
    if found != pictures:
        raise ValueError(f"{target} holds {found} pictures, not {pictures}; move it away first")


def _check_space(file: Path, size: int) -> None:
    """Raise OSError unless the rest of the archive, and about as much unpacked, will fit."""
    free = shutil.disk_usage(file.parent).free
    wanted = 2 * size - _length(file) - _length(_part(file))
    if free < wanted:
        raise OSError(
            f"{file.parent} has {free / 1e9:.1f} GB left and {wanted / 1e9:.1f} are needed; make "
            "room, or name another folder with --output"
        )
