"""Files written band by band: what is in them, and what is left after each kind of stop."""

import resource
import signal
import subprocess
import sys

import numpy as np
import pytest
import tifffile
import torch
from PIL import Image

from arbscale import ArbitraryScaleModel, presets, store
from arbscale.data import large, to_uint8
from arbscale.data.large import write_tiff

SIZE = (70, 41)


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch):
    monkeypatch.setattr(large, "TILE", 16)


@pytest.fixture
def image():
    return torch.rand(3, *SIZE, generator=torch.Generator().manual_seed(0)) * 2 - 1


def bands(image, height=7, stop=None, error=KeyboardInterrupt, rows=None):
    """Return a `bands(row)` that notes the rows that it was asked from, and may raise at `stop`."""

    def from_row(row):
        if rows is not None:
            rows.append(row)
        for top in range(row, SIZE[0], height):
            if stop is not None and top + height > stop:
                raise error
            yield image[:, top : top + height]

    return from_row


def pixels(image):
    return to_uint8(image).permute(1, 2, 0).numpy()


@pytest.mark.parametrize("height", [1, 7, 16, 33, 70])
def test_the_file_holds_the_image(image, tmp_path, height):
    path = tmp_path / "a.tif"
    write_tiff(path, SIZE, "key", bands(image, height))
    assert np.array_equal(tifffile.imread(path), pixels(image))
    with Image.open(path) as other:  # another reader: libtiff
        assert np.array_equal(np.asarray(other), pixels(image))
    with tifffile.TiffFile(path) as file:
        assert file.is_bigtiff and file.pages.first.is_tiled
    assert [p.name for p in tmp_path.iterdir()] == ["a.tif"]


@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError(28, "No space left on device")])
def test_a_stop_leaves_the_old_file_and_the_same_call_resumes(image, tmp_path, error):
    path = tmp_path / "a.tif"
    path.write_text("old")
    with pytest.raises(BaseException, match="a.tif.part.* 32 of 70") as stopped:
        write_tiff(path, SIZE, "key", bands(image, stop=45, error=error))
    assert isinstance(stopped.value, (KeyboardInterrupt, OSError))
    assert path.read_text() == "old"
    part = tifffile.imread(tmp_path / "a.tif.part")  # the draft can be looked at
    assert np.array_equal(part[:32], pixels(image)[:32]) and not part[32:].any()
    rows = []
    write_tiff(path, SIZE, "key", bands(image, rows=rows))
    assert rows == [32]
    assert np.array_equal(tifffile.imread(path), pixels(image))


@pytest.mark.parametrize("stray", [0, 1000])
def test_bytes_after_the_last_listed_tile_are_dropped(image, tmp_path, stray):
    """What a kill between a tile's pixels and its entry in the list leaves."""
    path, draft = tmp_path / "a.tif", tmp_path / "a.tif.part"
    with pytest.raises(KeyboardInterrupt):
        write_tiff(path, SIZE, "key", bands(image, stop=45))
    with draft.open("ab") as file:
        file.write(bytes(stray))
    write_tiff(path, SIZE, "key", bands(image))
    whole = tmp_path / "b.tif"
    write_tiff(whole, SIZE, "key", bands(image))
    assert path.read_bytes() == whole.read_bytes()


@pytest.mark.parametrize("change", ["key", "size", "damage"])
def test_a_draft_of_something_else_is_begun_anew(image, tmp_path, change):
    path, draft = tmp_path / "a.tif", tmp_path / "a.tif.part"
    size = (SIZE[0] + 1, SIZE[1]) if change == "size" else SIZE
    with pytest.raises(KeyboardInterrupt):
        write_tiff(path, size, "other" if change == "key" else "key", bands(image, stop=45))
    if change == "damage":
        draft.write_bytes(draft.read_bytes()[:100])
    rows = []
    write_tiff(path, SIZE, "key", bands(image, rows=rows))
    assert rows == [0]
    assert np.array_equal(tifffile.imread(path), pixels(image))


def test_a_whole_file_of_the_same_content_is_left(image, tmp_path):
    path, rows = tmp_path / "a.tif", []
    write_tiff(path, SIZE, "key", bands(image, rows=rows))
    write_tiff(path, SIZE, "key", bands(image, rows=rows))
    assert rows == [0]
    write_tiff(path, SIZE, "other", bands(-image, rows=rows))
    assert np.array_equal(tifffile.imread(path), pixels(-image))


def test_a_link_stays_a_link(image, tmp_path):
    (tmp_path / "disk").mkdir()
    (tmp_path / "a.tif").symlink_to("disk/b.tif")
    for content in (image, -image):
        write_tiff(tmp_path / "a.tif", SIZE, store.content_key(content), bands(content))
        assert (tmp_path / "a.tif").is_symlink()
        assert np.array_equal(tifffile.imread(tmp_path / "disk/b.tif"), pixels(content))
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["a.tif", "b.tif", "disk"]


def test_bands_that_end_too_early_make_no_file(image, tmp_path):
    with pytest.raises(ValueError, match="70"):
        write_tiff(tmp_path / "a.tif", SIZE, "key", lambda row: [image[:, row:50]])
    assert not (tmp_path / "a.tif").exists()


def test_a_refusal_leaves_no_draft(tmp_path):
    def refused(row):
        raise store.InputError("0 steps")

    with pytest.raises(ValueError, match="0 steps"):
        write_tiff(tmp_path / "a.tif", SIZE, "key", refused)
    assert not list(tmp_path.iterdir())


WORKER = """
import sys, time, torch
from arbscale.data import large
large.TILE = 16
def bands(row):
    for top in range(row, 1000):
        print(top, flush=True)
        yield torch.zeros(3, 16, 41)
        time.sleep(0.01)
large.write_tiff("a.tif", (16 * 1000, 41), "key", bands)
"""


@pytest.mark.slow
def test_kill_loses_one_row_of_tiles_at_most(tmp_path):
    worker = subprocess.Popen(
        [sys.executable, "-c", WORKER], cwd=tmp_path, stdout=subprocess.PIPE, text=True
    )
    for line in worker.stdout:
        if int(line) == 5:
            break
    with pytest.raises(RuntimeError, match=str(worker.pid)):  # one writer at a time
        write_tiff(tmp_path / "a.tif", SIZE, "key", lambda row: [])
    worker.send_signal(signal.SIGKILL)
    worker.wait()
    done = large._Tiles.read(tmp_path / "a.tif.part", (16 * 1000, 41), "key").done
    assert done >= 5
    assert not (tmp_path / "a.tif").exists()


def test_a_full_disk_is_said_and_resumed_from(image, tmp_path):
    path, limits = tmp_path / "a.tif", resource.getrlimit(resource.RLIMIT_FSIZE)
    before = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (5_000, limits[1]))
    try:
        with pytest.raises(OSError, match="a.tif.part"):
            write_tiff(path, SIZE, "key", bands(image))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, before)
    rows = []
    write_tiff(path, SIZE, "key", bands(image, rows=rows))
    assert rows[0] > 0
    assert np.array_equal(tifffile.imread(path), pixels(image))


def test_a_model_renders_to_a_file_what_it_decodes(tmp_path, monkeypatch):
    torch.manual_seed(0)
    model = ArbitraryScaleModel(presets.tiny()).eval()
    monkeypatch.setattr("arbscale.model.BAND", 300)
    z = torch.randn(1, 3, 5, 4, generator=torch.Generator().manual_seed(0))
    with pytest.raises(ValueError, match="2"):
        model.render_to(tmp_path / "a.tif", z.expand(2, -1, -1, -1), SIZE)
    model.render_to(tmp_path / "a.tif", z, SIZE)
    found = torch.from_numpy(tifffile.imread(tmp_path / "a.tif")).int()
    expected = torch.from_numpy(pixels(model.decode(z, SIZE)[0])).int()
    assert (found - expected).abs().max() <= 1  # rounding
    assert (
        store.content_key(SIZE, z, model._facts(), module=model.first_stage)
        in Image.open(tmp_path / "a.tif").tag_v2[305]
    )
