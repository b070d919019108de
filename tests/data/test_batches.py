"""Many images at once: names are kept, clashes refused, and what is finished is known."""

import os
from pathlib import Path

import pytest
from PIL import Image

from arbscale import store
from arbscale.data.batches import RECORDS, Finished, targets


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names = ("in/b.png", "in/a.jpg", "in/deep/a.jpg", "in/in/a.jpg", "other/a.jpg", "in/note.txt")
    for name in names:
        Path(name).parent.mkdir(parents=True, exist_ok=True)
        if name.endswith("txt"):
            Path(name).write_text("no image")
        else:
            Image.new("L", (4, 3), 99).save(name)
    return tmp_path


def test_one_image_is_written_where_it_is_told(folder):
    assert targets([Path("in/b.png")], Path("out.png")) == [(Path("in/b.png"), Path("out.png"))]
    (folder / "out").mkdir()
    assert targets([Path("in/b.png")], Path("out")) == [(Path("in/b.png"), Path("out/b.png"))]


def test_several_keep_their_names(folder):
    names = ["a.jpg", "b.png", "deep/a.jpg", "in/a.jpg"]
    expected = [(Path("in", name), Path("out", name)) for name in names]
    assert targets([Path("in")], Path("out")) == expected
    files = [Path("in/b.png"), Path("other/a.jpg")]
    assert targets(files, Path("out")) == [(path, Path("out", path.name)) for path in files]
    assert targets([Path("other")], Path("out")) == [(Path("other/a.jpg"), Path("out/a.jpg"))]


@pytest.mark.parametrize(
    ("images", "output", "fact"),
    [
        ([], "out", "no image"),
        (["in", "other"], "out", "two images"),
        (["in"], "out.png", "out.png"),
        (["in/b.png", "other/a.jpg"], "out.PNG", "out.PNG"),
        (["in"], "in", "in"),
        (["in"], "in/out", "in/out"),
        (["in/b.png", "in/a.jpg"], "in", "in"),
        (["in"], ".", "in/a.jpg"),  # from in/in/a.jpg
    ],
)
def test_what_cannot_be_paired_is_refused(folder, images, output, fact):
    with pytest.raises(store.InputError, match=fact):
        targets([Path(image) for image in images], Path(output))


def test_what_is_finished_is_known_until_something_changes(folder):
    image, target = Path("in/b.png"), Path("out/b.png")
    finished, other = Finished([["weights"], 3.7]), Finished([["weights"], 2])
    assert not finished.holds(image, target)
    target.parent.mkdir()
    Image.new("L", (8, 6)).save(target)
    assert not finished.holds(image, target)  # whatever made it
    finished.add(image, target)
    assert finished.holds(image, target) and not other.holds(image, target)
    content = target.read_bytes()
    target.write_bytes(content + b"!")
    assert not finished.holds(image, target)
    target.write_bytes(content)
    Image.new("L", (4, 3), 98).save(image)
    assert not finished.holds(image, target)
    target.write_bytes(content)
    finished.add(image, target)
    (note,) = (target.parent / RECORDS).iterdir()
    for damaged in (b"", b"\xff\xfe"):
        note.write_bytes(damaged)
        assert not finished.holds(image, target)
    finished.add(image, target)
    for missing in (target, image):
        missing.rename("moved")
        assert not finished.holds(image, target)
        Path("moved").rename(missing)
    assert finished.holds(image, target)


@pytest.mark.skipif(os.name == "nt", reason="names are counted in another way there")
def test_a_name_may_be_as_long_as_the_system_allows(folder):
    target = folder / ("\u30cd" * 83 + "ab.png")  # 255 bytes
    store.write_text(target, "text")
    finished = Finished([])
    finished.add(Path("in/b.png"), target)
    assert finished.holds(Path("in/b.png"), target)
