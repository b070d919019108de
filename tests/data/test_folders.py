"""Folders: splits that do not leak, and a decision for every file the world holds."""

import os
import struct
import sys
import warnings
import zlib

import fuzz_images
import numpy as np
import pytest
import torch
from PIL import Image

from arbscale import data
from arbscale.__main__ import main
from arbscale.data import ImageFolder, folders, images, load_image
from arbscale.data.folders import check_folder, partition
from arbscale.data.images import open_image


def photo(height=20, width=30, seed=0):
    """Return a random smooth PIL image."""
    small = np.random.default_rng(seed).integers(0, 256, (4, 5, 3), dtype=np.uint8)
    return Image.fromarray(small).resize((width, height), Image.Resampling.BICUBIC)


def save(path, count=1):
    """Save numbered images into a new folder."""
    path.mkdir(parents=True, exist_ok=True)
    for i in range(count):
        photo(seed=i).save(path / f"{i:04d}.png")
    return path


def names(dataset):
    return [path.relative_to(dataset.root).as_posix() for path in dataset.paths]


# Files that are converted: what is read, and what the check says of it


def turned(path):
    exif = Image.Exif()
    exif[0x0112] = 6  # turn clockwise to see it upright
    photo().save(path, exif=exif, quality=95)


def deep(channels):
    levels = (np.arange(20 * 30 * channels).reshape(20, 30, channels) * 27).astype(np.uint16)
    return levels[..., 0] if channels == 1 else levels


def tiff_of_48_bits(path):
    """Write an RGB TIFF of 16 bits a channel by hand, since PIL cannot."""
    pixels = deep(3).astype("<u2").tobytes()
    tags = [(256, 4, 1, 30), (257, 4, 1, 20), (258, 3, 3, 180), (259, 4, 1, 1), (262, 4, 1, 2)]
    tags += [(273, 4, 1, 200), (277, 4, 1, 3), (278, 4, 1, 20), (279, 4, 1, len(pixels))]
    head = b"II*\0" + struct.pack("<IH", 8, len(tags))
    head += b"".join(struct.pack("<HHII", *tag) for tag in tags)
    head = head.ljust(180, b"\0") + struct.pack("<HHH", 16, 16, 16)
    path.write_bytes(head.ljust(200, b"\0") + pixels)


def saved(image, **options):
    return lambda path: image.save(path, **options)


FRAMES = {"save_all": True, "append_images": [photo(seed=9)]}
CONVERTED = {
    "grey.png": (saved(photo().convert("L")), "greyscale"),
    "bits.tif": (saved(photo().convert("1")), "black and white"),
    "palette.png": (saved(photo().quantize(9)), "palette"),
    "cmyk.jpg": (saved(photo().convert("CMYK"), quality=95), "CMYK"),
    "cmyk.tif": (saved(photo().convert("CMYK")), "CMYK"),
    "alpha.png": (saved(photo().convert("RGBA")), "transparency"),
    "grey-alpha.png": (saved(photo().convert("LA")), "transparency"),
    "clear.gif": (saved(photo().quantize(9), transparency=2), "transparency"),
    "deep.png": (saved(Image.fromarray(deep(1))), "16 bits"),
    "deep.tif": (tiff_of_48_bits, "16 bits"),
    "turned.jpg": (turned, "EXIF"),
    "moving.gif": (saved(photo(), **FRAMES), "first"),
    "moving.png": (saved(photo(), **FRAMES), "first"),
    "moving.webp": (saved(photo(), lossless=True, **FRAMES), "first"),
    "pages.tif": (saved(photo(), **FRAMES), "first"),
    "truly-png.jpg": (saved(photo(), format="PNG"), "PNG by its content"),
    "plain.png": (saved(photo()), ""),
    "plain.bmp": (saved(photo()), ""),
    "\u732b \u0440\u044b\u0436\u0438\u0439 \U0001f408.png": (saved(photo()), ""),
}


@pytest.mark.parametrize("name", CONVERTED)
def test_an_image_is_converted_and_said_so(tmp_path, name):
    write, said = CONVERTED[name]
    write(tmp_path / name)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        read = ImageFolder(tmp_path)[0]
    assert read.shape == ((3, 30, 20) if name == "turned.jpg" else (3, 20, 30))
    (file,) = check_folder(tmp_path).files
    assert file.name == name and file.size == read.shape[1:] and not file.problem
    assert said in "; ".join(file.conversions) and bool(said) == bool(file.conversions)


def test_conversions_keep_the_colours(tmp_path):
    for name, tolerance in (
        ("cmyk.tif", 0.02),
        ("alpha.png", 1e-6),
        ("moving.png", 1e-6),
        ("moving.webp", 1e-6),
        ("pages.tif", 1e-6),
        ("truly-png.jpg", 1e-6),
    ):
        CONVERTED[name][0](tmp_path / name)
        difference = (data.load_image(tmp_path / name) - data.to_tensor(photo())).abs().max()
        assert difference < tolerance, name


def test_sixteen_bits_become_eight(tmp_path):
    tiff_of_48_bits(tmp_path / "rgb.tif")
    Image.fromarray(deep(1)).save(tmp_path / "grey.png")
    rgb, grey = ImageFolder(tmp_path, ["rgb.tif", "grey.png"])
    torch.testing.assert_close(rgb, data.to_tensor(deep(3)), atol=2 / 255, rtol=0)
    torch.testing.assert_close(grey, data.to_tensor(deep(1)), atol=1 / 255 + 1e-5, rtol=0)


def test_a_damaged_orientation_does_not_cost_the_image(tmp_path):
    exif = b"Exif\0\0MM\0*\xff\xff\xff\xff" + bytes(20)
    photo().save(tmp_path / "a.jpg", exif=exif)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # PIL's, which name no file
        assert data.load_image(tmp_path / "a.jpg").shape == (3, 20, 30)
    assert check_folder(tmp_path).files[0].conversions == ()


# Files that are skipped, refused or passed over


def bomb(path):
    """Write a PNG whose header claims 60,000 x 60,000 pixels."""

    def chunk(kind, body):
        crc = zlib.crc32(kind + body).to_bytes(4, "big")
        return len(body).to_bytes(4, "big") + kind + body + crc

    header = struct.pack(">IIBBBBB", 60_000, 60_000, 8, 2, 0, 0, 0)
    pixels = zlib.compress(bytes(60_000 * 3 + 1))
    body = chunk(b"IHDR", header) + chunk(b"IDAT", pixels) + chunk(b"IEND", b"")
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + body)


def cut(path, keep=0.6):
    big = np.random.default_rng(0).integers(0, 256, (90, 90, 3), dtype=np.uint8)
    Image.fromarray(big).save(path)
    path.write_bytes(path.read_bytes()[: int(keep * path.stat().st_size)])


SKIPPED = {  # by a look at the header
    "empty.png": (lambda path: path.touch(), "empty"),
    "text.jpg": (lambda path: path.write_text("hello"), "none of"),
    "script.jpg": (lambda path: photo().save(path, "EPS"), "none of"),  # a program, truly
    "header.png": (lambda path: cut(path, 0.0005), "none of"),
    "bomb.png": (bomb, "120,000,000 pixels"),
}


def test_files_that_are_not_images_are_skipped_and_counted(tmp_path):
    save(tmp_path, 3)
    for name, (write, _) in SKIPPED.items():
        write(tmp_path / name)
    with pytest.warns(UserWarning, match=f"{tmp_path}: 5 "):
        opened = ImageFolder(tmp_path)
    assert names(opened) == ["0000.png", "0001.png", "0002.png"]
    assert {path.name for path in opened.skipped} == set(SKIPPED)
    problems = {f.name: f.problem for f in check_folder(tmp_path).files if f.problem}
    for name, (_, said) in SKIPPED.items():
        assert said in problems[name] and said in opened.skipped[tmp_path / name]
        with pytest.raises(ValueError, match=name):
            data.load_image(tmp_path / name)


def test_an_image_over_the_limit_is_refused_before_it_is_decoded(tmp_path, monkeypatch):
    save(tmp_path, 1)
    monkeypatch.setattr(images, "MAX_PIXELS", 20 * 30)
    assert len(ImageFolder(tmp_path)) == 1
    monkeypatch.setattr(images, "MAX_PIXELS", 20 * 30 - 1)
    monkeypatch.setattr(images, "open_upright", lambda image: pytest.fail("decoded"))
    with pytest.raises(ValueError, match="20 x 30"):
        data.load_image(tmp_path / "0000.png")
    with pytest.warns(UserWarning, match="20 x 30"), pytest.raises(ValueError):
        ImageFolder(tmp_path)


@pytest.mark.parametrize(("side", "used"), [(9_800, True), (11_000, False), (14_000, False)])
def test_our_limit_of_pixels_is_the_only_one(tmp_path, side, used):
    """PIL warns from 89 million pixels on and refuses 179 million, in words of its own."""
    Image.new("1", (side, side)).save(tmp_path / "large.png")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        if used:
            with open_image(tmp_path / "large.png") as image:
                assert image.width == side
        else:
            with pytest.raises(ValueError, match="120,000,000"):
                load_image(tmp_path / "large.png")


def test_damage_found_while_reading_is_an_error_that_names_the_file(tmp_path):
    save(tmp_path, 2)
    cut(tmp_path / "0001.png")
    opened = ImageFolder(tmp_path)
    assert len(opened) == 2 and opened[0].shape == (3, 20, 30)
    with pytest.raises(ValueError, match=r"0001.png.*arbscale check"):
        opened[1]
    (tmp_path / "0000.png").unlink()
    assert opened[0].shape == (3, 20, 30)  # still in memory
    opened._cache.clear()
    with pytest.raises(FileNotFoundError, match=r"0000.png.*arbscale check"):
        opened[0]


@pytest.mark.parametrize(("kind", "said"), [("float32", "floats"), ("int32", "16 bits")])
def test_values_without_a_known_white_are_refused(tmp_path, kind, said):
    Image.fromarray(np.full((4, 4), 70_000, kind)).save(tmp_path / "a.tif")
    with pytest.raises(ValueError, match=f"a.tif.*{said}"):
        ImageFolder(tmp_path)[0]
    assert said in check_folder(tmp_path).files[0].problem


@pytest.mark.parametrize("ending", ["png", "jpg", "webp", "tif", "gif", "bmp"])
def test_no_part_of_a_truncated_image_is_taken_for_it(tmp_path, ending):
    pixels = np.random.default_rng(0).integers(0, 256, (30, 30, 3), dtype=np.uint8)
    path = tmp_path / f"a.{ending}"
    for keep in np.linspace(0.05, 0.95, 19):
        Image.fromarray(pixels).save(path)
        path.write_bytes(path.read_bytes()[: int(keep * path.stat().st_size)])
        with pytest.raises(ValueError, match=path.name):
            data.load_image(path)
        assert check_folder(tmp_path).files[0].problem


def test_no_damaged_pixels_are_taken_for_an_image(tmp_path):
    """PIL, asked again after a failure, may give what it has got so far."""
    photo(90, 90).save(tmp_path / "a.png")
    whole = (tmp_path / "a.png").read_bytes()
    first = whole.index(b"IDAT") + 4
    for place in range(first, first + 3000, 100):  # near the end PIL may not notice
        damaged = bytearray(whole)
        damaged[place] ^= 0x10
        (tmp_path / "a.png").write_bytes(bytes(damaged))
        with pytest.raises(ValueError, match="a.png"):
            data.load_image(tmp_path / "a.png")
        assert check_folder(tmp_path).files[0].problem


def test_a_training_goes_on_with_the_next_image(tmp_path):
    save(tmp_path, 4)
    cut(tmp_path / "0001.png")
    opened = ImageFolder(tmp_path, substitute=True)
    (tmp_path / "0002.png").unlink()  # deleted between listing and reading
    with pytest.warns(UserWarning) as caught:
        read = [opened[i] for i in range(4)]
    assert [str(w.message).partition(": ")[2][:2] for w in caught] == ["1 ", "2 "]
    expected = [data.load_image(tmp_path / f"{i:04d}.png") for i in (0, 3, 3, 3)]
    assert all(torch.equal(a, b) for a, b in zip(read, expected, strict=True))
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # each file is reported once
        assert torch.equal(opened[1], expected[1])
    for i in (0, 3):
        (tmp_path / f"{i:04d}.png").unlink()
    opened._cache.clear()
    with pytest.warns(UserWarning), pytest.raises(ValueError, match=str(tmp_path)):
        opened[0]


@pytest.mark.parametrize("split", ["train", "val"])
def test_only_training_substitutes(tmp_path, split):
    for folder in ("train", "val"):
        save(tmp_path / folder, 2)
        cut(tmp_path / folder / "0000.png")
    opened = data.open_dataset(tmp_path, split)
    if split == "train":
        with pytest.warns(UserWarning, match="0000.png"):
            assert torch.equal(opened[0], opened[1])
    else:
        with pytest.raises(ValueError, match="0000.png"):
            opened[0]


def test_what_is_not_looked_at(tmp_path):
    save(tmp_path, 1)
    (tmp_path / "folder.jpg").mkdir()
    save(tmp_path / ".thumbnails", 1)
    save(tmp_path / "__elsewhere" / "deep", 1)
    (tmp_path / ".hidden.png").touch()
    (tmp_path / "notes.md").touch()
    (tmp_path / "loop").symlink_to(tmp_path)
    (tmp_path / "broken.png").symlink_to(tmp_path / "nowhere.png")
    (tmp_path / "self.png").symlink_to(tmp_path / "self.png")
    (tmp_path / "linked.png").symlink_to(tmp_path / "0000.png")
    os.mkfifo(tmp_path / "pipe.png")  # reading it would wait for ever
    assert names(ImageFolder(tmp_path)) == ["0000.png", "__elsewhere/deep/0000.png", "linked.png"]
    passed = dict(check_folder(tmp_path).passed_over)
    assert {name: why.split()[-1] for name, why in passed.items()} == {
        ".hidden.png": "file",
        ".thumbnails": "folder",
        "broken.png": "file",
        "loop": "folder",
        "notes.md": "ending",
        "pipe.png": "file",
        "self.png": "file",
    }


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_permissions(tmp_path):
    save(tmp_path, 1)
    save(tmp_path / "closed", 1).chmod(0)
    photo().save(tmp_path / "secret.png")
    (tmp_path / "secret.png").chmod(0)
    try:
        with pytest.warns(UserWarning, match="secret.png.*Permission denied"):
            assert names(ImageFolder(tmp_path)) == ["0000.png"]
        assert ("closed", "a folder that cannot be listed") in check_folder(tmp_path).passed_over
    finally:
        (tmp_path / "closed").chmod(0o700)


def test_a_file_without_permission_is_skipped(tmp_path, monkeypatch):
    save(tmp_path, 2)
    opened = Image.open

    def refuse(path, *args, **kwargs):
        if path.name == "0001.png":
            raise PermissionError(13, "Permission denied", str(path))
        return opened(path, *args, **kwargs)

    monkeypatch.setattr(Image, "open", refuse)
    with pytest.warns(UserWarning, match="0001.png.*Permission denied"):
        assert names(ImageFolder(tmp_path)) == ["0000.png"]


@pytest.mark.skipif(sys.platform != "linux", reason="names are text on this system")
def test_a_name_that_is_no_text(tmp_path, capsys):
    path = os.fsencode(tmp_path) + b"/caf\xe9.png"
    photo().save(os.fsdecode(path))
    (tmp_path / "all.txt").write_bytes(b"caf\xe9.png\n")
    assert ImageFolder(tmp_path)[0].shape == (3, 20, 30)
    assert len(ImageFolder(tmp_path, tmp_path / "all.txt")) == 1
    assert partition(["caf\udce9.png", "b", "c"], "test")
    assert main(["check", str(tmp_path), "--list"]) == 0
    assert "20 x 30  caf\\udce9.png" in capsys.readouterr().out


def test_a_list_of_strange_names(tmp_path):
    strange = ["a\u2028b.png", "c\x0bd.png", "e\u00a0.png"]
    for name in strange:
        photo().save(tmp_path / name)
    (tmp_path / "all.txt").write_text("\r\n".join(strange), encoding="utf-8", newline="")
    assert names(ImageFolder(tmp_path, tmp_path / "all.txt")) == strange


def test_a_list_that_is_not_utf8_names_its_first_bad_line(tmp_path):
    save(tmp_path, 1)
    (tmp_path / "train.txt").write_bytes("0000.png\ncaf\u00e9.png\n".encode("latin-1"))
    with pytest.raises(FileNotFoundError, match="train.txt.*caf"):
        ImageFolder(tmp_path, tmp_path / "train.txt")


@pytest.mark.filterwarnings("ignore")
def test_mutated_files(tmp_path):
    outcomes = fuzz_images.fuzz(150, 3, tmp_path / "files")
    assert sum(outcomes.values()) == 150 and outcomes["read"] > 10 and outcomes["OSError"] > 30


# Splits


def test_a_partition_is_whole_and_does_not_overlap():
    files = [f"{i:04d}.png" for i in range(1000)]
    parts = [partition(files, split) for split in folders.SPLITS]
    assert [len(part) for part in parts] == [800, 100, 100]
    assert sorted(sum(parts, [])) == files
    assert partition(files[::-1], "val") == parts[1]
    assert partition(files, "val", seed=1) != parts[1]
    # A image that goes takes at most one other along, at each border.
    for split, part in zip(folders.SPLITS, parts, strict=True):
        assert len(set(part) - set(partition(files[1:], split))) <= 3


@pytest.mark.parametrize(
    ("parts", "counts"),
    [
        ((800, 100, 100), [800, 100, 100]),
        ((10, 5, 0), [10, 5, 0]),
        ((0.5, 0.25, 0.25), [500, 250, 250]),
        ((0.01, 0.001, 0.0001), [9, 1, 1]),
        ((0.9, 0.1, 0), [900, 100, 0]),
    ],
)
def test_parts_are_counts_or_fractions(parts, counts):
    files = [str(i) for i in range(1000)]
    for split, count in zip(folders.SPLITS, counts, strict=True):
        if count:
            assert len(partition(files, split, parts)) == count
        else:
            with pytest.raises(ValueError, match=split):
                partition(files, split, parts)


@pytest.mark.parametrize("parts", [(900, 100, 1), (-1, 5, 5), (0.8, 0.2, 0.1), (1.2, -0.1, -0.1)])
def test_impossible_parts_are_refused(parts):
    with pytest.raises(ValueError, match="parts="):
        partition([str(i) for i in range(1000)], "train", parts)


def test_open_a_folder_in_parts_and_subsets(tmp_path):
    save(tmp_path, 20)
    train = data.open_dataset(tmp_path, parts=(12, 4, 4), seed=3)
    assert len(train) == 12
    small, smaller = (data.open_dataset(tmp_path, "all", subset=n) for n in (8, 3))
    assert len(small) == 8 and set(smaller.indices) < set(small.indices)
    assert smaller.indices == data.open_dataset(tmp_path, "all", subset=3).indices
    assert small.indices != data.open_dataset(tmp_path, "all", subset=8, seed=1).indices
    assert torch.equal(small[2], data.open_dataset(tmp_path, "all")[small.indices[2]])
    assert len(data.open_dataset("scenes", "val", subset=7)) == 7
    for wrong in (0, 21):
        with pytest.raises(ValueError, match="20.*got"):
            data.open_dataset(tmp_path, "all", subset=wrong)


def test_open_sub_folders_as_splits(tmp_path):
    for split, count in (("train", 3), ("valid", 2)):
        save(tmp_path / split / "cat", count)
    assert names(data.open_dataset(tmp_path)) == ["cat/0000.png", "cat/0001.png", "cat/0002.png"]
    assert len(data.open_dataset(tmp_path, "val")) == 2
    with pytest.raises(ValueError, match="train, val"):
        data.open_dataset(tmp_path, "test")


def test_lists_beside_a_folder_keep_its_splits_apart(tmp_path):
    """A folder with some of the images, larger, follows the lists of the whole."""
    save(tmp_path / "images", 6)
    save(tmp_path / "large", 4)
    (tmp_path / "train.txt").write_text("0000.png\n0001.png\n0004.png\n")
    (tmp_path / "val.txt").write_text("0005.png\n")
    (tmp_path / "test.txt").write_text("0003.png\n0002.png\n")
    assert len(data.open_dataset(tmp_path)) == 3
    assert names(data.open_dataset(tmp_path / "large")) == ["0000.png", "0001.png"]
    assert names(data.open_dataset(tmp_path / "large", "test")) == ["0002.png", "0003.png"]
    with pytest.raises(ValueError, match="val.txt"):
        data.open_dataset(tmp_path / "large", "val")


# The command


def test_check_prints_what_would_be_used(tmp_path, capsys):
    save(tmp_path, 12)
    photo().convert("L").save(tmp_path / "grey.png")
    for i in range(7):
        (tmp_path / f"bad{i}.jpg").touch()
    cut(tmp_path / "cut.png")
    (tmp_path / "notes.md").touch()
    assert main(["check", str(tmp_path), "--list"]) == 0
    out = capsys.readouterr().out
    for line in (
        "13 of 21 ",
        "from 20 x 30 to 20 x 30",
        "     1 greyscale, to RGB: grey.png",
        "bad4.jpg and 2 more",
        "truncated",
        ": notes.md",
        "      20 x 30  0003.png\n",
        "train: 11\nval: 1\ntest: 2",  # of 17, 2 and 2 names
    ):
        assert line in out, line


def test_check_fails_where_nothing_can_be_used(tmp_path, capsys):
    (tmp_path / "bad.jpg").touch()
    assert main(["check", str(tmp_path)]) == 2
    captured = capsys.readouterr()
    assert "0 of 1" in captured.out and str(tmp_path) in captured.err
    assert main(["check", str(tmp_path / "none")]) == 2


def test_check_says_which_split_is_missing(tmp_path, capsys):
    save(tmp_path, 2)
    assert main(["check", str(tmp_path)]) == 0
    assert "val: none (2 " in capsys.readouterr().out


def test_a_file_deleted_during_the_check(tmp_path, monkeypatch):
    save(tmp_path, 1)
    monkeypatch.setattr("arbscale.data.folders.scan_folder", lambda root: (["gone.png"], []))
    assert check_folder(tmp_path).files[0].problem
