"""Images in and out, resizing against PIL, splits that do not leak, hostile files."""

import numpy as np
import pytest
import torch
from PIL import Image

from arbscale import data
from arbscale.data import folders


def photo(height=40, width=60, seed=0):
    """Return a random smooth array (H, W, 3) of uint8."""
    small = np.random.default_rng(seed).integers(0, 256, (6, 8, 3), dtype=np.uint8)
    return np.asarray(Image.fromarray(small).resize((width, height), Image.Resampling.BICUBIC))


@pytest.fixture
def folder(tmp_path):
    """Return a folder of twelve images, two of them in a sub-folder."""
    (tmp_path / "sub").mkdir()
    for i in range(12):
        path = tmp_path / ("sub" if i > 9 else ".") / f"{i:02d}.png"
        Image.fromarray(photo(24 + i, 30, i)).save(path)
    (tmp_path / "notes.md").write_text("no image")
    (tmp_path / ".hidden.png").write_bytes(b"not a image")
    return tmp_path


# Images in and out


def test_uint8_round_trip_is_exact():
    levels = torch.arange(256, dtype=torch.uint8).repeat(3).view(16, 16, 3)
    tensor = data.to_tensor(levels.numpy())
    assert tensor.shape == (3, 16, 16) and tensor.dtype == torch.float32
    assert tensor.min() == -1 and tensor.max() == 1
    assert np.array_equal(np.asarray(data.to_pil(tensor)), levels.numpy())
    assert torch.equal(data.to_tensor(levels.permute(2, 0, 1)), tensor)
    assert torch.equal(data.to_tensor(tensor), tensor)


def test_transparency_is_laid_on_white():
    rgba = np.zeros((2, 2, 4), np.uint8)
    rgba[0, 0] = (255, 0, 0, 255)
    rgba[0, 1] = (0, 0, 0, 128)
    for image in (rgba, Image.fromarray(rgba)):
        tensor = data.to_tensor(image)
        assert tensor[:, 0, 0].tolist() == [1, -1, -1]
        assert tensor[:, 1, 1].tolist() == [1, 1, 1]
        assert abs(tensor[0, 0, 1]) < 0.01
    deep = data.to_tensor(rgba.astype(np.uint16) * 257)
    torch.testing.assert_close(deep, data.to_tensor(rgba), atol=0.01, rtol=0)
    assert data.to_tensor(Image.fromarray(rgba[..., [0, 3]].copy()))[:, 1, 1].tolist() == [1, 1, 1]


def test_transparent_palette(tmp_path):
    image = Image.fromarray(photo()).quantize(8)
    opaque = data.to_tensor(image)
    image.save(tmp_path / "p.png", transparency=int(np.asarray(image)[0, 0]))
    read = data.load_image(tmp_path / "p.png")
    assert read[:, 0, 0].tolist() == [1, 1, 1]
    shown = torch.from_numpy(np.asarray(image) != np.asarray(image)[0, 0])
    assert torch.equal(read[:, shown], opaque[:, shown])


@pytest.mark.parametrize("mode", ["1", "L", "P", "CMYK", "YCbCr", "HSV", "LA", "RGBA"])
def test_every_mode_becomes_rgb(mode):
    image = Image.fromarray(photo()).convert(mode)
    tensor = data.to_tensor(image)
    assert tensor.shape == (3, 40, 60) and tensor.abs().max() <= 1
    expected = data.to_tensor(np.asarray(image.convert("RGB")))
    torch.testing.assert_close(tensor, expected, atol=0.01, rtol=0)


def test_sixteen_bits_keep_their_depth(tmp_path):
    levels = (np.arange(65536, dtype=np.uint16)[::16].reshape(64, 64)).copy()
    Image.fromarray(levels).save(tmp_path / "deep.png")
    tensor = data.load_image(tmp_path / "deep.png")
    assert tensor.shape == (3, 64, 64) and len(tensor.unique()) == 4096
    torch.testing.assert_close(tensor, data.to_tensor(levels))
    with pytest.raises(ValueError, match="16 bits"):
        data.to_tensor(Image.fromarray(np.full((4, 4), 70_000, np.int32)))


def test_exif_orientation_is_applied(tmp_path):
    array = np.zeros((20, 40, 3), np.uint8)
    array[:, :20] = 255  # left half white
    exif = Image.Exif()
    exif[0x0112] = 6  # turn clockwise to see it upright
    Image.fromarray(array).save(tmp_path / "turned.jpg", exif=exif, quality=95)
    tensor = data.load_image(tmp_path / "turned.jpg")
    assert tensor.shape == (3, 40, 20)
    assert tensor[:, :18].min() > 0.9 and tensor[:, 22:].max() < -0.9


@pytest.mark.parametrize(
    "wrong",
    [
        np.zeros((4, 4, 3)),  # floats: which range?
        np.zeros((4, 4, 2), np.uint8),
        np.zeros((0, 4, 3), np.uint8),
        np.zeros((1, 4, 4, 3), np.uint8),
        torch.zeros(4, 4, 3),
        torch.zeros(1, 3, 4, 4),
        torch.full((3, 4, 4), 255.0),
        torch.full((3, 4, 4), float("nan")),
        torch.zeros(3, 4, 4, dtype=torch.int64),
        Image.new("F", (4, 4)),
        Image.new("RGB", (0, 4)),
        "picture.png",
        None,
    ],
)
def test_what_is_no_image_is_refused(wrong):
    with pytest.raises(ValueError):
        data.to_tensor(wrong)


def test_to_pil_clamps_and_refuses():
    assert data.to_pil(torch.full((3, 1, 1), 7.0)).getpixel((0, 0)) == (255, 255, 255)
    for wrong in (torch.zeros(1, 3, 4, 4), torch.full((3, 2, 2), float("inf")), torch.ones(3, 2)):
        with pytest.raises(ValueError):
            data.to_pil(wrong)


def test_unreadable_files_say_which(tmp_path):
    (tmp_path / "empty.png").touch()
    (tmp_path / "text.jpg").write_text("hello")
    Image.fromarray(photo(200, 200)).save(tmp_path / "whole.jpg")
    whole = (tmp_path / "whole.jpg").read_bytes()
    (tmp_path / "cut.jpg").write_bytes(whole[: len(whole) // 2])
    for name in ("empty.png", "text.jpg", "cut.jpg"):
        with pytest.raises(ValueError, match=name):
            data.load_image(tmp_path / name)
    for missing in (tmp_path / "none.png", tmp_path):
        with pytest.raises(FileNotFoundError, match=str(missing)):
            data.load_image(missing)


# Resizing and cropping


@pytest.mark.parametrize("size", [(20, 30), (7, 59), (13, 100), (100, 151), (1, 1), (40, 60)])
def test_resize_is_pils_bicubic(size):
    ours = np.asarray(data.to_pil(data.resize(data.to_tensor(photo()), size))).astype(int)
    pil = Image.fromarray(photo()).resize(size[::-1], Image.Resampling.BICUBIC)
    assert np.abs(ours - np.asarray(pil).astype(int)).max() <= 1


def test_resize_takes_batches_and_clamps():
    batch = torch.stack([data.to_tensor(photo(seed=i)) for i in range(3)])
    assert torch.equal(data.resize(batch, 17)[1], data.resize(batch[1], 17))
    edge = torch.ones(3, 8, 8)
    edge[:, :, :4] = -1
    assert data.resize(edge, 64).abs().max() <= 1
    for wrong in (torch.zeros(8, 8), torch.zeros(3, 8, 8, dtype=torch.uint8)):
        with pytest.raises(ValueError, match=r"\(3, H, W\)"):
            data.resize(wrong, 4)
    with pytest.raises(ValueError, match="size"):
        data.resize(edge, (4, 0))


def test_random_crop_reaches_every_place():
    image = torch.arange(25.0).view(1, 5, 5).expand(3, 5, 5)
    generator = torch.Generator().manual_seed(0)
    corners = {data.random_crop(image, 3, generator)[0, 0, 0].item() for _ in range(200)}
    assert corners == {0, 1, 2, 5, 6, 7, 10, 11, 12}


def test_random_crop_reflects_what_is_too_small():
    image = torch.arange(3.0).view(1, 1, 3).expand(3, 1, 3)
    generator = torch.Generator().manual_seed(0)
    seen = set()
    for _ in range(50):
        crop = data.random_crop(image, (4, 5), generator)
        assert crop.shape == (3, 4, 5) and torch.equal(crop[:, 0], crop[:, 3])
        seen.add(tuple(int(v) for v in crop[0, 0]))
    assert seen == {(0, 1, 2, 2, 1), (0, 0, 1, 2, 2), (1, 0, 0, 1, 2)}
    assert data.random_crop(torch.zeros(3, 1, 1), 50, generator).shape == (3, 50, 50)


@pytest.mark.parametrize("scale", [1, 1.5, 2, 2.7, 3.3, 4, 7.9, 12, 37])
def test_low_high_pair_sizes_agree(scale):
    for height, width in ((37, 64), (101, 73), (96, 96)):
        low, high = data.low_high_pair(torch.zeros(3, height, width), scale)
        for small, large, n in zip(low.shape[1:], high.shape[1:], (height, width), strict=True):
            assert large == round(scale * small) <= n < round(scale * (small + 1))


def test_low_high_pair_is_the_reduction_of_the_crop():
    image = data.to_tensor(photo(41, 62))
    low, high = data.low_high_pair(image, 4)
    assert torch.equal(high, image[:, :40, :60]) and torch.equal(low, data.resize(high, (10, 15)))
    for scale in (0.5, 42, float("nan"), float("inf"), -1):
        with pytest.raises(ValueError, match="41.*got"):
            data.low_high_pair(image, scale)


# Data sets


def test_scenes_are_fixed_and_splits_disjoint():
    train = data.ContinuousScenes(20, size=16)
    assert len(train) == 20 and train[3].shape == (3, 16, 16) and train[3].abs().max() <= 1
    assert torch.equal(train[3], data.ContinuousScenes(5, size=16)[3])
    torch.testing.assert_close(train.batch(2, 3)[1], train[3])
    torch.testing.assert_close(train[-1], train[19])
    others = [data.ContinuousScenes(20, size=16, split=s)[3] for s in ("val", "test")]
    assert not any(torch.allclose(train[3], other) for other in others)
    assert sum(1 for _ in data.ContinuousScenes(4, size=8)) == 4
    for wrong in ({"split": "Train"}, {"count": 0}, {"size": 0}):
        with pytest.raises(ValueError):
            data.ContinuousScenes(**wrong)


def test_sample_photos_need_no_network(monkeypatch):
    import socket

    def refuse(*args, **kwargs):
        raise AssertionError("a connection was attempted")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    photos = data.sample_photos()
    assert {"astronaut", "cat", "coffee"} <= set(photos)
    for tensor in photos.values():
        assert tensor.shape[0] == 3 and min(tensor.shape[1:]) >= 256 and tensor.abs().max() <= 1
    parts = [data.open_dataset("photos", split) for split in folders.SPLITS]
    assert sum(map(len, parts)) == len(photos) and all(parts)


def test_folder_is_sorted_and_cached(folder, monkeypatch):
    images = data.ImageFolder(folder)
    names = [path.relative_to(folder).as_posix() for path in images.paths]
    assert names == [f"{i:02d}.png" for i in range(10)] + ["sub/10.png", "sub/11.png"]
    first = images[0]
    assert torch.equal(first, data.load_image(folder / "00.png"))
    monkeypatch.setattr(folders, "load_pixels", lambda path: pytest.fail("decoded twice"))
    first.zero_()  # what a user does to a image does not reach the cache
    assert not torch.equal(images[0], first)
    with pytest.raises(IndexError):
        images[12]


def test_cache_is_bounded(folder, monkeypatch):
    monkeypatch.setattr(folders, "CACHE_BYTES", 5000)
    images = data.ImageFolder(folder)
    assert all(torch.equal(images[i], images[i]) for i in range(12))
    assert 0 < images._cached_bytes <= 5000


def test_split_list(folder):
    listing = folder / "train.txt"
    listing.write_bytes("\ufeff03.png\r\n\r\nsub/11.png\r\n 01.png \n".encode())
    images = data.ImageFolder(folder, listing)
    assert [path.name for path in images.paths] == ["03.png", "11.png", "01.png"]
    listing.write_text("99.png\n")
    with pytest.raises(FileNotFoundError, match="99.png"):
        data.ImageFolder(folder, listing)
    for outside in ("../secret.png", "/etc/passwd"):
        listing.write_text(outside)
        with pytest.raises(ValueError, match="train.txt"):
            data.ImageFolder(folder, listing)
    listing.write_text("\n")
    with pytest.raises(ValueError, match="train.txt"):
        data.ImageFolder(folder, listing)
    with pytest.raises(FileNotFoundError, match="none.txt"):
        data.ImageFolder(folder, folder / "none.txt")


def test_folders_that_hold_nothing(tmp_path):
    with pytest.raises(ValueError, match=str(tmp_path)):
        data.ImageFolder(tmp_path)
    with pytest.raises(FileNotFoundError, match="none"):
        data.ImageFolder(tmp_path / "none")


def test_patches_are_a_function_of_seed_index_and_epoch(folder):
    images = data.ImageFolder(folder)
    patches, again = data.PatchDataset(images, 16, seed=5), data.PatchDataset(images, 16, seed=5)
    assert len(patches) == 12 and patches[4].shape == (3, 16, 16)
    first = patches[4]
    assert torch.equal(again[4], first)
    patches.epoch = 1
    assert not torch.equal(patches[4], first)
    patches.epoch = 0
    assert torch.equal(patches[4], first)
    assert not torch.equal(data.PatchDataset(images, 16, seed=6)[4], first)


def test_patches_are_crops_and_their_mirror_images():
    image = torch.rand(3, 1, 3)
    patches = data.PatchDataset([image], (1, 3))
    flipped = []
    for patches.epoch in range(60):
        crop = patches[0]
        flipped.append(torch.equal(crop, image.flip(-1)))
        assert flipped[-1] or torch.equal(crop, image)
    assert 15 < sum(flipped) < 45


def test_patches_through_a_loader(folder):
    patches = data.PatchDataset(data.ImageFolder(folder), 48)  # larger than the images
    loader = torch.utils.data.DataLoader(patches, batch_size=4)
    assert [batch.shape for batch in loader] == [(4, 3, 48, 48)] * 3


# Opening by name


def test_data_root(monkeypatch, tmp_path):
    monkeypatch.delenv("ARBSCALE_DATA", raising=False)
    with pytest.raises(FileNotFoundError, match="'sr'.*ARBSCALE_DATA"):
        data.open_dataset("sr")
    monkeypatch.setenv("ARBSCALE_DATA", str(tmp_path / "none"))
    with pytest.raises(FileNotFoundError, match=str(tmp_path / "none")):
        data.data_root()
    monkeypatch.setenv("ARBSCALE_DATA", str(tmp_path))
    assert data.data_root() == tmp_path
    with pytest.raises(FileNotFoundError, match="sr"):
        data.open_dataset("sr")


def test_open_a_folder_with_lists(folder, monkeypatch):
    (folder / "train.txt").write_text("00.png\n01.png\n")
    (folder / "val.txt").write_text("10.png\n")  # starts at images/
    (folder / "sub").rename(folder / "images")
    monkeypatch.setenv("ARBSCALE_DATA", str(folder.parent))
    assert len(data.open_dataset(folder.name)) == 2
    assert len(data.open_dataset(folder, "val")) == 1
    assert len(data.open_dataset(str(folder), "all")) == 12
    with pytest.raises(FileNotFoundError, match="test.txt.*train, val"):
        data.open_dataset(folder, "test")


def test_open_a_folder_without_lists(folder):
    parts = [data.open_dataset(folder, split).paths for split in folders.SPLITS]
    assert [len(part) for part in parts] == [10, 1, 1]
    assert len({path for part in parts for path in part}) == 12
    assert data.open_dataset(folder, "val").paths == parts[1]
    with pytest.raises(ValueError, match=", ".join(folders.SPLITS)):
        data.open_dataset(folder, "validation")
    with pytest.raises(ValueError, match="^2 "):
        data.open_dataset(folder / "sub")


def test_open_div2k(tmp_path):
    for name, n in (("DIV2K_train_HR", 3), ("DIV2K_valid_HR", 2)):
        (tmp_path / name).mkdir()
        for i in range(n):
            Image.fromarray(photo(8, 8)).save(tmp_path / name / f"{i:04d}.png")
    assert len(data.open_dataset(tmp_path)) == 3 and len(data.open_dataset(tmp_path, "val")) == 2
    with pytest.raises(ValueError, match="train, val"):
        data.open_dataset(tmp_path, "test")


def test_open_scenes():
    assert data.open_dataset("scenes", "val")[0].shape == (3, 64, 64)
    with pytest.raises(ValueError, match=", ".join(folders.SPLITS)):
        data.open_dataset("scenes", "both")


@pytest.mark.parametrize("name", ["scenes", "photos"])
def test_all_of_a_set_without_files_is_its_splits_together(name):
    whole, parts = (
        data.open_dataset(name, "all"),
        [data.open_dataset(name, split) for split in folders.SPLITS],
    )
    assert len(whole) == sum(map(len, parts))
    places = range(8) if name == "photos" else (0, 10_000, 11_000)
    for part in parts:
        assert any(torch.equal(part[0], whole[i]) for i in places)


# torchvision's data sets, as it would find them on a disk


@pytest.fixture
def root(tmp_path, monkeypatch):
    monkeypatch.setenv("ARBSCALE_DATA", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def write(path, seed):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(photo(seed=seed)).save(path)


@pytest.mark.slow
def test_celeba(root, monkeypatch):
    from torchvision.datasets import CelebA

    with pytest.raises(FileNotFoundError, match="CelebA"):
        data.open_dataset("celeba")
    names = [f"{i:06d}.jpg" for i in range(1, 8)]
    for i, name in enumerate(names):
        write(root / "celeba" / "img_align_celeba" / name, i)
    tables = {
        "list_eval_partition.txt": [f"{n} {s}" for n, s in zip(names, "0001122", strict=True)],
        "identity_CelebA.txt": [f"{n} 7" for n in names],
        "list_bbox_celeba.txt": ["7", "image_id x"] + [f"{n} 1" for n in names],
        "list_landmarks_align_celeba.txt": ["7", "x"] + [f"{n} 1" for n in names],
        "list_attr_celeba.txt": ["7", "Smiling"] + [f"{n} 1" for n in names],
    }
    for name, lines in tables.items():
        (root / "celeba" / name).write_text("\n".join(lines) + "\n")
    # The digests are those of the real tables, which these are not.
    monkeypatch.setattr(CelebA, "_check_integrity", lambda self: True)
    parts = [data.open_dataset("celeba", split) for split in (*folders.SPLITS, "all")]
    assert [len(part) for part in parts] == [3, 2, 2, 7]
    expected = data.load_image(root / "celeba" / "img_align_celeba" / "000005.jpg")
    assert torch.equal(parts[1][1], expected) and torch.equal(parts[1][-1], expected)
    assert len(data.open_dataset("celeba", subset=2)) == 2
    with pytest.raises(IndexError):
        parts[2][2]
    with pytest.raises(ValueError, match=", ".join(folders.SPLITS)):
        data.open_dataset("celeba", "valid")


@pytest.mark.slow
def test_flowers102(root, monkeypatch):
    from scipy.io import savemat
    from torchvision.datasets import Flowers102

    with pytest.raises(FileNotFoundError, match="Flowers102"):
        data.open_dataset("flowers102")
    base = root / "flowers-102"
    for i in range(1, 5):
        write(base / "jpg" / f"image_{i:05d}.jpg", i)
    savemat(base / "setid.mat", {"trnid": [[1, 4]], "valid": [[2, 2]], "tstid": [[3, 3]]})
    savemat(base / "imagelabels.mat", {"labels": [[1, 2, 3, 4]]})
    monkeypatch.setattr(Flowers102, "_check_integrity", lambda self: True)
    train = data.open_dataset("flowers102")
    assert len(train) == 2 and torch.equal(
        train[1], data.load_image(base / "jpg" / "image_00004.jpg")
    )
    assert len(data.open_dataset("flowers102", "all")) == 6


class FakeEnvironment:
    """As much of an LMDB environment as torchvision's LSUN asks for."""

    def __init__(self, records):
        self.records = records

    def begin(self, write):
        return self

    def __enter__(self):
        return self

    def __exit__(self, *error):
        pass

    def stat(self):
        return {"entries": len(self.records)}

    def cursor(self):
        return self

    def iternext(self, keys, values):
        return iter(self.records)

    def get(self, key):
        return self.records[key]


def test_lsun(root, monkeypatch):
    import io
    import sys
    import types

    with pytest.raises(FileNotFoundError, match="tower_train_lmdb.*fyu/lsun"):
        data.open_dataset("lsun_tower")
    for split in ("train", "val"):
        (root / "lsun" / f"tower_{split}_lmdb").mkdir(parents=True)
    monkeypatch.setitem(sys.modules, "lmdb", None)
    with pytest.raises(RuntimeError, match="lmdb"):
        data.open_dataset("lsun_tower")

    def open_environment(path, **options):
        records = {}
        for i in range(3 if "train" in path else 1):
            buffer = io.BytesIO()
            Image.fromarray(photo(seed=i)).save(buffer, "WEBP", lossless=True)
            records[b"%d" % i] = buffer.getvalue()
        return FakeEnvironment(records)

    monkeypatch.setitem(sys.modules, "lmdb", types.SimpleNamespace(open=open_environment))
    train, whole = data.open_dataset("lsun_tower"), data.open_dataset("lsun_tower", "all")
    assert len(train) == 3 and len(whole) == 4
    assert torch.equal(train[2], data.to_tensor(photo(seed=2)))
    with pytest.raises(ValueError, match="lsun_tower.*test"):
        data.open_dataset("lsun_tower", "test")
    with pytest.raises(FileNotFoundError, match="lsun_tower"):
        data.open_dataset("lsun")


def test_a_folder_may_have_a_similar_name(root):
    write(root / "celeba_hq" / "a.png", 0)
    assert len(data.open_dataset("celeba_hq", "all")) == 1
    with pytest.raises(FileNotFoundError, match="download afhq"):
        data.open_dataset("afhq_cats")
