"""The command line: what stops it, what is said then, and what is left on disk."""

import io
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from arbscale import ArbitraryScaleModel, store
from arbscale.__main__ import main
from arbscale.data import output


def fails(error):
    def call(*args, **options):
        raise error

    return call


@pytest.mark.slow
def test_a_bug_shows_its_traceback(run, monkeypatch):
    bugs = {
        RuntimeError: lambda *_, **__: torch.ones(2, 3) @ torch.ones(2, 3),
        ValueError: lambda *_, **__: np.ones(2) + np.ones(3),
        KeyError: lambda *_, **__: {}["none"],
        NotImplementedError: fails(NotImplementedError("later")),
    }
    for kind, bug in bugs.items():
        monkeypatch.setattr(ArbitraryScaleModel, "generate", bug)
        with pytest.raises(kind):
            run("generate", "-o", "o.png")


@pytest.mark.parametrize(
    ("error", "fact"),
    [
        (torch.OutOfMemoryError("CUDA out of memory. Tried 2 GiB"), "out of memory"),
        (RuntimeError("MPS backend out of memory (MPS allocated: 9 GB)"), "out of memory"),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory"), "out of memory"),
        (MemoryError(), "out of memory"),
        (OSError(28, "No space left on device"), "No space left"),
        (store.InputError("a.png is damaged"), "a.png"),
        (store.StateError("stopped at step 3"), "step 3"),
        (
            store.InputError(
                "Caught InputError in DataLoader worker process 0.\nOriginal Traceback (most "
                "recent call last):\n  line\narbscale.store.InputError: a.png: no image\n"
            ),
            "arbscale: a.png: no image",
        ),
    ],
)
def test_what_a_user_can_mend_is_one_line(run, monkeypatch, error, fact):
    monkeypatch.setattr(ArbitraryScaleModel, "generate", fails(error))
    status, said = run("generate", "-o", "o.png")
    assert status == 2 and fact in said.splitlines()[-1] and "Traceback" not in said


REPORT = {"model": "m", "task": "upscale", "protocol": {"lpips": None}, "results": {}}
REPORT |= {"machine": {"device": "cpu", "threads": 1}, "command": "python"}
ROW = {"psnr": 1.0, "ssim": 0.5, "lpips": None}


@pytest.mark.parametrize(
    "text",
    [
        b"",
        b"\xff\xfe",
        b"[" * 100_000,
        b"[1, 2]",
        json.dumps(REPORT | {"protocol": 3}).encode(),
        json.dumps(REPORT | {"machine": None}).encode(),
        json.dumps(REPORT | {"results": {"2": {"ours": {"psnr": "high"}}}}).encode(),
        json.dumps(REPORT | {"results": {"2": {"ours": {}}}}).encode(),
        json.dumps(REPORT | {"results": {"2": 7}}).encode(),
        json.dumps(REPORT | {"task": "generate", "results": {"rows": [{}]}}).encode(),
        json.dumps(REPORT | {"task": "bench"}).encode(),
        json.dumps(REPORT | {"task": "ablate", "protocol": {"comparisons": {"a": []}}}).encode(),
        json.dumps(REPORT | {"task": ["bench"]}).encode(),
    ],
)
def test_a_report_made_by_hand_is_named(run, tmp_path, text):
    (tmp_path / "made.json").write_bytes(text)
    status, said = run("table", "made.json")
    assert status == 2 and "made.json" in said and len(said.splitlines()) == 1


def test_a_teacher_that_holds_no_tensors_is_named(run, tmp_path):
    (tmp_path / "teacher.safetensors").write_bytes(b"xx")
    words = ("--preset.encoder", "tiny", "--teacher", "teacher.safetensors", "-o", "o")
    status, said = run("train", "tiny", *words)
    assert status == 2 and "teacher.safetensors" in said.splitlines()[-1]


@pytest.mark.parametrize("encoding", ["ascii", "cp1252", "cp932"])
def test_printing_never_stops_work(run, tmp_path, monkeypatch, encoding):
    report = REPORT | {
        "model": "caf\u00e9 \u00b1 \U0001f408",
        "results": {"2": {"\u30cd\u30b3": ROW}},
    }
    (tmp_path / "a.json").write_text(json.dumps(report))
    with monkeypatch.context() as patch:
        printed = io.BytesIO()
        patch.setattr(sys, "stdout", io.TextIOWrapper(printed, encoding=encoding))
        assert main(["table", "a.json"]) == 0
        sys.stdout.flush()
        assert b"| 1.00 | 0.5000 |" in printed.getvalue()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("words", "place"),
    [
        (("demo",), "arbscale.__main__.scaled_size"),
        (("generate", "-o", "o.png"), "arbscale.model.ArbitraryScaleModel.decode"),
        (("upscale", "in.png", "--scale", 2, "-o", "o.png"), "arbscale.model.paint"),
        (("train", "tiny", "-o", "o"), "arbscale.training.command._model"),
        (("evaluate", "scenes"), "arbscale.evaluation.command._pairs"),
        (("table", "a.json"), "arbscale.evaluation.reports.document"),
        (("bench", "scenes"), "arbscale.evaluation.bench.measure"),
        (("ablate", "-o", "o.json"), "arbscale.evaluation.ablation.ablate"),
        (("check", "."), "arbscale.data.folders.check_file"),
        (("download", "div2k"), "arbscale.data.download.download"),
        (("convert", "a", "--config", "a", "-o", "o"), "arbscale.compat.convert"),
    ],
)
def test_ctrl_c_is_one_line(run, tmp_path, monkeypatch, words, place):
    Image.new("L", (16, 12), 99).save(tmp_path / "in.png")
    monkeypatch.setattr(place, fails(KeyboardInterrupt()))
    status, said = run(*words)
    line = said.strip().splitlines()[-1]  # a progress bar may stand above
    assert status == 130 and line.startswith("arbscale: stopped") and "Traceback" not in said
    assert not list(tmp_path.rglob("o*.png")) and not list(tmp_path.rglob(".draft*"))


def test_ctrl_c_while_importing_is_one_line(tmp_path):
    package = Path(store.__file__).parent.parent
    (tmp_path / "torch.py").write_text("import os, signal\nos.kill(os.getpid(), signal.SIGINT)\n")
    words = [sys.executable, "-m", "arbscale", "demo"]
    paths = {"PYTHONPATH": f"{tmp_path}{os.pathsep}{package}"}
    done = subprocess.run(words, cwd=tmp_path, env=os.environ | paths, capture_output=True)
    assert (done.returncode, done.stderr) == (130, b"arbscale: stopped\n")


def test_ctrl_c_in_a_folder_says_how_it_resumes(run, tmp_path, monkeypatch):
    for name in ("a.png", "b.png"):
        Image.new("L", (16, 12), 99).save(tmp_path / name)
    write, calls = output.write_image, []

    def stops(*args):
        if calls:
            raise KeyboardInterrupt
        calls.append(write(*args))

    monkeypatch.setattr(output, "write_image", stops)
    words = ("upscale", "a.png", "b.png", "--scale", 2, "--steps", 1, "-o", "out")
    status, said = run(*words)
    assert status == 130 and "rerun the same command" in said.splitlines()[-1]
    assert sorted(path.name for path in tmp_path.glob("out/*.png")) == ["a.png"]


@pytest.mark.slow
def test_many_images_come_batch_by_batch(run, tmp_path, monkeypatch):
    words = ("generate", "-n", 5, "--size", 16, "--steps", 2)
    assert run(*words, "-o", "at-once.png")[0] == 0
    monkeypatch.setattr("arbscale.__main__.BATCH", 2)
    assert run(*words, "-o", "batches.png")[0] == 0
    for i in range(5):
        once, batches = (
            np.asarray(Image.open(tmp_path / f"{name}-{i:03d}.png")).astype(int)
            for name in ("at-once", "batches")
        )
        assert abs(once - batches).max() <= 1
    generate, calls = ArbitraryScaleModel.generate, []

    def stops(self, n, *args, **options):
        calls.append(n)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return generate(self, n, *args, **options)

    said, name = [], "arbscale.__main__.print"
    monkeypatch.setattr(name, lambda text, **_: said.append(text), raising=False)
    monkeypatch.setattr(ArbitraryScaleModel, "generate", stops)
    assert run("generate", "-n", 10**9, *words[3:], "-o", "many.png")[0] == 130
    assert "1000000000 images" in said[0] and "768000 MB" in said[0]  # before the first
    names = sorted(path.name for path in tmp_path.glob("*many*"))
    assert calls == [2, 2] and names == ["many-000000000.png", "many-000000001.png"]
