"""Two processes that are launched together write the files that one writes."""

import json
import os
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

pytestmark = pytest.mark.slow

LAUNCH = (
    "-m accelerate.commands.launch --multi_gpu --num_processes 2 --num_machines 1 "
    "--mixed_precision no --dynamo_backend no --main_process_port 0 -m arbscale"
)
COMMANDS = {
    "generate": "generate MODELS/cats -n 40 --size 9x12 -o FOLDER/g.png",
    "upscale": "upscale in --model MODELS/photos --scale 2 -o FOLDER",
    "evaluate": "evaluate MODELS/photos --data in --split all --scales 2 3 -o FOLDER/e.json",
}


@pytest.mark.parametrize(
    ("command", "sampler"),
    [("generate", "ddpm"), ("upscale", "dpm_solver_pp"), ("evaluate", "dpm_solver_pp")],
)
def test_two_processes_write_what_one_writes(models, tmp_path, command, sampler):
    (tmp_path / "in").mkdir()
    for i in range(5):
        pixels = np.random.default_rng(i).integers(0, 256, (40, 44 + i, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(tmp_path / "in" / f"{i}.png")
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}
    found = {}
    for folder, program in (("one", "-m arbscale"), ("two", LAUNCH)):
        words = f"{program} {COMMANDS[command]} --steps 2 --sampler {sampler}"
        words = words.replace("FOLDER", folder).replace("MODELS", str(models)).split()
        options = {"cwd": tmp_path, "env": environment, "capture_output": True, "text": True}
        done = subprocess.run([sys.executable, *words], timeout=300, **options)
        assert done.returncode == 0, done.stderr[-3000:]
        files = [path for path in (tmp_path / folder).rglob("*") if path.is_file()]
        found[folder] = {path.relative_to(tmp_path / folder): path.read_bytes() for path in files}
    if command == "evaluate":
        for files in found.values():
            ((path, content),) = files.items()
            report = json.loads(content)
            files[path] = {k: v for k, v in report.items() if k not in ("command", "timing")}
    assert found["one"] == found["two"]
    assert len(found["one"]) == {"generate": 40, "upscale": 10, "evaluate": 1}[command]


def test_a_damaged_image_stops_no_other_process(models, tmp_path):
    """The first process has little to do; one that ends with an error ends the others."""
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "0.png").write_bytes(b"no image")
    for i in range(1, 8):
        Image.new("RGB", (6, 6) if i % 2 == 0 else (60, 60)).save(tmp_path / "in" / f"{i}.png")
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}
    words = f"{LAUNCH} upscale in --model {models}/photos --scale 3 -o out".split()
    options = {"cwd": tmp_path, "env": environment, "capture_output": True, "text": True}
    done = subprocess.run([sys.executable, *words], timeout=300, **options)
    assert done.returncode and "1 images were left out" in done.stderr
    assert sorted(path.name for path in (tmp_path / "out").glob("*.png")) == [
        f"{i}.png" for i in range(1, 8)
    ]
