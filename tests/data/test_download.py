"""Downloads from a loopback server that misbehaves, and archives that are damaged or hostile."""

import hashlib
import io
import os
import signal
import stat
import subprocess
import sys
import threading
import time
import zipfile
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save

from arbscale import data
from arbscale.__main__ import main
from arbscale.autoencoder import TinyEncoder
from arbscale.compat import tiny_encoder
from arbscale.data import download as downloads

CONTENT = np.random.default_rng(0).bytes(300_000)
OTHER = np.random.default_rng(1).bytes(300_000)
WEIGHTS = Path(os.environ.get("ARBSCALE_WEIGHTS", "")).expanduser()
PUBLISHED = WEIGHTS / "taesd" / "taesd_encoder.safetensors"


def sha256(content):
    return hashlib.sha256(content).hexdigest()


class Server(ThreadingHTTPServer):
    """Answers request i by `script[i]`, the last for good, and counts what was asked."""

    daemon_threads = True

    def __init__(self):
        self.script, self.asked = [{}], 0
        super().__init__(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server_port}/files/set.zip?dl=1"


class Handler(BaseHTTPRequestHandler):
    """One answer; the script's words are its flaws.

    content: what is served; status: answer that; cut: close the connection after that many bytes;
    length: announce that; chunked: announce nothing; stall: wait for that event after the bytes.
    """

    def log_message(self, *args):
        """Print nothing."""

    def do_GET(self):
        """Serve the content with the flaws of this request."""
        script = self.server.script
        self.server.asked += 1
        flaws = script[min(self.server.asked, len(script)) - 1]
        content = flaws.get("content", CONTENT)
        if "status" in flaws:
            return self.send_error(flaws["status"])
        self.send_response(200)
        if not flaws.get("chunked"):
            self.send_header("Content-Length", str(flaws.get("length", len(content))))
        self.end_headers()
        self.wfile.write(content[: flaws.get("cut", len(content))])
        self.wfile.flush()
        if "stall" in flaws:
            flaws["stall"].wait(30)


@pytest.fixture
def server(monkeypatch):
    monkeypatch.setattr(downloads, "_CHUNK", 10_000)
    monkeypatch.setattr(time, "sleep", lambda seconds: None)  # before another try
    monkeypatch.setenv("no_proxy", "*")
    with Server() as running:
        thread = threading.Thread(target=running.serve_forever, args=(0.01,), daemon=True)
        thread.start()
        yield running
        running.shutdown()
        thread.join()


@pytest.fixture
def fetch(server, tmp_path):
    """Return a function that serves a script and fetches the file."""

    def run(*script, content=CONTENT):
        server.script, server.asked = list(script), 0
        path = tmp_path / "set.zip"
        downloads.fetch(server.url, path, len(content), sha256(content))
        return path

    return run


def left(folder):
    return sorted(path.name for path in folder.iterdir())


# Fetching


def test_a_file_arrives_whole_and_is_not_fetched_twice(fetch, server, tmp_path):
    path = fetch({})
    assert path.read_bytes() == CONTENT and left(tmp_path) == ["set.zip"]
    os.umask(mask := os.umask(0))
    assert stat.S_IMODE(path.stat().st_mode) == 0o666 & ~mask and server.asked == 1
    fetch({"status": 500})
    assert server.asked == 0


@pytest.mark.parametrize(
    "flaw",
    [
        {"cut": 100_000},
        {"status": 503},
        {"status": 404},
        {"length": 300_001},
        {"length": 10},
        {"content": OTHER},
        {"content": b""},
        {"chunked": True, "content": CONTENT + OTHER},
    ],
    ids="cut 503 404 longer shorter other empty endless".split(),
)
def test_a_flaw_costs_a_try_and_never_leaves_a_wrong_file(fetch, server, tmp_path, flaw):
    assert fetch(flaw, flaw, {}).read_bytes() == CONTENT and server.asked == 3
    (tmp_path / "set.zip").unlink()
    with pytest.raises((RuntimeError, ValueError), match="set.zip"):
        fetch(flaw)
    assert server.asked == 1 + downloads.RETRIES and left(tmp_path) == []


def test_other_content_names_both_digests(fetch):
    with pytest.raises(ValueError) as caught:
        fetch({"content": OTHER})
    assert sha256(CONTENT) in str(caught.value) and sha256(OTHER) in str(caught.value)


@pytest.mark.parametrize("status", [403, 404, 410])
def test_a_missing_file_can_be_fetched_by_hand(fetch, server, tmp_path, status):
    with pytest.raises(RuntimeError) as caught:
        fetch({"status": status})
    for fact in (status, server.url, tmp_path / "set.zip"):
        assert str(fact) in str(caught.value)


def test_an_unannounced_length_is_accepted(fetch):
    assert fetch({"chunked": True}).read_bytes() == CONTENT


def test_no_server_at_all(server, tmp_path):
    server.server_close()
    with pytest.raises(RuntimeError, match=str(server.server_port)):
        downloads.fetch(server.url, tmp_path / "set.zip", 10, sha256(b""))


@pytest.mark.slow
def test_a_silent_server_times_out(fetch, server, monkeypatch):
    monkeypatch.setattr(downloads, "TIMEOUT", 1.0)  # a busy machine may be late to count a request
    monkeypatch.setattr(downloads, "RETRIES", 1)
    released = threading.Event()
    with pytest.raises(RuntimeError, match="127.0.0.1"):
        fetch({"cut": 100, "stall": released})
    released.set()
    assert server.asked == 2


@pytest.mark.slow
def test_a_killed_download_leaves_nothing_that_stays(fetch, server, tmp_path):
    """A real process, stopped without warning in the middle of the file."""
    released = threading.Event()
    server.script = [{"cut": 120_000, "stall": released}]
    code = (
        "import sys; from pathlib import Path; from arbscale.data import download as d\n"
        "d._CHUNK = 10_000; d.fetch(sys.argv[1], Path(sys.argv[2]), 300_000, sys.argv[3])"
    )
    words = [sys.executable, "-c", code, server.url, str(tmp_path / "set.zip"), sha256(CONTENT)]
    process = subprocess.Popen(words, stderr=subprocess.DEVNULL)
    partial = tmp_path / ".set.zip.partial"
    while process.poll() is None and not sum(f.stat().st_size for f in partial.glob("*")) > 50_000:
        threading.Event().wait(0.01)
    with pytest.raises(RuntimeError, match="in use"):  # it takes nothing from the first
        fetch({})
    assert list(partial.iterdir())
    process.send_signal(signal.SIGKILL)
    process.wait()
    released.set()
    hidden = [".set.zip.lock", ".set.zip.partial"]  # so not taken for images
    assert left(tmp_path) == hidden
    assert fetch({}).read_bytes() == CONTENT and left(tmp_path) == ["set.zip"]


def test_a_file_put_there_by_hand_is_checked(fetch, server, tmp_path):
    (tmp_path / "set.zip").write_bytes(OTHER)
    with pytest.raises(ValueError, match=sha256(CONTENT)):
        fetch({})
    assert server.asked == 0 and (tmp_path / "set.zip").read_bytes() == OTHER


def test_a_full_disk_is_no_reason_to_try_again(fetch, server, monkeypatch, tmp_path):
    def full(*args, **options):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patched, pytest.raises(OSError) as caught:
        patched.setattr("pooch.core.hash_matches", full)
        fetch({})
    assert caught.value.errno == 28 and server.asked == 1 and left(tmp_path) == []
    usage = type("Usage", (), {"free": 1000})
    monkeypatch.setattr(downloads.shutil, "disk_usage", lambda folder: usage)
    with pytest.raises(OSError, match=str(tmp_path)):
        fetch({})
    assert server.asked == 0 and left(tmp_path) == []


# Unpacking


def picture(seed):
    buffer = io.BytesIO()
    pixels = np.random.default_rng(seed).integers(0, 256, (9, 8, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


def packed(files, **options):
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", **options) as archive:
        for name, content in files:
            archive.writestr(name, content)
    return buffer.getvalue()


PICTURES = [(f"set/{i}.png", picture(i)) for i in range(3)]


def unpack(folder, content, images=3, members=None):
    (folder / "set.zip").write_bytes(content)
    downloads.unpack(folder / "set.zip", folder / "set", members or {"set": ""}, images)


def test_images_of_the_named_folders_alone_are_unpacked(tmp_path):
    others = [
        ("set/notes.txt", b""),
        ("set/._0.png", b""),
        ("dogs/7.png", picture(7)),
        ("set/", b""),
    ]
    content = packed([*PICTURES, ("more/a/9.png", picture(9)), *others], compression=8)
    unpack(tmp_path, content, 4, {"set": "train", "more/a": "val"})
    found = {p.relative_to(tmp_path).as_posix(): p for p in (tmp_path / "set").rglob("*.png")}
    assert sorted(found) == [
        "set/train/0.png",
        "set/train/1.png",
        "set/train/2.png",
        "set/val/9.png",
    ]
    assert found["set/train/1.png"].read_bytes() == picture(1)
    assert left(tmp_path) == ["set", "set.zip"]


def link(target):
    info = zipfile.ZipInfo("set/3.png")
    info.external_attr = (0o120777 << 16) | 0
    return [*PICTURES, (info, target)]


def flipped():
    content = bytearray(packed(PICTURES))
    content[content.index(b"IDAT") + 20] ^= 1  # in the stored first picture
    return bytes(content)


def encrypted():
    content = bytearray(packed(PICTURES))
    for mark, place in ((b"PK\1\2", 8), (b"PK\3\4", 6)):
        content[content.index(mark) + place] |= 1
    return bytes(content)


def device():
    info = zipfile.ZipInfo("set/3.png")
    info.external_attr = 0o020666 << 16
    return packed([*PICTURES, (info, b"")])


WHOLE = packed(PICTURES)
BAD = {  # and the fact that the error names
    "empty": (b"", ""),
    "a page": (b"<html>moved</html>" * 99, ""),
    "truncated": (WHOLE[:-60], ""),
    "a flipped bit": (flipped(), "CRC"),
    "one missing": (packed(PICTURES[:2]), "2 "),
    "one more": (packed([*PICTURES, ("set/4.png", b"")]), "4 "),
    "a path upwards": (packed([*PICTURES, ("set/../../evil.png", b"")]), "evil.png"),
    "an absolute path": (packed([*PICTURES, ("/tmp/evil.png", b"")]), "evil.png"),
    "a drive": (packed([*PICTURES, ("c:evil.png", b"")]), "evil.png"),
    "a backslash": (packed([*PICTURES, ("..\\evil.png", b"")]), "evil.png"),
    "a link": (packed(link("/etc/passwd")), "3.png"),
    "a device": (device(), "3.png"),
    "encrypted": (encrypted(), "0.png"),
}


@pytest.mark.parametrize("case", BAD)
def test_a_bad_archive_leaves_nothing(tmp_path, case):
    content, said = BAD[case]
    with pytest.raises(ValueError, match=f"set.zip.*{said}"):
        unpack(tmp_path, content)
    assert left(tmp_path) == ["set.zip"] and not (tmp_path.parent / "evil.png").exists()


@pytest.mark.filterwarnings("ignore:Duplicate name")
def test_a_repeated_name_and_a_bomb(tmp_path, monkeypatch):
    with pytest.raises(ValueError, match="0.png"):
        unpack(tmp_path, packed([*PICTURES, PICTURES[0]]), 4)
    monkeypatch.setattr(downloads, "MAX_UNPACKED", 10**6)
    bomb = packed([*PICTURES[1:], ("set/0.png", bytes(2 * 10**6))], compression=8)
    assert len(bomb) < 10_000
    with pytest.raises(ValueError, match="1000000"):
        unpack(tmp_path, bomb)
    # One that lies about its size is cut at the lie, and then fails its own checksum.
    lying = bytearray(bomb)
    for mark, place in ((b"PK\1\2", 24), (b"PK\3\4", 22)):
        begin = lying.rindex(mark) + place
        lying[begin : begin + 4] = (100).to_bytes(4, "little")
    with pytest.raises(ValueError, match="set.zip"):
        unpack(tmp_path, bytes(lying))
    assert left(tmp_path) == ["set.zip"]


@pytest.mark.slow
def test_every_archive_with_a_flipped_bit_is_whole_or_refused(tmp_path):
    generator = np.random.default_rng(0)
    refused = 0
    for _ in range(400):
        content = bytearray(WHOLE)
        content[generator.integers(len(content))] ^= 1 << generator.integers(8)
        try:
            unpack(tmp_path, bytes(content))
        except ValueError:
            refused += 1
            assert left(tmp_path) == ["set.zip"]
        else:
            for name, expected in PICTURES:
                assert (tmp_path / name).read_bytes() == expected
                (tmp_path / name).unlink()
            (tmp_path / "set").rmdir()
    assert 100 < refused < 400


def test_a_stopped_unpacking_is_not_taken_for_a_data_set(tmp_path, monkeypatch):
    copies = []

    def stop(*args):
        copies.append(args)
        if len(copies) == 2:
            raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(downloads.shutil, "copyfileobj", stop)
        with pytest.raises(KeyboardInterrupt):
            unpack(tmp_path, WHOLE)
    assert left(tmp_path) == ["set.zip"]
    stale = tmp_path / ".set.partial"  # what a killed process leaves
    (stale / "deep").mkdir(parents=True)
    (stale / "0.png").write_bytes(b"half")
    with pytest.raises(ValueError, match=tmp_path.name):
        data.open_dataset(tmp_path, "all")
    unpack(tmp_path, WHOLE)
    assert left(tmp_path) == ["set", "set.zip"]
    assert len(data.open_dataset(tmp_path / "set", "all")) == 3


def test_a_full_disk_while_unpacking(tmp_path, monkeypatch):
    def full(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(downloads.shutil, "copyfileobj", full)
    with pytest.raises(OSError) as caught:
        unpack(tmp_path, WHOLE)
    assert caught.value.errno == 28 and left(tmp_path) == ["set.zip"]


# The command


@pytest.fixture
def cats(server, monkeypatch, tmp_path):
    """Let the command fetch a small AFHQ from the server; return its data folder."""
    files = [(f"afhq/train/cat/{i}.jpg", picture(i)) for i in range(4)]
    files += [("afhq/val/cat/8.jpg", picture(8)), ("afhq/val/dog/9.jpg", picture(9))]
    content = packed(files)
    server.script = [{"content": content}]
    (real,) = downloads.FILES["afhq"]
    small = replace(real, url=server.url, size=len(content), sha256=sha256(content), images=5)
    monkeypatch.setitem(downloads.FILES, "afhq", (small,))
    monkeypatch.setenv("ARBSCALE_DATA", str(tmp_path))
    return tmp_path


def test_the_command_fetches_what_open_dataset_opens(cats, server, capsys):
    assert main(["download", "afhq"]) == 0
    out = capsys.readouterr().out
    assert str(cats / "afhq_cats") in out and downloads.TERMS["afhq"] in out
    assert left(cats) == ["afhq_cats"]  # the archive is removed
    assert [len(data.open_dataset("afhq_cats", s)) for s in ("train", "val", "all")] == [4, 1, 5]
    assert main(["download", "afhq"]) == 0 and server.asked == 1
    (cats / "afhq_cats" / "val" / "8.jpg").unlink()
    with pytest.raises(ValueError, match="4 images, wanted 5"):
        downloads.download("afhq")


def test_the_command_into_another_folder(cats, tmp_path):
    assert main(["download", "afhq", "-o", str(tmp_path / "elsewhere")]) == 0
    assert len(data.open_dataset(tmp_path / "elsewhere" / "afhq_cats")) == 4


def test_the_command_refuses(cats, capsys, monkeypatch):
    with pytest.raises(ValueError, match=", ".join(downloads.FILES)):
        downloads.download("imagenet")
    monkeypatch.delenv("ARBSCALE_DATA")
    assert main(["download", "afhq"]) == 2
    assert "ARBSCALE_DATA" in capsys.readouterr().err
    monkeypatch.chdir(cats)
    assert main(["download", "afhq", "-o", "~no-such-user"]) == 0  # so a folder of that name
    assert (cats / "~no-such-user/afhq_cats").is_dir()


def test_an_encoder_goes_to_the_weights(server, monkeypatch, tmp_path):
    torch.manual_seed(0)
    weights = {k.partition("layers.")[2]: v for k, v in TinyEncoder(8, 4).state_dict().items()}
    content = save(weights)
    server.script = [{"content": content}]
    (real,) = downloads.FILES["taesd"]
    small = replace(real, url=server.url, size=len(content), sha256=sha256(content))
    monkeypatch.setitem(downloads.FILES, "taesd", (small,))
    monkeypatch.delenv("ARBSCALE_DATA", raising=False)
    monkeypatch.delenv("ARBSCALE_WEIGHTS", raising=False)
    with pytest.raises(FileNotFoundError, match="ARBSCALE_WEIGHTS"):
        downloads.download("taesd")
    monkeypatch.setenv("ARBSCALE_WEIGHTS", str(tmp_path))
    (path,) = downloads.download("taesd")
    assert path == tmp_path / "taesd" / "taesd_encoder.safetensors"
    encoder = tiny_encoder(load_file(path))
    assert torch.equal(encoder.state_dict()["layers.0.weight"], weights["0.weight"])
    assert downloads.download("taesd") == [path] and server.asked == 1
    assert downloads.download("taesd", tmp_path / "other")[0].is_relative_to(tmp_path / "other")
    path.write_bytes(b"")
    with pytest.raises(ValueError, match=path.name):
        downloads.download("taesd")


@pytest.mark.skipif(not PUBLISHED.is_file(), reason="ARBSCALE_WEIGHTS names no folder with taesd/")
def test_the_encoder_is_the_one_that_is_described():
    (file,) = downloads.FILES["taesd"]
    assert PUBLISHED.stat().st_size == file.size
    assert downloads.download("taesd") == [PUBLISHED]  # it has the digest, so nothing is fetched


def test_the_real_files_are_described_alike():
    assert downloads.FILES.keys() == downloads.TERMS.keys()
    for file in sum(downloads.FILES.values(), ()):
        assert file.url.startswith("https://") and len(bytes.fromhex(file.sha256)) == 32
        assert file.size < downloads.MAX_UNPACKED and bool(file.members) == bool(file.images)
        assert bool(file.members) == (".zip" in file.url)
