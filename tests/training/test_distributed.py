"""Two processes that share each batch learn what one does."""

import os
import subprocess
import sys

import pytest

from arbscale.training import read_log, read_summary

pytestmark = pytest.mark.slow

STAGES = ("autoencoder", "decoder", "diffusion", "alignment")
TRAINING = (
    "train tiny --steps 10 10 10 10 --pool 16 --log-every 1 --sample-every 10 --max-weight 5 "
    "--preset.image-size 16 --preset.target-sizes 8 24 --preset.first-stage-batch 4 "
    "--preset.diffusion-batch 8 --preset.first-stage-lr 5e-5 --preset.alignment-lr 1e-6"
)
LAUNCH = (
    "-m accelerate.commands.launch --multi_gpu --num_processes 2 --num_machines 1 "
    "--mixed_precision no --dynamo_backend no --main_process_port 0 -m arbscale"
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Train the same miniature alone and by two; without a GPU they talk over gloo."""
    place = tmp_path_factory.mktemp("runs")
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}
    for name, program in (("one", "-m arbscale"), ("two", LAUNCH)):
        command = [sys.executable, *f"{program} {TRAINING} -o {name}".split()]
        done = subprocess.run(
            command, cwd=place, env=environment, capture_output=True, text=True, timeout=300
        )
        assert done.returncode == 0, done.stderr[-3000:]
    return place


@pytest.mark.parametrize("stage", STAGES)
def test_two_processes_have_the_losses_of_one(folder, stage):
    notes = [read_summary(folder / "runs" / name)[stage] for name in ("one", "two")]
    assert [note["device"] for note in notes] == ["cpu x 1", "cpu x 2"]
    one, two = (
        [line["loss"] for line in read_log(folder / "runs" / name) if line["stage"] == stage]
        for name in ("one", "two")
    )
    assert len(one) == 10 and two == pytest.approx(one, abs=1e-5, rel=0)


def test_one_of_them_writes(folder):
    assert (folder / "two" / "manifest.json").is_file()
    samples = sorted(path.name for path in (folder / "runs" / "two" / "samples").iterdir())
    assert samples == sorted(f"{stage}-00000010.png" for stage in STAGES)
