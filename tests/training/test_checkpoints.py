"""Checkpoints: whole or not there, the newest intact one wins."""

import json
import os

import pytest
import torch

from arbscale.training import checkpoints


def tensors(value: float) -> dict[str, torch.Tensor]:
    return {"a": torch.full((3, 4), value), "b": torch.tensor(value, dtype=torch.float64)}


@pytest.fixture
def folder(tmp_path):
    for step in (2, 4, 6):
        checkpoints.save(tmp_path, step, tensors(step), {"note": step}, keep=2)
    return tmp_path


def test_what_was_saved_comes_back(folder):
    state, record = checkpoints.load_newest(folder)
    assert record["step"] == record["note"] == 6
    assert all(torch.equal(state[k], v) for k, v in tensors(6).items())


def test_the_oldest_go(folder):
    assert [path.name for path in checkpoints.saved(folder)] == ["step-00000006", "step-00000004"]


def test_what_follows_a_damaged_one_is_kept_in_its_place(folder):
    (folder / "step-00000006" / "state.safetensors").write_bytes(b"")
    checkpoints.save(folder, 5, tensors(5), {}, keep=1)
    assert [path.name for path in checkpoints.saved(folder)] == ["step-00000005"]


def test_a_step_can_be_saved_again(folder):
    checkpoints.save(folder, 6, tensors(7), {}, keep=2)
    assert checkpoints.load_newest(folder)[0]["a"][0, 0] == 7


@pytest.mark.parametrize("harm", ["flip", "cut", "no state", "no record", "bad record", "no hash"])
def test_a_damaged_one_gives_way_to_the_one_before(folder, harm):
    state, record = (folder / "step-00000006" / n for n in ("state.safetensors", "record.json"))
    content = bytearray(state.read_bytes())
    if harm == "flip":
        content[-1] ^= 1
        state.write_bytes(content)
    elif harm == "cut":
        state.write_bytes(content[:-7])
    elif harm == "bad record":
        record.write_text("{")
    elif harm == "no hash":
        record.write_text(json.dumps({"step": 6}))
    else:
        (state if harm == "no state" else record).unlink()
    with pytest.warns(UserWarning, match="step-00000006"):
        assert checkpoints.load_newest(folder)[1]["step"] == 4


@pytest.mark.parametrize("note", [None, "six", [6], {}])
def test_a_record_made_by_hand_gives_way_to_the_one_before(folder, note):
    path = folder / "step-00000006" / "record.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"note": note}))
    with pytest.warns(UserWarning, match="step-00000006"):
        assert checkpoints.load_newest(folder, {"note": int})[1]["step"] == 4


def test_none_in_an_empty_folder(tmp_path):
    assert checkpoints.load_newest(tmp_path / "nowhere") is None


@pytest.mark.parametrize("call", ["fsync", "save_file"])
def test_a_full_disk_leaves_the_old_ones(folder, monkeypatch, call):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os if call == "fsync" else checkpoints, call, full)
    with pytest.raises(OSError, match="step-00000008.*No space left"):
        checkpoints.save(folder, 8, tensors(8), {}, keep=2)
    monkeypatch.undo()
    assert checkpoints.load_newest(folder)[1]["step"] == 6
    assert not list(folder.glob(".*"))


def test_an_interrupted_checkpoint_leaves_nothing(folder, monkeypatch):
    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(checkpoints, "save_file", interrupted)
    with pytest.raises(KeyboardInterrupt):
        checkpoints.save(folder, 8, tensors(8), {}, keep=2)
    assert sorted(path.name for path in folder.iterdir()) == ["step-00000004", "step-00000006"]


def test_what_a_killed_process_left_is_swept_away(folder):
    (folder / ".draft-00000008").mkdir()
    (folder / ".old-step-00000002").mkdir()
    assert checkpoints.load_newest(folder)[1]["step"] == 6
    checkpoints.save(folder, 8, tensors(8), {}, keep=1)
    assert [path.name for path in folder.iterdir()] == ["step-00000008"]


def test_other_settings_are_refused(tmp_path):
    checkpoints.compare(tmp_path, {"steps": 4, "seed": 0}, {"steps": 4, "newer": 1})
    with pytest.raises(ValueError, match="steps.*4.*6"):
        checkpoints.compare(tmp_path, {"steps": 4, "seed": 0}, {"steps": 6, "seed": 0})


@pytest.mark.skipif(os.name == "nt", reason="no file modes")
def test_permissions_follow_the_umask(folder):
    mask = os.umask(0o022)
    os.umask(mask)
    modes = {path.stat().st_mode & 0o777 for path in folder.glob("step-*/*")}
    assert modes == {0o666 & ~mask}
