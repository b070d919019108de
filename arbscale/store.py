"""What is on disk: weights with their manifest, files that are replaced whole, content keys.

A model is a folder of safetensors and a manifest that says what they are. Only safetensors are
read, which hold numbers and no code; every file is checked against the SHA-256 in the manifest
before it is used.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import itertools
import json
import os
import platform
import time
from collections.abc import Iterator
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any, TextIO

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

MANIFEST = "manifest.json"
MANIFEST_BYTES = 1_000_000  # at most
KINDS = dict.fromkeys(("name", "data", "licence"), str)
KINDS |= {"commands": list, "minutes": float, "losses": dict}
"""Of what training writes into a manifest and reads again; a field may be missing."""
FORMAT = 1  # of the manifest and of the files beside it
SHARD_BYTES = 15_000_000
SHIPPED = (Path(__file__).parent / "shipped", Path(__file__).parent.parent / "data")
"""Where trained weights are: inside an installed package, or beside it in a checkout."""


class InputError(ValueError):
    """What was given cannot be used: files, names or numbers. The message says which, and why."""


class StateError(RuntimeError):
    """What is asked for is not possible now: a lock is held, a run stopped, a server is away."""


STRAY = (TypeError, KeyError, IndexError, AttributeError, ArithmeticError, EOFError, RecursionError)
"""What readers raise, beside ValueError, where a file holds something else than they take."""


@contextlib.contextmanager
def reading(path: str | Path, *kinds: type[Exception]) -> Iterator[None]:
    """Raise InputError with the path where a file does not hold what its reader takes.

    `kinds` are errors of its library beside those of Python and safetensors.
    """
    try:
        yield
    except InputError:
        raise
    except (ValueError, SafetensorError, *STRAY, *kinds) as error:
        why = f"{type(error).__name__}: {error}"
        raise InputError(f"{path} is damaged, or written by something else ({why})") from error


@contextlib.contextmanager
def resumable(said: str = "stopped; rerun the same command to resume") -> Iterator[None]:
    """Let Ctrl-C say how work that keeps what is finished is resumed."""
    try:
        yield
    except KeyboardInterrupt as stop:
        raise KeyboardInterrupt(*(stop.args or [said])) from None


def shipped() -> list[str]:
    """Return the names of the trained models that ship with the package."""
    return sorted({m.parent.name for root in SHIPPED for m in root.glob(f"*/{MANIFEST}")})


def find(name_or_path: str | Path) -> Path:
    """Return the folder of a model: a path, or the name of a shipped one, in this order.

    Raises FileNotFoundError that lists the shipped names.
    """
    own = Path(os.path.expanduser(name_or_path))
    candidates = [own, *(root / str(name_or_path) for root in SHIPPED)]
    for folder in candidates:
        if (folder / MANIFEST).is_file():
            return folder
    raise FileNotFoundError(
        f"no model {str(name_or_path)!r}: neither a folder with a {MANIFEST} nor a shipped model "
        f"({', '.join(shipped()) or 'none found'}); `python -m arbscale train` trains one"
    )


def save(folder: str | Path, state: dict[str, Tensor], manifest: dict, half: bool = False) -> None:
    """Write tensors, sharded to at most 15 MB a file, and then the manifest, which makes it valid.

    `half` stores float16, half the size. `manifest` gets the list of files with their SHA-256. A
    model that is there already stays whole until the new manifest takes its place, then its files
    are removed. Raises ValueError for numbers that are not finite, OSError for what is not written.
    """
    folder = Path(folder)
    old = sorted(folder.glob("weights-*.safetensors"))
    taken = {path.name for path in old}
    names = (f"weights-{i:05d}.safetensors" for i in itertools.count())
    names = (name for name in names if name not in taken)
    files: list[dict] = []
    text = ""
    try:
        for shard, name in zip(_shards(state, half), names, strict=False):
            path = folder / name
            files.append({"name": name})
            with replacing(path) as draft:
                save_file(shard, draft)
            files[-1] |= {"sha256": sha256(path), "bytes": path.stat().st_size}
            for same in (other for other in old if sha256(other) == files[-1]["sha256"]):
                path.unlink(missing_ok=True)  # a model saved again keeps the names of its files
                files[-1]["name"] = same.name
        text = json.dumps({"format": FORMAT, **manifest, "files": files}, indent=2) + "\n"
        write_text(folder / MANIFEST, text)
    except BaseException as error:
        path = folder / MANIFEST
        if not path.is_file() or path.read_text(encoding="utf-8") != text:  # not in place already
            for name in {entry["name"] for entry in files} - taken:
                (folder / name).unlink(missing_ok=True)
        if isinstance(error, SafetensorError):
            raise OSError(f"the weights in {folder} could not be written ({error})") from error
        raise
    for name in taken - {entry["name"] for entry in files}:
        (folder / name).unlink(missing_ok=True)


def load(folder: str | Path) -> tuple[dict[str, Tensor], dict]:
    """Return float32 tensors and the manifest.

    Raises FileNotFoundError for a missing file, ValueError for a damaged or altered one, one
    outside the folder, and for tensors that are no weights: integers, complex or not finite.
    """
    folder = Path(folder)
    manifest = read_manifest(folder)
    state: dict[str, Tensor] = {}
    for entry in manifest["files"]:
        path = folder / entry["name"]
        if os.path.dirname(os.path.realpath(path)) != os.path.realpath(folder):
            raise InputError(f"{path} is named in the manifest but lies in another folder")
        if not path.is_file():
            raise FileNotFoundError(f"{path} is named in the manifest but missing; fetch it again")
        size = path.stat().st_size
        if size != entry["bytes"]:  # a truncated download, or a git-lfs pointer
            raise InputError(f"{path} has {size} bytes, not {entry['bytes']}; fetch it again")
        if sha256(path) != entry["sha256"]:
            raise InputError(f"{path} does not have its manifest's SHA-256; fetch it again")
        with reading(path):
            shard = load_file(path)
        if twice := sorted(set(state) & set(shard)):
            raise InputError(f"{path} holds {twice[0]}, which another file holds already")
        check_finite(shard, path)
        state |= shard
    return {name: tensor.float() for name, tensor in state.items()}, manifest


def check_finite(state: dict[str, Tensor], origin: str | Path) -> None:
    """Raise ValueError unless all tensors are real floats and finite."""
    for name, tensor in state.items():
        if not tensor.is_floating_point():
            raise InputError(f"{name} in {origin} is {tensor.dtype}; weights are floats")
        if not bool(tensor.float().isfinite().all()):
            raise InputError(f"{name} in {origin} holds NaN or infinity; train or fetch it again")


def read_manifest(folder: str | Path) -> dict:
    """Return a model's manifest; ValueError if it is damaged or of a newer format."""
    path = Path(folder) / MANIFEST
    manifest: Any = None
    if path.stat().st_size > MANIFEST_BYTES:
        raise InputError(f"{path} is over {MANIFEST_BYTES:,} bytes; a manifest is smaller")
    with contextlib.suppress(ValueError, RecursionError):
        manifest = json.loads(path.read_text(encoding="utf-8"))
    if not isinstance(manifest, dict):
        raise InputError(f"{path} is damaged; fetch or save the model again")
    version = manifest.get("format")
    if type(version) is int and version > FORMAT:
        raise InputError(f"{path} has format {version}, newer than {FORMAT}; update arbscale")
    files, preset = manifest.get("files"), manifest.get("preset")
    sound = isinstance(files, list) and files and all(_is_entry(entry) for entry in files)
    sound = sound and all(
        isinstance(manifest[k], kind) for k, kind in KINDS.items() if k in manifest
    )
    if version != FORMAT or not sound or not isinstance(preset, dict) or not preset:
        raise InputError(f"{path} is damaged; fetch or save the model again")
    return manifest


def _is_entry(entry: Any) -> bool:
    """Tell whether a manifest's entry describes a file of the manifest's own folder."""
    kinds = {"name": str, "sha256": str, "bytes": int}
    if not isinstance(entry, dict) or any(type(entry.get(k)) is not t for k, t in kinds.items()):
        return False
    name = entry["name"]
    return PurePosixPath(name).name == PureWindowsPath(name).name == name and "\0" not in name


def _shards(state: dict[str, Tensor], half: bool) -> list[dict[str, Tensor]]:
    shards: list[dict[str, Tensor]] = [{}]
    size = 0
    for name, tensor in state.items():
        tensor = tensor.detach().cpu().to(torch.float16 if half else torch.float32).contiguous()
        if shards[-1] and size + tensor.nbytes > SHARD_BYTES:
            shards.append({})
            size = 0
        shards[-1][name] = tensor
        size += tensor.nbytes
    for shard in shards:
        check_finite(shard, "float16" if half else "the model")
    return shards


def sha256(path: Path) -> str:
    """Return a file's SHA-256 in hexadecimal, read piece by piece."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while piece := file.read(1 << 20):
            digest.update(piece)
    return digest.hexdigest()


@contextlib.contextmanager
def replacing(path: str | Path) -> Iterator[Path]:
    """Yield a draft beside `path`, to be written; then move it into place.

    At every moment `path` is the old file or the new one, whole: the draft is synced to disk before
    it gets the name. Where the writing fails, the draft is removed and the error goes on. A link
    stays one, and the file that it leads to is replaced.
    """
    path = Path(os.path.realpath(path))
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_name(f".draft-{os.getpid()}-{path.name[-40:]}")  # a name has a longest length
    try:
        yield draft
        draft.chmod(0o666 & ~_umask())
        sync(draft)
        draft.replace(path)
    except BaseException as error:
        draft.unlink(missing_ok=True)
        if isinstance(error, OSError) and error.errno and not error.filename:
            error.filename = str(path)  # writing to a full disk names no file
        raise
    sync(path.parent)


def check_writable(path: str | Path) -> None:
    """Raise OSError where a file cannot be written at `path`: before hours of work, not after."""
    path, real = Path(path), Path(os.path.realpath(path))
    parent = next(folder for folder in real.parents if folder.exists())
    if any(place.is_symlink() for place in (real, *real.parents)):
        raise OSError(f"{path} leads through a link to itself; name another output")
    if path.is_dir():
        raise IsADirectoryError(f"{path} is a folder; name a file")
    if not parent.is_dir():
        raise NotADirectoryError(f"{parent} is a file; {path} cannot lie below it")
    if not os.access(parent, os.W_OK | os.X_OK):
        raise PermissionError(f"{parent} is read-only; name another output than {path}")


def write_text(path: str | Path, text: str) -> None:
    """Write a small file, so that it is the old or the new one at every moment."""
    with replacing(path) as draft:
        draft.write_text(text, encoding="utf-8")


def sync(path: Path) -> None:
    """Wait until a file, or a folder's list of names, is on the disk itself."""
    if path.is_dir() and os.name == "nt":  # Windows opens no folders
        return
    handle = os.open(path, os.O_RDWR if path.is_file() else os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError as error:  # some network shares sync files alone
        if error.errno not in (errno.EINVAL, errno.EBADF, errno.ENOTSUP) or not path.is_dir():
            raise
    finally:
        os.close(handle)


_HELD: set[Path] = set()  # the locks of this process


@contextlib.contextmanager
def locked(path: str | Path) -> Iterator[None]:
    """Keep other processes from writing `path`, a file or a folder; one process may nest calls.

    The lock is a file beside `path` that names its holder. The system releases it when the process
    ends, even by a kill, so none is left behind. Raises StateError that says who holds the lock.
    """
    path = Path(os.path.realpath(path))
    lock = path.with_name(f".{path.name}.lock")
    if lock in _HELD:
        yield
        return
    lock.parent.mkdir(parents=True, exist_ok=True)
    with _acquire(lock) as file:
        _HELD.add(lock)
        try:
            file.truncate(0)
            started = time.strftime("%Y-%m-%d %H:%M:%S")
            file.write(f"process {os.getpid()} on {platform.node()}, started {started}")
            file.flush()
            yield
        finally:
            _HELD.remove(lock)
            with contextlib.suppress(OSError):  # Windows removes no open files
                lock.unlink()


def _acquire(lock: Path) -> TextIO:
    """Open and lock a file; StateError if another process has locked it."""
    while True:
        file = lock.open("a+", encoding="utf-8")
        try:
            _lock(file)
            if os.path.samestat(os.fstat(file.fileno()), lock.stat()):
                return file
        except FileNotFoundError:
            pass
        except OSError as error:
            if error.errno not in (errno.EACCES, errno.EAGAIN):
                return file  # a share that knows no locks
            file.seek(0)
            holder = file.read() or "another process"
            file.close()
            output = lock.with_name(lock.name[1 : -len(".lock")])
            raise StateError(f"{output} is in use: {holder}; wait until it ends") from None
        file.close()  # its holder has removed it meanwhile


def _lock(file: TextIO) -> None:
    try:
        import fcntl
    except ImportError:  # Windows
        import msvcrt

        file.seek(1 << 30)  # what is locked cannot be read
        msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)
    else:
        # Not flock, which the loader's workers would inherit and hold after a kill.
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)


def content_key(*facts: object, module: nn.Module | None = None) -> str:
    """Return a SHA-256 of facts (JSON values and tensors) and of a module's weights."""
    weights = module.state_dict() if module else None
    text = json.dumps([facts, weights], sort_keys=True, default=_digest)
    return hashlib.sha256(text.encode()).hexdigest()


def _digest(tensor: Tensor) -> str:
    content = tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes()
    return f"{tensor.dtype} {tuple(tensor.shape)} {hashlib.sha256(content).hexdigest()}"


def _umask() -> int:
    mask = os.umask(0o077)
    os.umask(mask)
    return mask
