"""The loop: schedule, average, checkpoints, and how it ends when something goes wrong."""

import os
import signal
import subprocess
import sys
import warnings

import pytest
import torch
from torch import nn
from torch.optim.optimizer import register_optimizer_step_post_hook

from arbscale import presets
from arbscale.training import (
    Run,
    Stage,
    checkpoints,
    optimise,
    read_log,
    read_summary,
    step_generator,
)
from arbscale.training.loop import learning_rate
from arbscale.training.runlog import RunLog


class Line(Stage):
    """Learns to add three numbers; `on_step` is called with each step's number of looks."""

    name, batch, lr, unit = "line", 8, 0.1, "sums"
    preset = presets.tiny()

    def __init__(self, on_step=lambda step: None):
        super().__init__()
        torch.manual_seed(0)
        self.net, self.on_step, self.looks = nn.Linear(3, 1), on_step, 0

    @property
    def averaged(self):
        return self.net

    def draw(self, generator, part):
        return {"x": torch.randn(self.batch, 3, generator=generator)[part]}

    def forward(self, x):
        self.looks += 1
        self.on_step(self.looks)
        return (self.net(x) - x.sum(1, keepdim=True)).square().mean()

    def preview(self):
        return [(torch.zeros(3, 8, 8), "black")]


def trained(stage=None, steps=12, **options) -> tuple[list[float], torch.Tensor]:
    stage = stage or Line()
    losses = optimise(stage, steps, run=Run(**options))
    return losses, stage.net.weight.detach()


# The schedule and the average ---------------------------------------------------------------------


@pytest.mark.parametrize("steps", [5, 100, 3000])
def test_the_learning_rate_is_pytorchs_warm_up_and_cosine(steps):
    net = nn.Linear(1, 1)
    optimiser = torch.optim.SGD(net.parameters(), lr=1.0)
    warm = max(1, min(100, steps // 10))
    schedule = torch.optim.lr_scheduler.SequentialLR(
        optimiser,
        [
            torch.optim.lr_scheduler.LinearLR(optimiser, 1 / warm, total_iters=warm),
            torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, steps - warm),
        ],
        milestones=[warm],
    )
    for step in range(steps):
        assert learning_rate(step, steps, 100) == pytest.approx(schedule.get_last_lr()[0], abs=1e-6)
        optimiser.step()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            schedule.step()


@pytest.mark.parametrize("highest", [0.999, 0.3])
def test_the_average_of_the_weights_by_hand(highest):
    stage, after = Line(), []
    average = stage.net.weight.detach().clone()
    noted = register_optimizer_step_post_hook(
        lambda *_: after.append(stage.net.weight.detach().clone())
    )
    optimise(stage, 12, run=Run(ema_decay=highest))
    noted.remove()
    for step, weight in enumerate(after):
        decay = min(highest, (1 + step) / (10 + step))
        average = decay * average + (1 - decay) * weight
    assert len(after) == 12 and not torch.allclose(average, after[-1])
    torch.testing.assert_close(stage.net.weight.detach(), average)


def test_a_step_is_a_function_of_its_number():
    draws = [
        torch.rand(3, generator=step_generator(*key)).tolist()
        for key in ((0, "a", 0), (0, "a", 1), (0, "b", 0), (1, "a", 0), (-1, "a", 0))
    ]
    assert len({tuple(draw) for draw in draws}) == len(draws)
    assert draws[1] == torch.rand(3, generator=step_generator(0, "a", 1)).tolist()


def test_workers_and_parts_change_nothing():
    losses, weight = trained()
    again, same = trained(workers=2)
    assert again == losses and torch.equal(weight, same)
    parts, close = trained(accumulation=4)
    assert parts == pytest.approx(losses, abs=1e-6)
    torch.testing.assert_close(close, weight)


def test_the_global_generator_is_left_alone():
    torch.manual_seed(5)
    stage = Line()
    state = torch.get_rng_state()
    optimise(stage, 3)
    assert torch.equal(torch.get_rng_state(), state)


# Checkpoints and resumption -----------------------------------------------------------------------


@pytest.mark.parametrize("stop", [1, 3, 4, 11])
def test_a_resumed_run_ends_as_if_nothing_had_happened(tmp_path, stop):
    def interrupt(step):
        if step == stop:
            os.kill(os.getpid(), signal.SIGTERM)

    whole = trained(folder=tmp_path / "whole")
    with pytest.raises(RuntimeError, match=f"SIGTERM.*step-0+{stop}$"):
        trained(Line(interrupt), folder=tmp_path / "cut", save_every=3)
    losses, weight = trained(folder=tmp_path / "cut", resume=True, save_every=3)
    assert losses == whole[0] and torch.equal(weight, whole[1])
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL


class Filter(Line):
    """Learns to add the numbers of a small image."""

    def __init__(self, on_step=lambda step: None):
        super().__init__(on_step)
        self.net = nn.Conv2d(3, 1, 3)

    def draw(self, generator, part):
        return {"x": torch.randn(self.batch, 3, 3, 3, generator=generator)[part]}


def test_a_resumed_run_keeps_its_moments_in_another_memory_layout(tmp_path):
    def interrupt(step):
        if step == 4:
            os.kill(os.getpid(), signal.SIGTERM)

    how = {"channels_last": True}
    whole = trained(Filter(), folder=tmp_path / "whole", **how)
    with pytest.raises(RuntimeError, match="SIGTERM"):
        trained(Filter(interrupt), folder=tmp_path / "cut", **how)
    losses, weight = trained(Filter(), folder=tmp_path / "cut", resume=True, **how)
    assert losses == whole[0] and torch.equal(weight, whole[1])


def test_a_finished_stage_is_not_trained_again(tmp_path):
    losses, weight = trained(folder=tmp_path)
    stage = Line()
    again, same = trained(stage, folder=tmp_path, resume=True)
    assert stage.looks == 0 and again == losses and torch.equal(same, weight)


def test_checkpoints_are_rotated_and_one_is_left(tmp_path):
    seen = []
    folder = tmp_path / "checkpoints" / "line"
    trained(
        Line(lambda _: seen.append(len(checkpoints.saved(folder)))),
        folder=tmp_path, save_every=1, keep=2,
    )  # fmt: skip
    assert max(seen) == 2
    assert [path.name for path in checkpoints.saved(folder)] == ["step-00000012"]


def test_a_damaged_newest_checkpoint_costs_time_alone(tmp_path):
    def interrupt(step):
        if step == 8:
            os.kill(os.getpid(), signal.SIGTERM)

    whole = trained()
    with pytest.raises(RuntimeError):
        trained(Line(interrupt), folder=tmp_path, save_every=3)
    newest = checkpoints.saved(tmp_path / "checkpoints" / "line")[0]
    (newest / "state.safetensors").write_bytes(b"nothing")
    with pytest.warns(UserWarning, match=newest.name):
        losses, weight = trained(folder=tmp_path, resume=True)
    assert losses == whole[0] and torch.equal(weight, whole[1])


def test_a_run_is_not_overwritten_nor_mixed(tmp_path):
    trained(folder=tmp_path, steps=4)
    with pytest.raises(ValueError, match="line"):
        trained(folder=tmp_path, steps=4)
    with pytest.raises(ValueError, match="steps.*4.*6"):
        trained(folder=tmp_path, steps=6, resume=True)


# Bad ends -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(("bad", "what"), [("loss", "loss.*nan"), ("grad", "gradient")])
def test_what_is_not_finite_stops_before_it_spoils_anything(tmp_path, bad, what):
    stage = Line()

    def forward(x):
        loss = Line.forward(stage, x)
        if stage.looks < 8:
            return loss
        return loss * float("nan") if bad == "loss" else loss + (stage.net.weight * 0).sum().sqrt()

    stage.forward = forward
    with pytest.raises(RuntimeError, match=f"line.*{what}.*step-0+6$"):
        trained(stage, folder=tmp_path, save_every=3)
    state, record = checkpoints.load_newest(tmp_path / "checkpoints" / "line")
    assert record["step"] == 6 and all(t.isfinite().all() for t in state.values())


def test_a_full_disk_ends_with_the_old_checkpoint(tmp_path, monkeypatch):
    save, saves = checkpoints.save_file, []

    def full(tensors, path):
        saves.append(path)
        if len(saves) == 2:
            raise OSError(28, "No space left on device")
        save(tensors, path)

    monkeypatch.setattr(checkpoints, "save_file", full)
    with pytest.raises(RuntimeError, match="No space left.*step-0+3$"):
        trained(folder=tmp_path, save_every=3)
    monkeypatch.undo()
    losses, weight = trained(folder=tmp_path, resume=True)
    whole = trained()
    assert losses == whole[0] and torch.equal(weight, whole[1])


def test_without_a_folder_nothing_is_promised(monkeypatch):
    stage = Line()
    stage.forward = lambda x: stage.net(x).mean() * float("inf")
    with pytest.raises(RuntimeError, match="line.*loss.*inf"):
        trained(stage)


def test_a_batch_that_cannot_be_shared():
    with pytest.raises(ValueError, match="line.*8.*3"):
        trained(accumulation=3)


@pytest.mark.parametrize(
    "options",
    [
        {"resume": True},
        {"save_every": 0},
        {"workers": -1},
        {"precision": "fp8"},
        {"clip": 0.0},
        {"ema_decay": 1.0},
    ],
)
def test_nonsense_is_refused(options):
    with pytest.raises(ValueError, match=next(iter(options))):
        Run(**options)


# Interruptions, other processes, changes ----------------------------------------------------------


def interrupts(step, count=1):
    """Return a function that presses Ctrl-C in a step."""

    def press(now):
        for _ in range(count if now == step else 0):
            os.kill(os.getpid(), signal.SIGINT)

    return press


@pytest.mark.parametrize(("count", "fact"), [(1, "SIGINT.*step-0+5$"), (2, "line.*step-0+3$")])
def test_ctrl_c_in_the_loop_is_one_line(tmp_path, count, fact):
    with pytest.raises(KeyboardInterrupt, match=fact) as stopped:
        trained(Line(interrupts(5, count)), folder=tmp_path, save_every=3)
    assert "\n" not in str(stopped.value)
    losses, weight = trained(folder=tmp_path, resume=True)
    whole = trained()
    assert losses == whole[0] and torch.equal(weight, whole[1])


def test_ctrl_c_before_the_loop_is_one_line(tmp_path):
    stage = Line()
    stage.prepare = lambda *_: os.kill(os.getpid(), signal.SIGINT)
    with pytest.raises(KeyboardInterrupt, match="line"):
        trained(stage, folder=tmp_path)


@pytest.mark.skipif(os.name == "nt", reason="a signal to a process alone")
def test_workers_leave_signals_to_the_training():
    stage, came = Line(), []

    def draw(generator, part):
        for number in (signal.SIGINT, signal.SIGINT, *([] if came else [signal.SIGTERM])):
            os.kill(os.getpid(), number)
        came.append(True)
        return Line.draw(stage, generator, part)

    stage.draw = draw
    assert trained(stage, workers=1)[0] == trained()[0]


@pytest.mark.slow
def test_a_folder_has_one_training(tmp_path):
    """The second process says who holds it, and the first one's checkpoints stay whole."""
    program = (
        "import sys, time; from arbscale import store\n"
        "with store.locked(sys.argv[1]): print('held', flush=True); time.sleep(60)"
    )
    words = [sys.executable, "-c", program, str(tmp_path / "run")]
    with subprocess.Popen(words, stdout=subprocess.PIPE) as other:
        other.stdout.readline()
        with pytest.raises(RuntimeError, match=str(other.pid)):
            trained(folder=tmp_path / "run")
        assert not (tmp_path / "run").exists()
        other.kill()
    trained(folder=tmp_path / "run", steps=2)
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


def test_a_disk_that_is_full_when_the_log_is_closed(tmp_path, monkeypatch):
    def full(self):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(RunLog, "close", full)
    with pytest.raises(RuntimeError, match="line.*No space left.*step-"):
        trained(folder=tmp_path)


class Pictures(Line):
    """A line that is drawn from files."""

    def __init__(self, files, width=3):
        super().__init__()
        self.files, self.net = files, nn.Linear(width, 1)

    def facts(self):
        return {"images": self.files}


FILES = {"a.png": 10, "b.png": 20}


@pytest.mark.parametrize(
    ("files", "options", "facts"),
    [
        ({"a.png": 10}, {}, ["b.png"]),
        ({**FILES, "c.png": 1}, {}, ["c.png"]),
        ({"a.png": 10, "b.png": 21}, {}, ["b.png"]),
        (dict(reversed(FILES.items())), {}, ["images", "order"]),
        (FILES, {"clip": 0.5}, ["clip", "1.0", "0.5"]),
        (FILES, {"precision": "bf16"}, ["precision", "bf16"]),
        (FILES, {"accumulation": 2}, ["accumulation", "2"]),
        (FILES, {"ema_decay": 0.5}, ["ema_decay", "0.5"]),
        (FILES, {"warm_up": 5}, ["warm_up", "5"]),
    ],
)
def test_what_changes_the_weights_is_named_when_resumed(tmp_path, files, options, facts):
    stage = Pictures(FILES)
    stage.on_step = interrupts(5)
    with pytest.raises(KeyboardInterrupt):
        trained(stage, folder=tmp_path)
    options = {"folder": tmp_path, "resume": True, **options}
    with pytest.raises(ValueError, match="allow") as refused:
        trained(Pictures(files), **options)
    assert all(fact in str(refused.value) for fact in facts)
    with pytest.warns(UserWarning, match=facts[0]):
        losses, _ = trained(Pictures(files), **options, allow_changes=True)
    assert len(losses) == 12


def test_what_is_compared_is_noted_at_the_start(tmp_path):
    stage = Pictures(FILES)

    def gone(step):
        stage.files = {}
        interrupts(5)(step)

    stage.on_step = gone
    with pytest.raises(KeyboardInterrupt):
        trained(stage, folder=tmp_path)
    assert len(trained(Pictures(FILES), folder=tmp_path, resume=True)[0]) == 12


def test_another_network_cannot_be_resumed_at_all(tmp_path):
    trained(Pictures(FILES), folder=tmp_path, steps=2)
    options = {"resume": True, "allow_changes": True, "steps": 2}
    with pytest.raises(ValueError, match="line"):
        trained(Pictures(FILES, width=4), folder=tmp_path, **options)


# What is left to look at --------------------------------------------------------------------------


@pytest.mark.slow
def test_the_run_folder(tmp_path):
    losses, _ = trained(folder=tmp_path, log_every=5, sample_every=6)
    lines = read_log(tmp_path)
    assert [line["step"] for line in lines] == [5, 10, 12]
    assert [line["loss"] for line in lines] == [losses[4], losses[9], losses[11]]
    assert all(0 <= line["waiting"] <= 1 and line["rate"] > 0 for line in lines)
    assert [p.name for p in sorted((tmp_path / "samples").iterdir())] == [
        "line-00000006.png",
        "line-00000012.png",
    ]
    note = read_summary(tmp_path)["line"]
    assert note["steps"] == 12 and note["loss"] == pytest.approx(sum(losses) / 12)
    assert list((tmp_path / "tensorboard").iterdir())


def test_a_sheet_of_samples_is_whole_or_not_there(tmp_path, monkeypatch):
    def full(self, file, *args, **options):
        with open(file, "wb") as half:
            half.write(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("PIL.Image.Image.save", full)
    log = RunLog(tmp_path, "line", 0, main=True)
    with pytest.raises(OSError, match="No space left.*line-00000006.png"):
        log.samples(6, [(torch.zeros(3, 4, 4), "zero")])
    log.close()
    assert not list((tmp_path / "samples").iterdir())


def test_tensorboard_reads_it(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    losses, _ = trained(folder=tmp_path, log_every=1, sample_every=6)
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    read = [event.value for event in events.Scalars("line/loss")]
    assert read == pytest.approx(losses, rel=1e-5)
    assert events.Tags()["images"] == ["line/samples"]


def test_the_log_of_a_killed_run_has_no_line_twice(tmp_path):
    def interrupt(step):
        if step == 5:
            os.kill(os.getpid(), signal.SIGTERM)

    with pytest.raises(RuntimeError):
        trained(Line(interrupt), folder=tmp_path, log_every=1)
    with (tmp_path / "log.jsonl").open("a") as log:  # after the checkpoint, and a line cut off
        log.write('{"stage": "line", "step": 6, "loss": 99}\n{"stage": "li')
    trained(folder=tmp_path, log_every=1, resume=True)
    lines = read_log(tmp_path)
    assert [line["step"] for line in lines] == list(range(1, 13))
    assert max(line["loss"] for line in lines) < 99
