"""Finished pieces on disk."""

from __future__ import annotations

from pathlib import Path

import pytest
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


def test_another_protocol_starts_afresh(tmp_path):
    work = Counter()
    Partial(tmp_path / "a", {"n": 1}).numbers("one", work)
    Partial(tmp_path / "a", {"n": 2}).numbers("one", work)
    assert work.calls == 2
    assert sorted(p.name for p in (tmp_path / "a").iterdir()) == ["one.json", "protocol.json"]


def test_a_folder_of_something_else_is_left_alone(tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "a/thesis.txt").write_text("")
    with pytest.raises(ValueError, match="/a "):
        Partial(tmp_path / "a", {})
    assert (tmp_path / "a/thesis.txt").is_file()
    (tmp_path / "a/thesis.txt").unlink()
    assert Partial(tmp_path / "a", {}).folder == tmp_path / "a"


def test_what_was_not_finished_does_not_count(tmp_path, monkeypatch):
    partial = Partial(tmp_path / "a", {})

    def stopped(draft, text, encoding):
        draft.write_bytes(b"{")
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Path, "write_text", stopped)
        partial.numbers("one", dict)
    assert [path.name for path in partial.folder.iterdir()] == ["protocol.json"]
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
