"""Finished pieces on disk."""

from __future__ import annotations

from pathlib import Path

import pytest
import safetensors.torch
import torch

from arbscale.evaluation import Partial


class Counter:
    def __init__(self):
        self.calls = 0

    def __call__(self):
        self.calls += 1
        return {"value": 0.1 + 0.2, "nested": [1, None]}


def test_a_piece_is_computed_once(tmp_path):
    work = Counter()
    first = Partial(tmp_path / "a", {"n": 1}).numbers("one", work)
    again = Partial(tmp_path / "a", {"n": 1}).numbers("one", work)
    assert first == again == {"value": 0.1 + 0.2, "nested": [1, None]} and work.calls == 1
    z = torch.randn(2, 3)
    partial = Partial(tmp_path / "a", {"n": 1})
    partial.tensors("z", lambda: {"z": z.T})
    kept = partial.tensors("z", lambda: pytest.fail("computed twice"))
    assert torch.equal(kept["z"], z.T)


def test_other_facts_have_other_pieces_and_nothing_is_deleted(tmp_path):
    work = Counter()
    first = Partial(tmp_path / "a", {"n": 1})
    first.numbers("one", work)
    second = Partial(tmp_path / "a", {"n": 2})
    second.numbers("one", work)
    assert work.calls == 2
    second.finish()
    Partial(tmp_path / "a", {"n": 1}).numbers("one", work)
    assert work.calls == 2
    assert sorted(p.name for p in first.folder.iterdir()) == ["facts.json", "one.json"]


def test_a_folder_of_something_else_is_left_alone(tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "a/thesis.txt").write_text("")
    partial = Partial(tmp_path / "a", {})
    partial.numbers("one", Counter())
    partial.finish()
    assert [path.name for path in (tmp_path / "a").iterdir()] == ["thesis.txt"]


@pytest.mark.parametrize("damage", [b"", b"{", b"\0" * 200, b"\xff\xfe"])
def test_a_damaged_piece_is_computed_anew_with_a_line_that_says_so(tmp_path, capsys, damage):
    partial, work, z = Partial(tmp_path / "a", {}), Counter(), torch.randn(2, 3)
    for name, expected in (("one.json", work()), ("z.safetensors", z)):
        for _ in range(2):
            if name == "one.json":
                assert partial.numbers("one", work) == expected
            else:
                assert torch.equal(partial.tensors("z", lambda: {"z": z})["z"], expected)
            (partial.folder / name).write_bytes(damage)
        assert name in capsys.readouterr().err


def test_a_full_disk_is_named_with_the_file(tmp_path, monkeypatch):
    def full(*args):
        raise safetensors.SafetensorError("I/O error: No space left on device")

    monkeypatch.setattr("arbscale.evaluation.resume.save_file", full)
    with pytest.raises(OSError, match="z.safetensors"):
        Partial(tmp_path / "a", {}).tensors("z", lambda: {"z": torch.zeros(1)})


def test_what_was_not_finished_does_not_count(tmp_path, monkeypatch):
    partial = Partial(tmp_path / "a", {})

    def stopped(draft, text, encoding):
        draft.write_bytes(b"{")
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Path, "write_text", stopped)
        partial.numbers("one", dict)
    assert [path.name for path in partial.folder.iterdir()] == ["facts.json"]
    work = Counter()
    partial.numbers("one", work)
    assert work.calls == 1
    partial.finish()
    assert not (tmp_path / "a").exists()


def test_without_a_folder_pieces_last_as_long_as_the_object():
    partial, work = Partial(None, {}), Counter()
    partial.numbers("one", work)
    partial.numbers("one", work)
    assert work.calls == 1 and partial.folder.is_dir()
    partial.finish()
    assert not partial.folder.exists()
