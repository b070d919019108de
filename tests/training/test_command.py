"""`python -m arbscale train`: what it reads, writes, resumes and refuses."""

import io
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from PIL import Image
from safetensors import SafetensorError
from safetensors.torch import save_file

from arbscale import ArbitraryScaleModel, presets, store
from arbscale.__main__ import main
from arbscale.autoencoder import TinyEncoder
from arbscale.training import command, denoiser, read_log, read_summary
from arbscale.training.command import parse

SMALL = {"image_size": 16, "target_sizes": (8, 16), "first_stage_batch": 2, "diffusion_batch": 4}
PAPER = ("paper_generation_256", "paper_faces_sr", "paper_div2k_sr", "paper_tower_sr")


@pytest.fixture
def run(monkeypatch, tmp_path, capsys):
    """Return a function that trains a miniature and gives the status and the errors."""
    monkeypatch.chdir(tmp_path)
    for low_size, name in ((None, "small"), (4, "small-sr")):
        preset = replace(presets.tiny(low_size), **SMALL)
        monkeypatch.setitem(presets.PRESETS, name, lambda preset=preset: preset)

    def call(words):
        try:
            status = main(["train", *words.split()])
        except SystemExit as stop:  # of what tyro cannot read
            status = stop.code
        return status, capsys.readouterr().err

    return call


# Options ------------------------------------------------------------------------------------------


def test_every_number_can_be_changed():
    options = parse(
        "tiny -o a/mine --preset.diffusion-batch 8 --preset.multipliers 1 2 --preset.prediction v "
        "--precision bf16 --workers 2 --resume --steps 1 2 3 4 --max-weight 5 --joint".split()
    )
    assert options.preset.multipliers == (1, 2) and options.preset.diffusion_batch == 8
    assert options.preset.prediction == "v" and options.joint and options.max_weight == 5
    assert options.run.precision == "bf16" and options.run.workers == 2 and options.run.resume
    assert options.steps == (1, 2, 3, 4) and str(options.run.folder) == "runs/mine"
    assert str(parse("tiny -o mine --folder here".split()).run.folder) == "here"


@pytest.mark.slow
@pytest.mark.parametrize("family", ["cats", "photos"])
def test_the_script_of_the_shipped_models_trains_on_from_what_it_wrote(
    family, tmp_path, monkeypatch
):
    root = Path(__file__).resolve().parents[2]
    (tmp_path / "data").mkdir()
    script = shutil.copy(root / "data/train.sh", tmp_path / "data")
    python = tmp_path / "python3"
    python.write_text('#!/bin/sh\necho "$*" >> "$0.log"\n')
    python.chmod(0o755)
    paths = {"PATH": f"{tmp_path}:{os.environ['PATH']}", "ARBSCALE_DATA": str(tmp_path / "data")}
    paths["ARBSCALE_WEIGHTS"] = str(tmp_path)
    subprocess.run(["bash", script, family], env=paths | {"SCALE": "3"}, check=True)
    saved = {None: presets.get(family)}
    monkeypatch.setattr(store, "find", lambda name: name)
    monkeypatch.setattr(store, "read_manifest", lambda name: {"preset": saved[name].to_dict()})
    stages, written, folders, guides = [0] * 4, [None], set(), []
    for line in (tmp_path / "python3.log").read_text().splitlines():
        if joined := re.search(r" arbscale (?:blend|guide) (\S+) (\S+) -o (\S+)", line):
            first, second, output = joined.groups()  # of what has been written
            assert {first, second} <= {*written, *guides}
            written[-1] = output
            continue
        options = parse(line.split(" arbscale train ")[1].split())
        assert options.run.resume
        if "guide" in str(options.output):  # a plain U-Net that begins anew
            assert options.preset.denoiser == "unet" and options.start is None and options.teacher
            guides.append(str(options.output))
            continue
        assert options.start == written[-1]
        assert options.preset.image_size == saved[None].image_size
        saved[str(options.output)] = options.preset
        if options.steps[0] or options.start is None:
            assert bool(options.teacher) == (options.preset.encoder == "tiny")
        written.append(str(options.output))
        folders.add(options.run.folder)
        stages = [a + b for a, b in zip(stages, options.steps, strict=True)]
    assert written[-1] == f"data/{family}" and len(folders) == len(written) - 1
    assert min(stages[1:3]) > 0 and stages[1] % 3 == stages[2] % 3 == 0
    assert bool(stages[0]) == (saved[None].encoder == "tiny")  # a student of its teacher


def test_help_lists_them(capsys):
    with pytest.raises(SystemExit) as end:
        main(["train", "--help"])
    assert end.value.code == 0
    shown = capsys.readouterr().out
    for option in ("--preset.first-stage-lr", "--accumulation", "--output", "--subset"):
        assert option in shown


@pytest.mark.slow
@pytest.mark.parametrize(
    ("words", "hint"),
    [
        ("", "small-sr"),
        ("--joint small", "small-sr"),
        ("huge -o o", "huge"),
        ("small", "--output"),
        ("small -o o --preset.colour 3", "--preset.colour"),
        ("small -o o --steps 1 2 3", "--steps"),
        ("small -o o --steps 1 2 3 -4", "-4"),
        ("small -o o --pool 1", "pool"),
        ("small -o o --data photos --subset 0", "subset"),
        ("small -o o --subset 5", "--subset"),
        ("small -o o --parts 8 1 1", "--parts"),
        ("small -o o --whole", "--whole"),
        ("small -o o --data photos --whole", " x "),
        ("small -o o --precision fp8", "fp8"),
        ("small -o o --accumulation 0", "accumulation"),
        ("small -o o --preset.prediction x0", "x0"),
        ("small -o o --preset.target-sizes 9 8", "9"),
        ("small -o o --preset.lpips-weight 1", "LPIPS"),
        ("small -o o --start nowhere", "nowhere"),
        ("small -o o --data nowhere", "nowhere"),
        ("small -o o --accumulation 3", "autoencoder"),
        ("small -o o --teacher nowhere", "nowhere"),
        ("cats -o o --teacher nowhere", "nowhere"),
    ],
)
def test_nonsense_gives_status_2(run, tmp_path, monkeypatch, words, hint):
    monkeypatch.setenv("ARBSCALE_DATA", str(tmp_path))
    status, text = run(words)
    assert status == 2 and hint in text and "Traceback" not in text
    assert not (tmp_path / "o").exists()


@pytest.mark.parametrize(
    ("words", "parts"),
    [("800 100 100", (800, 100, 100)), ("800 0 0", (800, 0, 0)), ("0.5 0.5 0", (0.5, 0.5, 0.0))],
)
def test_a_folder_is_split_as_asked(monkeypatch, words, parts):
    asked = []
    monkeypatch.setattr(
        command, "open_dataset", lambda *a, **k: asked.append((a, k)) or [torch.zeros(3, 40, 40)]
    )
    options = parse(f"tiny -o o --data pics --parts {words} --subset 9".split())
    command._source(options)
    assert asked == [(("pics", "train"), {"parts": parts, "subset": 9})]
    assert {type(part) for part in asked[0][1]["parts"]} == {type(parts[0])}


def test_square_pictures_are_taken_whole(monkeypatch):
    monkeypatch.setattr(command, "open_dataset", lambda *_, **__: [torch.zeros(3, 40, 40)])
    options = parse("tiny -o o --data small --whole".split())
    assert command._source(options)(1, torch.Generator()).largest == 40


@pytest.mark.parametrize("own", [True, False])
def test_a_set_and_a_folder_of_one_name_are_told_apart(tmp_path, monkeypatch, capsys, own):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("ARBSCALE_DATA", raising=False)
    if own:
        (tmp_path / "scenes").mkdir()
    command._source(parse("tiny -o o".split()))
    assert ("./scenes" in capsys.readouterr().out) == own


@pytest.mark.parametrize(
    ("data", "begun", "facts"),
    [
        ("scenes", "", {"MIT"}),
        ("scenes", command.SCENES, {"MIT"}),
        ("scenes", "CC BY-NC 4.0, as the pictures of AFHQ are", {"CC BY-NC 4.0"}),
        ("afhq_cats", "MIT; like scenes", {"CC BY-NC 4.0"}),
        ("afhq_cats", "CC BY-NC 4.0, as the pictures of AFHQ are", {"CC BY-NC 4.0"}),
        ("afhq_cats/hi256", "", {"CC BY-NC 4.0"}),
        ("DIV2K", command.AFHQ, {"CC BY-NC 4.0", "for academic research only"}),
        ("mine", command.AFHQ, {"CC BY-NC 4.0", command.UNKNOWN}),
        ("mine", f"{command.AFHQ} AND {command.UNKNOWN}", {"CC BY-NC 4.0", command.UNKNOWN}),
        ("mine", "", {command.UNKNOWN}),
        ("./scenes", "", {command.UNKNOWN}),
    ],
)
def test_the_stricter_licence_wins(data, begun, facts):
    terms = command.licence(data, begun).split(" AND ")
    assert len(terms) == len(facts)
    assert all(any(term.startswith(fact) for term in terms) for fact in facts)


def test_the_licence_of_the_folder_that_one_stands_in(tmp_path, monkeypatch):
    (tmp_path / "afhq_cats256" / "train").mkdir(parents=True)
    (tmp_path / "cats").symlink_to(tmp_path / "afhq_cats256")
    monkeypatch.chdir(tmp_path / "afhq_cats256" / "train")
    assert command.licence(".") == command.licence(str(tmp_path / "cats")) == command.AFHQ


# Runs ---------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_the_run_folder_and_the_weights(run, tmp_path):
    assert run("small --pool 8 --steps 2 2 2 2 -o mine --log-every 1")[0] == 0
    folder = tmp_path / "runs" / "mine"
    config = json.loads((folder / "config.json").read_text())
    assert config["options"]["preset"]["image_size"] == 16
    assert config["options"]["run"]["log_every"] == 1 and config["torch"]
    assert set(read_summary(folder)) == {"autoencoder", "decoder", "diffusion", "alignment"}
    assert len(read_log(folder)) == 8
    manifest = store.read_manifest(tmp_path / "mine")
    assert set(manifest["losses"]) == {"first stage", "diffusion", "alignment"}
    status, text = run("small --pool 8 --steps 2 2 2 2 -o mine")
    assert status == 2 and "--resume" in text
    before = (folder / "config.json").read_text()
    for change, fact in (("--joint", "joint"), ("--resampled 0.5", "--start")):
        status, text = run(f"small --pool 8 --steps 2 2 2 2 {change} -o mine --resume")
        assert status == 2 and fact in text
        assert (folder / "config.json").read_text() == before
    status, text = run("small --pool 8 --steps 2 3 2 2 -o mine --resume --allow-changes")
    assert status == 2 and "2 steps" in text and "--start" in text


def test_an_output_without_a_name_is_refused(run):
    status, text = run("small -o /")
    assert status == 2 and "--output" in text
    assert str(parse("small -o .".split()).run.folder) == f"runs/{Path.cwd().name}"


@pytest.mark.slow
def test_what_came_before_is_counted_once(run, tmp_path):
    assert run("small --steps 0 1 0 0 -o mine")[0] == 0
    path = tmp_path / "mine" / "manifest.json"
    manifest = json.loads(path.read_text()) | {"minutes": 7.0, "commands": ["the first"]}
    path.write_text(json.dumps(manifest))
    words = "small --start mine --steps 0 0 1 0 --pool 8 -o mine --folder on"
    assert run(words)[0] == 0
    for _ in range(2):
        assert run(f"{words} --resume")[0] == 0
    manifest = store.read_manifest(tmp_path / "mine")
    assert manifest["minutes"] < 7.5 and len(manifest["commands"]) == 2


@pytest.mark.slow
def test_a_stopped_run_is_resumed(run, tmp_path, monkeypatch):
    words = "small --pool 8 --steps 2 3 4 2 --save-every 1 --sample-every 0"
    assert run(f"{words} -o whole")[0] == 0
    draw = denoiser.DiffusionStage.draw

    def unlucky(self, generator, part):
        if not (tmp_path / "stopped").exists():
            (tmp_path / "stopped").touch()
            os.kill(os.getpid(), signal.SIGTERM)
        return draw(self, generator, part)

    monkeypatch.setattr(denoiser.DiffusionStage, "draw", unlucky)
    status, text = run(f"{words} -o mine")
    assert status == 2 and "SIGTERM" in text and "diffusion/step-00000001" in text
    assert run(f"{words} -o mine --resume")[0] == 0
    whole, mine = (ArbitraryScaleModel.load(tmp_path / name) for name in ("whole", "mine"))
    assert whole.scale_factor == mine.scale_factor
    pairs = zip(whole.state_dict().values(), mine.state_dict().values(), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)


@pytest.mark.slow
def test_the_images_are_compared_wherever_they_are(run, tmp_path):
    for k in range(6):
        image = Image.effect_noise((24, 24), 10 * k + 10)
        (tmp_path / "pics").mkdir(exist_ok=True)
        image.save(tmp_path / f"pics/{k}.png")
    words = "small --steps 0 1 0 0 --parts 1 0 0 --sample-every 0 -o mine"
    assert run(f"{words} --data pics")[0] == 0
    for same in ("pics/", f"{tmp_path}/pics", "./pics"):
        assert run(f"{words} --resume --data {same}")[0] == 0
    shutil.copytree(tmp_path / "pics", tmp_path / "moved/there")
    assert run(f"{words} --resume --data moved/there")[0] == 0
    (tmp_path / "pics/3.png").unlink()
    for name in "abcde":
        shutil.copy(tmp_path / "pics/0.png", tmp_path / f"pics/{name}.png")
    status, text = run(f"{words} --resume --data pics")
    assert status == 2 and "3.png" in text and "5 new (a.png" in text and "--allow-changes" in text
    with pytest.warns(UserWarning, match="3.png"):
        assert run(f"{words} --resume --data pics --allow-changes")[0] == 0


@pytest.mark.slow
def test_what_a_run_is_begun_from_is_compared_by_content(run, tmp_path):
    assert run("small --steps 0 1 0 0 -o first")[0] == 0
    assert run("small --steps 0 2 0 0 -o second")[0] == 0
    words = "small --steps 0 0 1 1 --pool 8 -o mine"
    assert run(f"{words} --start first --max-weight 5")[0] == 0
    assert run(f"{words} --start {tmp_path}/first/ --max-weight 5 --resume")[0] == 0
    for change, fact in (
        ("--start second --max-weight 5", "start"),
        ("--start first", "max_weight"),
    ):
        status, text = run(f"{words} {change} --resume")
        assert status == 2 and fact in text
    status, text = run(f"{words} --start first --max-weight 5 --pool 9 --resume")
    assert status == 2 and "pool" in text


@pytest.mark.slow
def test_the_licence_of_the_start_travels(run, tmp_path):
    assert run("small --steps 0 1 0 0 -o first")[0] == 0
    assert store.read_manifest(tmp_path / "first")["licence"] == command.SCENES
    path = tmp_path / "first" / "manifest.json"
    path.write_text(path.read_text().replace(command.SCENES, command.AFHQ))
    assert run("small --start first --steps 0 1 0 0 -o second")[0] == 0
    assert store.read_manifest(tmp_path / "second")["licence"] == command.AFHQ


@pytest.mark.slow
@pytest.mark.parametrize("error", [OSError(28, "No space left"), SafetensorError("No space left")])
def test_a_result_that_cannot_be_written(run, tmp_path, monkeypatch, error):
    def full(*_):
        raise error

    words = "small --steps 0 1 0 0 -o mine"
    with monkeypatch.context() as patch:
        patch.setattr(store, "save", full)
        status, text = run(words)
    assert status == 2 and text.strip().splitlines()[-1].startswith("arbscale: mine cannot")
    assert all(fact in text for fact in ("No space left", "runs/mine", "--resume`"))
    assert run(f"{words} --resume")[0] == 0 and (tmp_path / "mine/manifest.json").is_file()


def test_an_output_that_is_a_file_is_refused_before_training(run, tmp_path):
    (tmp_path / "mine").write_text("")
    status, text = run("small --steps 0 1 0 0 -o mine")
    assert status == 2 and "mine" in text and not (tmp_path / "runs").exists()


def test_folder_and_output_are_locked(run, tmp_path, monkeypatch):
    held, acquire = set(), store._acquire
    monkeypatch.setattr(store, "_acquire", lambda lock: held.add(lock.name) or acquire(lock))
    assert run("small --steps 0 1 0 0 -o mine --folder runs/else")[0] == 0
    assert held == {".mine.lock", ".else.lock"}
    assert sorted(path.name for path in tmp_path.iterdir()) == ["mine", "runs"]


@pytest.mark.slow
@pytest.mark.parametrize("encoding", ["ascii", "cp1252", "cp932"])
def test_a_terminal_that_cannot_show_a_name(run, tmp_path, monkeypatch, encoding):
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(io.BytesIO(), encoding=encoding))
    assert run("small --steps 0 1 1 0 --pool 8 -o 猫±Ω")[0] == 0
    assert set(read_summary(tmp_path / "runs/猫±Ω")) == {"decoder", "diffusion"}


@pytest.mark.slow
def test_one_command_a_stage(run, tmp_path):
    """Each starts from what the one before wrote; its numbers may change, its network not."""
    assert run("small-sr --data photos --steps 1 2 0 0 -o first")[0] == 0
    more = "small-sr --data photos --pool 8"
    assert run(f"{more} --start first --steps 0 0 2 0 --preset.diffusion-lr 1e-6 -o second")[0] == 0
    assert run(f"{more} --start second --steps 0 0 0 1 -o third")[0] == 0
    first, third = (ArbitraryScaleModel.load(tmp_path / name) for name in ("first", "third"))
    assert third.preset.diffusion_lr == 1e-6 and len(third.manifest["commands"]) == 3
    pairs = zip(
        first.first_stage.state_dict().values(),
        third.first_stage.state_dict().values(),
        strict=True,
    )
    assert all(torch.equal(a, b) for a, b in pairs)
    status, text = run(f"{more} --start first --preset.latent-channels 8 -o other")
    assert status == 2 and "weights of first" in text


@pytest.mark.slow
def test_a_stage_cannot_be_slipped_in_before_a_later_one(run):
    words = "small --sample-every 0 --pool 4 -o mine --steps"
    assert run(f"{words} 1 0 1 0")[0] == 0
    status, text = run(f"{words} 1 1 1 0 --resume")
    assert status == 2 and "diffusion, which comes after decoder" in text
    assert run(f"{words} 1 0 1 1 --resume")[0] == 0


@pytest.mark.slow
def test_a_teacher_gives_its_weights_or_its_latents(run, tmp_path, monkeypatch):
    preset = replace(presets.tiny(), **SMALL, encoder="tiny", tiny_channels=8, latent_channels=4)
    monkeypatch.setitem(presets.PRESETS, "taught", lambda: preset)
    torch.manual_seed(1)
    published = TinyEncoder(8, 4).layers.state_dict()
    save_file(published, tmp_path / "taesd.safetensors")
    words = "taught --teacher taesd.safetensors --sample-every 0 --pool 8"

    def encoder(name):
        return ArbitraryScaleModel.load(tmp_path / name).first_stage.encoder

    def same(name):
        state = encoder(name).layers.state_dict()
        return all(torch.equal(state[k], v.half().float()) for k, v in published.items())

    assert run(f"{words} --steps 0 1 1 0 -o first")[0] == 0
    assert same("first") and set(read_summary(tmp_path / "runs/first")) == {"decoder", "diffusion"}
    assert run(f"{words} --steps 2 0 0 0 -o learned")[0] == 0
    assert same("learned") and set(read_summary(tmp_path / "runs/learned")) == {"student"}
    thin = f"{words} --start first --preset.tiny-channels 4 --steps 2 0 0 0 -o student"
    assert run(thin)[0] == 0
    assert encoder("student").layers[0].weight.shape[0] == 4
    begun, ended = (ArbitraryScaleModel.load(tmp_path / name) for name in ("first", "student"))
    assert ended.scale_factor == begun.scale_factor and ended.preset.tiny_channels == 4
    for part in ("denoiser", "first_stage.liif", "first_stage.decoder"):
        pairs = (model.get_submodule(part).state_dict() for model in (begun, ended))
        assert all(torch.equal(a, b) for a, b in zip(*(p.values() for p in pairs), strict=True))
    assert run("taught --start student --steps 0 0 0 1 -o last")[0] == 0
    assert encoder("last").layers[0].weight.shape[0] == 4


@pytest.mark.slow
def test_profile(run, tmp_path, monkeypatch):
    monkeypatch.setattr("arbscale.training.profiling.STEPS", 3)
    monkeypatch.setattr("arbscale.training.profiling.WARM_UP", 1)
    monkeypatch.setattr("arbscale.training.profiling.POOL", 8)
    assert run("small --profile -o mine")[0] == 0
    text = (tmp_path / "mine" / "profile.txt").read_text()
    stages = [line.split()[0] for line in text.splitlines()[:4]]
    assert stages == ["autoencoder", "decoder", "diffusion", "alignment"]
    assert text.count("waiting for data") == 4 and text.count("aten::") > 20
    assert not (tmp_path / "runs").exists()


def test_one_process_is_profiled(run, monkeypatch):
    monkeypatch.setattr(command, "process_state", lambda: SimpleNamespace(num_processes=2))
    status, text = run("small --profile -o mine")
    assert status == 2 and "one process" in text


@pytest.mark.slow
@pytest.mark.parametrize("name", PAPER)
def test_the_papers_presets_start_save_and_resume(run, tmp_path, name):
    """Their depth, sizes halved again and again, and their widths cut: two steps of each stage."""
    preset = presets.get(name)
    low = f"--preset.low-size {preset.low_size // 8 or 1} " if preset.low_size else ""
    words = (
        f"{name} --pool 2 --steps 2 2 2 2 --save-every 1 --sample-every 0 {low}"
        "--preset.channels 32 --preset.unet-channels 32 --preset.blocks 1 --preset.unet-blocks 1 "
        f"--preset.image-size {preset.image_size // 8} --preset.target-sizes 8 16 "
        "--preset.first-stage-batch 1 --preset.diffusion-batch 1 "
        "--data " + ("photos" if low else "scenes")
    )
    assert run(f"{words} -o mine")[0] == 0
    before = (tmp_path / "mine" / "manifest.json").read_text()
    assert run(f"{words} -o mine --resume")[0] == 0
    after = (tmp_path / "mine" / "manifest.json").read_text()
    found, expected = ([f["sha256"] for f in json.loads(t)["files"]] for t in (after, before))
    assert found == expected
    assert json.loads(after)["preset"]["name"] == name
