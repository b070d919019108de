"""The commands that measure: what they keep, what they refuse, and who may write an output."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace

import pytest
import torch

from arbscale import ArbitraryScaleModel, presets
from arbscale.__main__ import main
from arbscale.data import ImageFolder, to_pil
from arbscale.evaluation import reports, sets
from arbscale.evaluation.command import Options
from arbscale.evaluation.features import Extractor
from arbscale.samplers import SAMPLERS

HOLD = """
import fcntl, sys
file = open(sys.argv[1], "a+")
fcntl.lockf(file, fcntl.LOCK_EX)
file.write("process 4711 on elsewhere")
file.flush()
print("held", flush=True)
sys.stdin.read()
"""


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """Return the folder of an untrained miniature."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("model")
    ArbitraryScaleModel(presets.tiny(), manifest={"name": "tiny"}).save(folder)
    return folder


@pytest.mark.parametrize("words", [("evaluate", "nowhere"), ("ablate", "--folder", "{}/runs")])
def test_a_second_process_is_told_who_writes_the_output(words, tmp_path, capsys):
    pytest.importorskip("fcntl")
    lock = [sys.executable, "-c", HOLD, str(tmp_path / ".out.json.lock")]
    with subprocess.Popen(lock, stdin=-1, stdout=-1) as other:
        assert other.stdout.readline().strip() == b"held"
        words = [word.format(tmp_path) for word in words]
        assert main([*words, "-o", str(tmp_path / "out.json")]) == 2
        other.communicate()
    assert "process 4711 on elsewhere" in capsys.readouterr().err


@pytest.mark.parametrize("words", [("evaluate", "nowhere"), ("bench", "nowhere"), ("ablate",)])
def test_an_output_that_cannot_be_written_is_refused_first(words, tmp_path, capsys):
    (tmp_path / "a file").write_text("")
    assert main([*words, "-o", str(tmp_path / "a file/out.json")]) == 2
    assert "a file" in capsys.readouterr().err
    assert main([*words, "-o", str(tmp_path / "out.txt")]) == 2
    assert "out.txt" in capsys.readouterr().err


def test_pieces_outlive_other_versions_and_machines(tiny, tmp_path, capsys):
    options = Options("tiny", output=tmp_path / "out.json")
    model = ArbitraryScaleModel.load(tiny)
    report = reports.header(model, "reconstruct", {"n": 1})
    first = options.partial(report, model, "images")
    newer = json.loads(json.dumps(report))
    newer["versions"]["torch"] = "99"
    newer["machine"]["threads"] += 1
    assert options.partial(newer, model, "images").folder == first.folder
    assert newer["begun with"]["versions"] == report["versions"]
    assert str(report["versions"]["torch"]) in capsys.readouterr().err
    assert "begun with" not in report
    others = [{**report, "weights": ["0"]}, {**report, "protocol": {"n": 2}}, report]
    for other, images in zip(others, ("images", "images", "others"), strict=True):
        assert options.partial(other, model, images).folder != first.folder
    model.preset = replace(model.preset, guidance=1.5)  # of the same weights
    assert options.partial(report, model, "images").folder != first.folder
    assert first.folder.is_dir()


@pytest.mark.slow
def test_generation_takes_as_many_images_as_every_row_can_have(tiny, tmp_path, monkeypatch, capsys):
    """Real sets of 12 and of 9 images: each row of a table compares equal numbers."""
    monkeypatch.setenv("ARBSCALE_CACHE", str(tmp_path / "cache"))
    colours = Extractor("encoder", "mean colours", 3, "", lambda x: x.float().mean((2, 3)))
    monkeypatch.setattr(sets, "extractor", lambda *args: colours)
    for split, count in (("train", 12), ("test", 9)):
        (tmp_path / "data" / split).mkdir(parents=True)
        for i in range(count):
            noise = torch.rand(3, 40, 40, generator=torch.Generator().manual_seed(i)) * 2 - 1
            to_pil(noise).save(tmp_path / "data" / split / f"{i}.png")

    def rows(*words):
        output = tmp_path / "out.json"
        words = ["--data", str(tmp_path / "data"), "--sizes", "32", "32", *words, "-o", str(output)]
        assert main(["evaluate", str(tiny), "--task", "generate", "--steps", "1", *words]) == 0
        return [(row["method"], row["pictures"]) for row in reports.read(output)["results"]["rows"]]

    assert rows() == [(method, 9) for method in (sets.OURS, sets.CEILING, sets.FLOOR)]
    assert rows("-n", "10") == [(sets.OURS, 10)] and "--number 9" in capsys.readouterr().err
    monkeypatch.setattr(sets, "evaluate_steps", lambda job, partial: {"rows": [], "n": job.n})
    output = tmp_path / "steps.json"
    words = ["--task", "steps", "--data", str(tmp_path / "data"), "-o", str(output)]
    assert main(["evaluate", str(tiny), *words]) == 0
    report = reports.read(output)
    assert report["results"]["n"] == 9 and len(report["protocol"]["sizes"]) == 1
    assert report["protocol"]["sampling"]["sampler"] == list(SAMPLERS)
    assert main(["evaluate", str(tiny), *words, "--steps", "3"]) == 2
    assert "--steps" in capsys.readouterr().err
    assert main(["evaluate", str(tiny), *words, "--split", "all"]) == 2
    assert "--split" in capsys.readouterr().err
    (tmp_path / "data" / "test").rename(tmp_path / "data" / "val")  # as a download comes
    assert main(["evaluate", str(tiny), *words]) == 0
    assert reports.read(output)["protocol"]["others' split"] == "val"
    words = ["--task", "generate", "--data", str(tmp_path / "data"), "--reference", "0"]
    assert main(["evaluate", str(tiny), *words]) == 2
    assert "--reference" in capsys.readouterr().err


def test_an_image_that_is_too_small_is_named(tiny, tmp_path, capsys):
    for name, size in (("a.png", (48, 48)), ("narrow.png", (60, 12))):
        to_pil(torch.zeros(3, *size)).save(tmp_path / name)
    words = ["--data", str(tmp_path), "--split", "all", "--scales", "2"]
    assert main(["evaluate", str(tiny), "--protocol", "benchmark", *words]) == 2
    assert "narrow.png" in capsys.readouterr().err
    assert main(["evaluate", str(tiny), *words[:-1]]) == 2
    assert "--scales" in capsys.readouterr().err
    real = sets.RealPictures(ImageFolder(tmp_path, ["a.png"] * 7 + ["narrow.png"]), 8)
    with pytest.raises(ValueError, match="narrow.png"):
        real.batch(0, (32, 32))


def test_scenes_are_evaluated_by_split(tiny, capsys):
    assert main(["evaluate", str(tiny), "--data", "scenes", "--split", "all"]) == 2
    assert "val" in capsys.readouterr().err
