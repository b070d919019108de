"""Downloads, against a server on loopback that misbehaves, and archives that are no good."""

import hashlib
import io
import os
import socket
import struct
import subprocess
import sys
import threading
import zipfile
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import numpy as np
import pytest
from PIL import Image

from arbscale import data
from arbscale.__main__ import main
from arbscale.data import download as downloads

CONTENT = np.random.default_rng(0).bytes(300_000)
OTHER = np.random.default_rng(1).bytes(300_000)


def sha256(content):
    return hashlib.sha256(content).hexdigest()


class Server(ThreadingHTTPServer):
    """Answers request i by `script[i]`, the last for good, and notes what was asked."""

    daemon_threads = True

    def __init__(self):
        self.script, self.asked = [{}], []
        super().__init__(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server_port}/files/set.zip"


class Handler(BaseHTTPRequestHandler):
    """One answer; the script's words are its flaws.

    content, etag: what is served; ranges: False ignores Range; status: answer that; cut: close the
    connection after that many bytes; reset: break it instead; length: announce that; shift: begin
    a range elsewhere; chunked: announce nothing; condition: False ignores If-Range.
    """

    def log_message(self, *args):
        """Print nothing."""

    def do_GET(self):
        """Serve the content with the flaws of this request."""
        script = self.server.script
        self.server.asked.append(dict(self.headers))
        flaws = script[min(len(self.server.asked), len(script)) - 1]
        content, etag = flaws.get("content", CONTENT), flaws.get("etag", '"v1"')
        if "status" in flaws:
            return self.send_error(flaws["status"])
        start = self.start(content, etag, flaws)
        if start is None:
            return self.send_error(416)
        body = content[start:]
        self.send_response(206 if start else 200)
        if start:
            place = start + flaws.get("shift", 0)
            self.send_header("Content-Range", f"bytes {place}-{len(content) - 1}/{len(content)}")
        if etag:
            self.send_header("ETag", etag)
        if not flaws.get("chunked"):
            self.send_header("Content-Length", str(flaws.get("length", len(body))))
        self.end_headers()
        self.wfile.write(body[: flaws.get("cut", len(body))])
        self.wfile.flush()
        if flaws.get("reset"):
            linger = struct.pack("ii", 1, 0)
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
            return self.connection.close()
        self.connection.shutdown(socket.SHUT_WR)

    def start(self, content, etag, flaws):
        """Return where the answer begins."""
        asked = self.headers.get("Range", "")
        changed = self.headers.get("If-Range", etag) != etag and flaws.get("condition", True)
        if not asked or not flaws.get("ranges", True) or changed:
            return 0
        start = int(asked.removeprefix("bytes=").rstrip("-"))
        return start if start < len(content) else None


@pytest.fixture
def server(monkeypatch):
    monkeypatch.setattr(downloads, "WAIT", 0.0)
    monkeypatch.setattr(downloads, "_CHUNK", 10_000)
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
        server.script, server.asked = list(script), []
        path = tmp_path / "set.zip"
        downloads.fetch(server.url, path, len(content), sha256(content))
        return path

    return run


def left(folder):
    return sorted(path.name for path in folder.iterdir())


# Fetching


def test_a_file_arrives_whole_and_is_not_fetched_twice(fetch, server, tmp_path):
    assert fetch({}).read_bytes() == CONTENT
    assert left(tmp_path) == ["set.zip"]
    assert len(server.asked) == 1 and "Range" not in server.asked[0]
    fetch({"status": 500})
    assert server.asked == []


def test_dropped_connections_are_gone_on_with(fetch, server, tmp_path):
    path = fetch({"cut": 100_000}, {"cut": 50_000}, {"status": 503}, {"cut": 0}, {})
    assert path.read_bytes() == CONTENT and left(tmp_path) == ["set.zip"]
    ranges = [asked.get("Range") for asked in server.asked]
    assert ranges == [None, "bytes=100000-", *["bytes=150000-"] * 3]
    assert {asked.get("If-Range") for asked in server.asked[1:]} == {'"v1"'}


def test_broken_connections_are_gone_on_with(fetch, server):
    reset = {"reset": True, "cut": 100_000}
    assert fetch(reset, reset, reset, {}).read_bytes() == CONTENT and len(server.asked) <= 4


def test_a_later_call_goes_on(fetch, server, tmp_path):
    with pytest.raises(RuntimeError, match="100000 of 300000 bytes are kept"):
        fetch({"cut": 100_000}, {"status": 500})
    assert len(server.asked) == 1 + downloads.TRIES
    assert left(tmp_path) == ["set.zip.part", "set.zip.part.version"]
    assert fetch({}).read_bytes() == CONTENT
    assert server.asked[0]["Range"] == "bytes=100000-"


def test_a_killed_process_leaves_a_part_that_is_gone_on_with(fetch, server, tmp_path):
    """A real process, stopped without warning in the middle of the file."""
    arrived = threading.Event()

    def stall(handler):
        handler.send_response(200)
        handler.send_header("Content-Length", str(len(CONTENT)))
        handler.send_header("ETag", '"v1"')
        handler.end_headers()
        handler.wfile.write(CONTENT[:120_000])
        handler.wfile.flush()
        arrived.set()
        released.wait(30)

    released = threading.Event()
    original, Handler.do_GET = Handler.do_GET, stall
    code = (
        "import sys; from pathlib import Path; from arbscale.data import download as d\n"
        "d._CHUNK = 10_000; d.fetch(sys.argv[1], Path(sys.argv[2]), 300_000, sys.argv[3])"
    )
    path = tmp_path / "set.zip"
    words = [sys.executable, "-c", code, server.url, str(path), sha256(CONTENT)]
    try:
        process = subprocess.Popen(words, stderr=subprocess.DEVNULL, env=os.environ)
        assert arrived.wait(60)
        part = tmp_path / "set.zip.part"
        while process.poll() is None and not (part.exists() and part.stat().st_size >= 50_000):
            threading.Event().wait(0.01)
        process.kill()
        process.wait()
    finally:
        Handler.do_GET = original
        released.set()
    kept = (tmp_path / "set.zip.part").stat().st_size
    assert not path.exists() and 50_000 <= kept <= 120_000
    assert fetch({}).read_bytes() == CONTENT
    assert server.asked[0]["Range"] == f"bytes={kept}-"


def test_a_server_without_ranges_starts_anew(fetch, server):
    path = fetch({"cut": 100_000}, {"ranges": False, "cut": 200_000}, {"ranges": False})
    assert path.read_bytes() == CONTENT and len(server.asked) == 3


@pytest.mark.parametrize("cuts", [[100_000], [100_000, 50_000] * 20])
def test_a_server_without_ranges_that_always_drops_is_given_up(fetch, server, cuts):
    with pytest.raises(RuntimeError, match="tries brought nothing new"):
        fetch(*({"ranges": False, "cut": cut} for cut in cuts))
    assert len(server.asked) == 1 + downloads.TRIES


@pytest.mark.parametrize("condition", [True, False])
def test_content_that_changes_between_tries_is_not_mixed(fetch, server, condition):
    new = {"content": OTHER, "etag": '"v2"', "condition": condition}
    path = fetch({"cut": 100_000}, new, content=OTHER)
    assert path.read_bytes() == OTHER


def test_content_that_changes_unnoticed_fails_the_digest(fetch, server, tmp_path):
    with pytest.raises(ValueError, match="SHA-256"):
        fetch({"cut": 100_000, "etag": ""}, {"content": OTHER, "etag": ""})
    assert "If-Range" not in server.asked[1]
    assert left(tmp_path) == []
    assert fetch({}).read_bytes() == CONTENT


def test_a_weak_etag_names_no_version(fetch, server):
    fetch({"cut": 100_000, "etag": 'W/"v1"'}, {"etag": 'W/"v1"'})
    assert "If-Range" not in server.asked[1]


def test_other_content_is_refused(fetch, tmp_path):
    with pytest.raises(ValueError, match=f"wanted 300000 and {sha256(CONTENT)}"):
        fetch({"content": OTHER})
    assert left(tmp_path) == []


@pytest.mark.parametrize("length", [299_999, 300_001, 10, 0])
def test_a_wrong_announced_length_writes_nothing(fetch, server, tmp_path, length):
    with pytest.raises(RuntimeError, match=f"announces {length} bytes"):
        fetch({"length": length})
    (tmp_path / "set.zip.part").write_bytes(CONTENT[:1000])
    with pytest.raises(RuntimeError, match=f"announces {length} bytes"):
        fetch({"length": length, "ranges": False})
    assert (tmp_path / "set.zip.part").read_bytes() == CONTENT[:1000]
    assert fetch({"length": length}, {}).read_bytes() == CONTENT


def test_a_wrong_length_of_a_range_costs_a_try(fetch, server):
    assert fetch({"cut": 1000}, {"length": 500}, {"length": 10**9}, {}).read_bytes() == CONTENT


def test_an_unannounced_length_is_no_matter(fetch, tmp_path):
    assert fetch({"chunked": True}).read_bytes() == CONTENT
    (tmp_path / "set.zip").unlink()
    endless = CONTENT + OTHER  # more than wanted is not read
    path = fetch({"chunked": True, "content": endless})
    assert path.read_bytes() == CONTENT


def test_a_range_of_another_place_is_not_appended(fetch, server):
    assert fetch({"cut": 1000}, {"shift": 1}, {}).read_bytes() == CONTENT
    assert "Range" not in server.asked[2]


def test_a_part_longer_than_the_file_is_dropped(fetch, tmp_path):
    (tmp_path / "set.zip.part").write_bytes(CONTENT + b"more")
    with pytest.raises(ValueError, match="300004 bytes"):
        fetch({})
    assert fetch({}).read_bytes() == CONTENT
    (tmp_path / "set.zip").unlink()
    (tmp_path / "set.zip.part").write_bytes(CONTENT[:2000])
    shorter = {"content": CONTENT[:1000], "condition": False}
    assert fetch(shorter, {}).read_bytes() == CONTENT  # 416


@pytest.mark.parametrize("status", [403, 404, 410])
def test_a_missing_file_is_said_at_once(fetch, server, tmp_path, status):
    with pytest.raises(RuntimeError, match=rf"answered {status} .*by hand as .*set\.zip,"):
        fetch({"status": status})
    assert len(server.asked) == 1 and left(tmp_path) == []


def test_no_server_at_all(tmp_path, monkeypatch):
    monkeypatch.setattr(downloads, "WAIT", 0.0)
    monkeypatch.setenv("no_proxy", "*")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{free.getsockname()[1]}/set.zip"
    with pytest.raises(RuntimeError, match="refused"):
        downloads.fetch(url, tmp_path / "set.zip", 10, sha256(b""))


def test_a_silent_server_times_out(fetch, server, monkeypatch):
    monkeypatch.setattr(downloads, "TIMEOUT", 0.05)
    monkeypatch.setattr(downloads, "TRIES", 2)
    released = threading.Event()
    monkeypatch.setattr(Handler, "do_GET", lambda handler: released.wait(10))
    with pytest.raises(RuntimeError, match="timed out"):
        fetch({})
    released.set()


def test_a_file_put_there_by_hand_is_checked(fetch, server, tmp_path):
    (tmp_path / "set.zip").write_bytes(OTHER)
    with pytest.raises(ValueError, match="Delete it"):
        fetch({})
    assert server.asked == [] and (tmp_path / "set.zip").exists()


def test_a_full_disk_is_no_reason_to_try_again(fetch, server, monkeypatch):
    def full(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        fetch({})
    assert len(server.asked) == 1


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


def unpack(folder, content, pictures=3, members=None):
    (folder / "set.zip").write_bytes(content)
    downloads.unpack(folder / "set.zip", folder / "set", members or {"set": ""}, pictures)


def test_pictures_of_the_named_folders_alone_are_unpacked(tmp_path):
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
BAD = {
    "empty": (b"", "not a zip file"),
    "a page": (b"<html>moved</html>" * 99, "not a zip file"),
    "truncated": (WHOLE[:-60], "zip file"),
    "a flipped bit": (flipped(), "CRC"),
    "one missing": (packed(PICTURES[:2]), "2 pictures, wanted 3"),
    "one more": (packed([*PICTURES, ("set/4.png", b"")]), "4 pictures, wanted 3"),
    "a path upwards": (packed([*PICTURES, ("set/../../evil.png", b"")]), "outside"),
    "an absolute path": (packed([*PICTURES, ("/tmp/evil.png", b"")]), "outside"),
    "a drive": (packed([*PICTURES, ("c:evil.png", b"")]), "outside"),
    "a backslash": (packed([*PICTURES, ("..\\evil.png", b"")]), "outside"),
    "a link": (packed(link("/etc/passwd")), "a link or a device"),
    "a device": (device(), "a link or a device"),
    "encrypted": (encrypted(), "encrypted"),
}


@pytest.mark.parametrize("case", BAD)
def test_a_bad_archive_leaves_nothing(tmp_path, case):
    content, said = BAD[case]
    with pytest.raises(ValueError, match=f"(?i)set.zip is not unpacked.*{said}"):
        unpack(tmp_path, content)
    assert left(tmp_path) == ["set.zip"] and not (tmp_path.parent / "evil.png").exists()


@pytest.mark.filterwarnings("ignore:Duplicate name")
def test_a_repeated_name_and_a_bomb(tmp_path, monkeypatch):
    with pytest.raises(ValueError, match="twice"):
        unpack(tmp_path, packed([*PICTURES, PICTURES[0]]), 4)
    monkeypatch.setattr(downloads, "MAX_UNPACKED", 10**6)
    bomb = packed([*PICTURES[1:], ("set/0.png", bytes(2 * 10**6))], compression=8)
    assert len(bomb) < 10_000
    with pytest.raises(ValueError, match="more than 1000000 bytes"):
        unpack(tmp_path, bomb)
    # One that lies about its size is cut at the lie, and then fails its own checksum.
    lying = bytearray(bomb)
    for mark, place in ((b"PK\1\2", 24), (b"PK\3\4", 22)):
        begin = lying.rindex(mark) + place
        lying[begin : begin + 4] = (100).to_bytes(4, "little")
    with pytest.raises(ValueError, match="not unpacked"):
        unpack(tmp_path, bytes(lying))
    assert left(tmp_path) == ["set.zip"]


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
    with pytest.raises(ValueError, match="no picture"):
        data.open_dataset(tmp_path, "all")
    unpack(tmp_path, WHOLE)
    assert left(tmp_path) == ["set", "set.zip"]
    assert len(data.open_dataset(tmp_path / "set", "all")) == 3


def test_a_full_disk_while_unpacking(tmp_path, monkeypatch):
    def full(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(downloads.shutil, "copyfileobj", full)
    with pytest.raises(OSError, match="No space left"):
        unpack(tmp_path, WHOLE)
    assert left(tmp_path) == ["set.zip"]


# The command


@pytest.fixture
def cats(server, monkeypatch, tmp_path):
    """Let the command fetch a small AFHQ from the server; return its data folder."""
    files = [(f"afhq/train/cat/{i}.jpg", picture(i)) for i in range(4)]
    files += [("afhq/val/cat/8.jpg", picture(8)), ("afhq/val/dog/9.jpg", picture(9))]
    content = packed(files)
    server.script = [{"content": content}]
    (real,) = downloads.ARCHIVES["afhq"]
    small = replace(real, url=server.url, size=len(content), sha256=sha256(content), pictures=5)
    monkeypatch.setitem(downloads.ARCHIVES, "afhq", (small,))
    monkeypatch.setenv("ARBSCALE_DATA", str(tmp_path))
    return tmp_path


def test_the_command_fetches_what_open_dataset_opens(cats, server, capsys):
    assert main(["download", "afhq"]) == 0
    out = capsys.readouterr().out
    assert "afhq_cats is complete" in out and "CC BY-NC 4.0" in out
    assert left(cats) == ["afhq_cats"]  # the archive is removed
    assert [len(data.open_dataset("afhq_cats", s)) for s in ("train", "val", "all")] == [4, 1, 5]
    assert main(["download", "afhq"]) == 0 and len(server.asked) == 1
    (cats / "afhq_cats" / "val" / "8.jpg").unlink()
    assert main(["download", "afhq"]) == 2
    assert "holds 4 pictures, not 5" in capsys.readouterr().err


def test_the_command_into_another_folder(cats, tmp_path):
    assert main(["download", "afhq", "-o", str(tmp_path / "elsewhere")]) == 0
    assert len(data.open_dataset(tmp_path / "elsewhere" / "afhq_cats")) == 4


def test_the_command_refuses(cats, capsys, monkeypatch):
    assert main(["download", "imagenet"]) == 2
    assert "there are div2k, afhq" in capsys.readouterr().err
    usage = type("Usage", (), {"free": 1000})
    monkeypatch.setattr(downloads.shutil, "disk_usage", lambda folder: usage)
    assert main(["download", "afhq"]) == 2
    assert "make room" in capsys.readouterr().err
    monkeypatch.delenv("ARBSCALE_DATA")
    assert main(["download", "afhq"]) == 2
    assert "export ARBSCALE_DATA" in capsys.readouterr().err


def test_the_real_archives_are_described_alike():
    for name, archives in downloads.ARCHIVES.items():
        assert name in downloads.TERMS
        for archive in archives:
            assert archive.url.startswith("https://") and archive.name.endswith(".zip")
            assert len(bytes.fromhex(archive.sha256)) == 32
            assert archive.size < downloads.MAX_UNPACKED and archive.pictures
