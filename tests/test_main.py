"""The command line, with miniature models: what it writes, and how it refuses nonsense."""

import json
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

from arbscale import ArbitraryScaleModel, metrics, presets
from arbscale.__main__ import COMMANDS, main
from arbscale.autoencoder import FirstStage
from arbscale.data import large
from arbscale.evaluation import features, sets


def gradient(height=12, width=16):
    return np.linspace(0, 255, height * width).reshape(height, width).astype("uint8")


@pytest.mark.slow
def test_demo_writes_a_contact_sheet(run, tmp_path):
    assert run("demo")[0] == 0
    with Image.open(tmp_path / "outputs/demo.png") as sheet:
        assert sheet.width > 4 * 300


def test_generate_at_any_size(run, tmp_path, monkeypatch):
    above = []  # the bar, or both would stand on one line
    write = staticmethod(lambda text, **options: above.append(text))
    monkeypatch.setattr("tqdm.std.tqdm.write", write)
    assert run("generate", "--size", "30x41", "--steps", 2, "-n", 2, "-o", "a.png")[0] == 0
    assert above == [f"wrote a-00{i}.png (30 x 41)" for i in range(2)]
    for name in ("a-000.png", "a-001.png"):
        with Image.open(tmp_path / name) as picture:
            assert picture.size == (41, 30)
    assert run("generate", "--size", "20", "--steps", 2, "-o", "b.png")[0] == 0
    assert (tmp_path / "b.png").is_file()


def test_generate_writes_one_sheet(run, tmp_path):
    words = ("generate", "-n", 5, "--size", "30x40", "--steps", 2, "--sheet", "-o", "all.png")
    assert run(*words)[0] == 0
    with Image.open(tmp_path / "all.png") as sheet:
        assert sheet.width > 4 * 40 and sheet.height > 2 * 40
    assert not list(tmp_path.glob("all-*"))


def test_generate_writes_large_tiff_files_in_bands(run, tmp_path, monkeypatch):
    words = ("generate", "--size", "30x41", "--steps", 2, "-n", 2, "-o", "a.tif")
    assert run(*words)[0] == 0
    small = [np.asarray(Image.open(tmp_path / f"a-00{i}.tif")).astype(int) for i in range(2)]
    monkeypatch.setattr("arbscale.__main__.LARGE", 1000)
    assert run(*words)[0] == 0
    for i, whole in enumerate(small):
        with Image.open(tmp_path / f"a-00{i}.tif") as image:
            assert "arbscale" in image.tag_v2[305]  # the program that wrote it
            assert abs(np.asarray(image) - whole).max() <= 1  # rounding


@pytest.mark.slow
def test_upscale_writes_large_tiff_files_in_bands_and_resumes(run, tmp_path, monkeypatch):
    Image.fromarray(gradient(23, 31)).convert("RGB").save(tmp_path / "in.png")
    words = ("upscale", "in.png", "--scale", 2, "--steps", 1, "-o", "a.tif")
    assert run(*words)[0] == 0
    whole = np.asarray(Image.open(tmp_path / "a.tif")).astype(int)
    monkeypatch.setattr("arbscale.__main__.LARGE", 1000)
    monkeypatch.setattr("arbscale.data.large.TILE", 16)
    monkeypatch.setattr("arbscale.tiles.BAND", 300)
    original, calls = large._Tiles.append, []

    def stopped(tiles, *rest):
        calls.append(tiles.done)
        if len(calls) == 2:
            raise KeyboardInterrupt
        original(tiles, *rest)

    monkeypatch.setattr(large._Tiles, "append", stopped)
    assert run(*words)[0] == 130 and (tmp_path / "a.tif.part").is_file()
    assert run(*words)[0] == 0 and calls == [0, 1, 1, 2]
    with Image.open(tmp_path / "a.tif") as image:
        assert "arbscale" in image.tag_v2[305]  # the program that wrote it
        assert abs(np.asarray(image) - whole).max() <= 1  # rounding
    monkeypatch.setattr(ArbitraryScaleModel, "_sample_tiles", None)
    assert run(*words)[0] == 0  # a whole file is left


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["L", "RGB", "RGBA", "P", "1", "I;16"])
def test_upscale_takes_a_users_file(run, tmp_path, mode):
    picture = Image.fromarray(gradient().astype("uint16") * 257) if mode == "I;16" else None
    (picture or Image.fromarray(gradient()).convert(mode)).save(tmp_path / "in.png")
    assert run("upscale", "in.png", "--scale", 3.7, "--steps", 2, "-o", "out.png")[0] == 0
    with Image.open(tmp_path / "out.png") as out:
        assert (out.mode, out.size) == ("RGBA" if mode == "RGBA" else "RGB", (59, 44))


def test_upscale_says_what_it_converts_and_keeps_exif(run, tmp_path, capsys, monkeypatch):
    exif = Image.Exif()
    exif[274], exif[272] = 6, "a camera"
    Image.fromarray(gradient()).save(tmp_path / "in.png", exif=exif)
    said = []
    write = staticmethod(lambda text, **options: said.append(text))
    monkeypatch.setattr("tqdm.std.tqdm.write", write)
    words = ("--size", 32, "--steps", 1, "--quality", 60, "-o", "out.jpg")
    assert run("upscale", "in.png", *words)[0] == 0
    assert any("in.png" in line and "EXIF" in line and "grey" in line for line in said)
    with Image.open(tmp_path / "out.jpg") as out:
        assert out.size == (24, 32)  # the longer side alone keeps the aspect ratio
        assert out.getexif()[272] == "a camera" and 274 not in out.getexif()
        coarse = out.quantization
    assert run("upscale", "in.png", "--size", "9x31", "--steps", 1, "-o", "out.jpg")[0] == 0
    with Image.open(tmp_path / "out.jpg") as out:
        assert out.size == (31, 9) and out.quantization[0][0] < coarse[0][0]


@pytest.mark.slow
def test_upscale_takes_a_folder_and_resumes(run, tmp_path, monkeypatch):
    (tmp_path / "in").mkdir()
    for i, name in enumerate(("a.png", "b.jpg", "c.png")):
        Image.fromarray(gradient() // (i + 1)).save(tmp_path / "in" / name)
    (tmp_path / "in/bad.png").write_text("no image")
    upscaled, original = [], ArbitraryScaleModel.upscale

    def counted(self, low, **options):
        upscaled.append(low.size)
        return original(self, low, **options)

    monkeypatch.setattr(ArbitraryScaleModel, "upscale", counted)
    words = ("upscale", "in", "--scale", 2, "--steps", 1, "-o", "out")
    status, said = run(*words)
    assert status == 2 and "bad.png" in said.splitlines()[-1] and "1 " in said.splitlines()[-1]
    written = sorted(path.name for path in (tmp_path / "out").glob("*.*") if path.is_file())
    assert written == ["a.png", "b.jpg", "c.png"] and len(upscaled) == 3
    kept = (tmp_path / "out/c.png").read_bytes()
    (tmp_path / "out/a.png").unlink()
    Image.fromarray(gradient()).save(tmp_path / "in/bad.png")
    assert run(*words)[0] == 0
    assert len(upscaled) == 5  # what was missing, and what had been bad
    assert (tmp_path / "out/c.png").read_bytes() == kept
    assert run(*words, "--seed", 1)[0] == 0 and len(upscaled) == 9
    assert run("upscale", "in/a.png", "--scale", 2, "--steps", 1, "-o", "one.png")[0] == 0
    assert (tmp_path / "one.png").is_file()


def test_a_full_disk_stops_a_folder(run, tmp_path, monkeypatch):
    """It is not a bad image: what follows would fail, too."""
    for name in ("a.png", "b.png"):
        Image.fromarray(gradient()).save(tmp_path / name)

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("arbscale.data.output.write_image", full)
    status, said = run("upscale", "a.png", "b.png", "--scale", 2, "--steps", 1, "-o", "out")
    assert status == 2 and "No space left" in said.splitlines()[-1] and "left out" not in said


def test_what_cannot_be_written_is_named_and_left_out(run, tmp_path):
    Image.fromarray(gradient()).save(tmp_path / "a.png")
    Image.new("L", (60_000, 1)).save(tmp_path / "wide.png")
    (tmp_path / "notes.txt").write_text("no image")
    words = ("--scale", 2, "--steps", 1, "-o", "out")
    status, said = run("upscale", "notes.txt", "wide.png", "a.png", *words)
    assert status == 2 and [path.name for path in (tmp_path / "out").glob("*.*g")] == ["a.png"]
    lines = [line for line in said.splitlines() if line.startswith("left out: ")]
    assert [line.split(": ")[1] for line in lines] == ["notes.txt", "wide.png"]


def test_upscale_takes_one_pixel_wide_and_a_size(run, tmp_path):
    Image.fromarray(gradient()[:, :1]).save(tmp_path / "in.png")
    assert run("upscale", "in.png", "--size", "50x7", "--steps", 2, "-o", "out.png")[0] == 0
    with Image.open(tmp_path / "out.png") as out:
        assert out.size == (7, 50)


def test_one_number_is_the_longer_side(run, tmp_path):
    Image.fromarray(gradient()).save(tmp_path / "in.png")  # 12 x 16
    assert run("upscale", "in.png", "--size", 24, "--steps", 1, "-o", "out.png")[0] == 0
    with Image.open(tmp_path / "out.png") as out:
        assert out.size == (24, 18)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("words", "fact"),
    [
        (("upscale", "none.png", "--scale", 2, "-o", "o.png"), "none.png"),
        (("upscale", "bad.png", "--scale", 2, "-o", "o.png"), "bad.png"),
        (("upscale", "in.png", "--scale", 0, "-o", "o.png"), "0"),
        (("upscale", "in.png", "--scale", "nan", "-o", "o.png"), "nan"),
        (("upscale", "in.png", "--scale", "-2", "-o", "o.png"), "-2"),
        (("upscale", "in.png", "--scale", 1e9, "-o", "o.png"), "400 million"),
        (("upscale", "in.png", "-o", "o.png"), "--scale"),
        (("upscale", "in.png", "--scale", 2, "--size", 9, "-o", "o.png"), "--size"),
        (("upscale", "in.png", "--scale", 2, "-o", "o.what"), "o.what"),
        (("upscale", "in.png", "--scale", 2, "-o", "o.psd"), "o.psd"),
        (("upscale", "in.png", "--size", "1x70000", "-o", "o.gif"), "o.gif"),
        (("upscale", "in.png", "--scale", 2, "--quality", 0, "-o", "o.jpg"), "0"),
        (("generate", "--size", "300", "-o", "o.ico"), "300 x 300"),
        (("upscale", "in.png", "--scale", 2, "--model", "nope", "-o", "o.png"), "nope"),
        (("upscale", "in.png", "--scale", 2, "--model", "scenes", "-o", "o.png"), "generator"),
        (("upscale", "in.png", "--scale", 2, "--sampler", "euler", "-o", "o.png"), "ddim"),
        (("upscale", "in.png", "--scale", 2, "--steps", 5000, "-o", "o.png"), "5000"),
        (("generate", "photos", "-o", "o.png"), "super-resolution"),
        (("generate", "-n", 0, "-o", "o.png"), "0"),
        (("generate", "-n", 10**20, "-o", "o.png"), f"{10**20}"),
        (("generate", "-o", "o.what"), "o.what"),
        (("train", "huge", "-o", "o"), "huge"),
        (("evaluate", "photos", "--data", "nowhere"), "ARBSCALE_DATA"),
        (("table",), "JSON"),
        (("table", "none.json"), "none.json"),
        (("bench", "scenes", "--batch", 0), "--batch"),
        (("bench", "scenes", "--batch", 10**20), f"{10**20}"),
        (("bench", "scenes", "--seconds", "nan"), "nan"),
        (("bench", "scenes", "--sizes"), "--sizes"),
        (("generate", "--seed", 2**70, "-o", "o.png"), f"{2**70}"),
        (("upscale", "in.png", "--scale", 1e308, "-o", "o.png"), "1e+308"),
        (("upscale", "in.png", "--scale", 1e5, "-o", "o.png"), "1600000"),
        (("generate", "--size", "30000", "-o", "o.png"), "400 million"),
        (("generate", "-n", 10**9, "--sheet", "-o", "o.png"), "400 million"),
        (("generate", "-o", "in.png/o.png"), "in.png"),
        (("demo", "-o", "o.what"), "o.what"),
        (("demo", "-o", "in.png/o.png"), "in.png"),
        (("train", "tiny", "-o", "in.png/o"), "in.png"),
        (("train", "tiny", "--preset.groups", 7, "-o", "o"), "divisible"),
        (("evaluate", "scenes", "--scales", 2**63), f"{2.0**63}"),
        (("ablate", "-o", "o.txt"), "o.txt"),
        (("ablate", "-o", "in.png/o.json"), "in.png"),
        (("convert", "a.ckpt", "--config", "a.yaml", "-o", "in.png/o"), "in.png"),
    ],
)
def test_nonsense_gives_one_line_and_a_status(run, tmp_path, monkeypatch, words, fact):
    """Before anything is computed."""
    monkeypatch.delenv("ARBSCALE_DATA", raising=False)
    monkeypatch.setattr(FirstStage, "features", lambda *_: pytest.fail("it was computed"))
    Image.fromarray(gradient()).save(tmp_path / "in.png")
    (tmp_path / "bad.png").write_text("no image")
    status, said = run(*words)
    assert status == 2
    line = said.strip().splitlines()[-1]  # a progress bar may stand above
    assert line.startswith("arbscale: ") and fact in line and "Traceback" not in said
    assert not (tmp_path / "o.png").exists()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("words", "fact"),
    [
        (("upscale", "in.png", "--size", "0x5", "-o", "o.png"), "0x5"),
        (("upscale", "in.png", "--size", "big", "-o", "o.png"), "big"),
        (("upscale", "in.png", "--size", "1x400000000", "-o", "o.png"), "400000000"),
        (("bench", "--sizes", "100000x100000"), "100000"),
        (("train", "tiny", "--seed", 2**70, "-o", "o"), f"{2**70}"),
        (("train", "tiny", "--data", "x", "--parts", "inf", 0, 0, "-o", "o"), "inf"),
        (("train", "tiny", "--data", "x", "--parts", "nan", 0, 0, "-o", "o"), "nan"),
        (("train", "tiny", "--max-weight", "nan", "-o", "o"), "nan"),
        (("upscale", "in.png", "--scale", "much", "-o", "o.png"), "much"),
        (("generate", "-n", "few", "-o", "o.png"), "few"),
        (("generate", "--size", "100001x9", "-o", "o.tif"), "100000"),
        (("generate", "--fly", "-o", "o.png"), "--fly"),
        (("generate",), "--output"),
        (("evaluate", "scenes", "--task", "fly"), "fly"),
        (("fly",), "fly"),
        ((), "demo"),
    ],
)
def test_words_that_cannot_be_read_give_a_status(run, tmp_path, words, fact):
    status, said = run(*words)
    assert status == 2
    assert fact in said and "Traceback" not in said
    assert not (tmp_path / "o.png").exists()


@pytest.mark.slow
@pytest.mark.parametrize("command", [command.__name__ for command in COMMANDS])
def test_every_command_has_help(command, capsys):
    with pytest.raises(SystemExit) as stop:
        main([command, "--help"])
    assert not stop.value.code and "--help" in capsys.readouterr().out


@pytest.fixture
def offline(monkeypatch, tmp_path):
    """Keep caches in a fresh folder, the network out of reach, and LPIPS without weights."""

    def unreachable(*args, **options):
        raise OSError("Name or service not known")

    monkeypatch.setattr(torch.hub, "load_state_dict_from_url", unreachable)
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    monkeypatch.setenv("ARBSCALE_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("ARBSCALE_WEIGHTS", raising=False)
    metrics.lpips_network.cache_clear()


def report_of(path):
    report = json.loads(path.read_text())
    assert report.pop("timing")["seconds"] > 0
    return report


@pytest.mark.slow
def test_evaluate_writes_json_with_its_protocol(run, tmp_path, offline):
    words = ("--scales", 2, "-n", 1, "-o", "results/a.json")
    assert run("evaluate", "scenes", *words)[0] == 0
    report = report_of(tmp_path / "results/a.json")
    assert set(report["results"]["2"]) == {
        "bicubic",
        "bicubic of own training-size output",
        "ours (first stage)",
    }
    assert report["task"] == "reconstruct" and report["weights"] and report["machine"]["threads"]
    assert report["protocol"]["pictures"] == 1 and report["versions"]["torch"]
    assert report["protocol"]["lpips"] is None
    assert [p.name for p in (tmp_path / "results").iterdir()] == ["a.json"]
    Image.fromarray(gradient(60, 64)).convert("RGB").save(tmp_path / "in.png")
    words += ("--steps", 2, "--protocol", "benchmark", "--split", "all")
    assert run("evaluate", "photos", "--data", tmp_path, *words)[0] == 0
    report = report_of(tmp_path / "results/a.json")
    assert set(report["results"]["2"]) == {
        "bicubic",
        "bicubic, back-projected",
        "ours",
        "first stage (ceiling)",
    }
    assert report["results"]["2"]["bicubic"]["psnr"] > 20
    assert report["protocol"]["space"] == "y" and report["protocol"]["sampling"]["steps"] == 2


@pytest.mark.slow
def test_evaluate_generates_resumes_and_repeats_itself(run, tmp_path, offline, monkeypatch):
    sizes = ("--sizes", 32, 40, "--steps", 2, "-n", 22, "--seed", 5, "-o", "g.json")
    words = ("evaluate", "scenes", "--task", "generate", *sizes)
    network = features.Extractor("encoder", "mean colours", 3, "", lambda x: x.float().mean((2, 3)))
    monkeypatch.setattr(sets, "extractor", lambda *args: network)
    interval, calls = sets.interval, []

    def stops(*args):
        calls.append(1)
        if len(calls) == 5:  # two for each row
            raise KeyboardInterrupt
        return interval(*args)

    monkeypatch.setattr(sets, "interval", stops)
    status, said = run(*words)
    assert status == 130 and "same command" in said.splitlines()[-1]
    assert list((tmp_path / "g.partial").rglob("32x32-ours*"))
    assert not (tmp_path / "g.json").exists()
    monkeypatch.setattr("sys.argv", ["arbscale", *map(str, words)])
    assert run(*words)[0] == 0
    assert not (tmp_path / "g.partial").exists()
    first = report_of(tmp_path / "g.json")
    assert run(*words)[0] == 0
    assert report_of(tmp_path / "g.json") == first
    assert first["protocol"]["features"] == "encoder" and first["protocol"]["reference"] == 22
    assert len(first["results"]["rows"]) == 3 + 4 and first["results"]["self_ssim"]["ours"]
    assert run(*words[:-4], "--seed", 6, "-o", "g.json")[0] == 0
    assert report_of(tmp_path / "g.json")["results"] != first["results"]


@pytest.mark.parametrize(
    ("words", "fact"),
    [
        (("scenes", "--task", "upscale"), "--task reconstruct"),
        (("photos", "--task", "generate"), "--task upscale"),
        (("scenes", "--protocol", "set5"), "set5"),
        (("scenes", "-n", 5000), "5000"),
        (("scenes", "-n", 0), "--number"),
        (("scenes", "-n", 10**20), f"{10**20}"),
        (("scenes", "--task", "generate", "--reference", 10**20), f"{10**20}"),
        (("scenes", "--task", "generate", "-n", 4), "8"),
        (("scenes", "--task", "generate", "--features", "clip"), "clip"),
        (("scenes", "--task", "generate", "--features", "inception", "-n", 9), "--allow-few"),
        (
            ("scenes", "--task", "generate", "-n", 9, "--allow-few", "--features", "inception"),
            "--features encoder",
        ),
        (("scenes", "-o", "results"), "results"),
    ],
)
def test_evaluate_says_what_it_cannot_do(run, offline, words, fact):
    status, said = run("evaluate", *words)
    assert status == 2 and fact in said.splitlines()[-1] and "Traceback" not in said


@pytest.mark.slow
def test_bench_and_table(run, tmp_path, capsys, monkeypatch):
    for name, value in (("LATENT", (3, 4)), ("SIDES", (8,)), ("LARGER", (40,))):
        monkeypatch.setattr(f"arbscale.evaluation.bench.{name}", value)
    words = ("--sizes", 16, "20x12", "--steps", 2, "--quick", "-o", "b.json")
    assert main(["bench", "scenes", *map(str, words)]) == 0
    printed = capsys.readouterr().out
    assert "| 20 x 12 | decoding alone |" in printed and "200 steps" in printed
    assert (tmp_path / "b.png").is_file()
    assert main(["table", "b.json", "b.json"]) == 0
    assert capsys.readouterr().out.count(printed.strip()) == 2


@pytest.mark.slow
@pytest.mark.parametrize("name", ["generator", "super-resolver"])
def test_train_writes_a_model_that_loads(run, tmp_path, monkeypatch, name):
    low_size = 8 if name == "super-resolver" else None
    small = replace(presets.tiny(low_size), image_size=16, target_sizes=(8, 32), diffusion_batch=4)
    small = replace(small, first_stage_batch=2)
    monkeypatch.setitem(presets.PRESETS, "small", lambda: small)
    monkeypatch.setattr("arbscale.training.denoiser.POOL", 8)
    data = "photos" if low_size else "scenes"
    out = tmp_path / "trained"
    assert run("train", "small", "--data", data, "--steps", 2, 2, 2, 2, "-o", out)[0] == 0
    model = ArbitraryScaleModel.load(out)
    assert model.preset == small and model.scale_factor > 0
    assert set(model.manifest["losses"]) == {"first stage", "diffusion", "alignment"}
    words = ("--start", out, "--joint", "--steps", 0, 2, 0, 0, "-o", tmp_path / "more")
    assert run("train", "small", "--data", data, *words)[0] == 0
    more = ArbitraryScaleModel.load(tmp_path / "more")
    assert len(more.manifest["commands"]) == 2
    assert more.scale_factor == model.scale_factor
    assert not torch.equal(
        more.first_stage.encoder.stem.weight, model.first_stage.encoder.stem.weight
    )


@pytest.mark.slow
def test_the_module_runs(tmp_path):
    words = [sys.executable, "-m", "arbscale", "upscale", "none.png", "--scale", "2", "-o", "o.png"]
    done = subprocess.run(words, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 2 and len(done.stderr.strip().splitlines()) == 1
