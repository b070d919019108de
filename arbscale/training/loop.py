"""The training loop: one for a laptop, for several GPUs, and for a machine that may be preempted.

Everything random in a step is a function of the seed, the stage, the step and the image's place in
the batch. So a resumed run ends in the same weights as one that was not stopped, and neither the
number of processes, nor of loader workers, nor the accumulation changes what is learned. But
`losses.lattice` and the discriminator see the images that are computed at once: smaller parts, more
noise.
"""

from __future__ import annotations

import contextlib
import copy
import math
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from arbscale import store
from arbscale.presets import Preset
from arbscale.store import InputError, StateError
from arbscale.training import checkpoints
from arbscale.training.draws import loader
from arbscale.training.processes import make_accelerator, noted_signals
from arbscale.training.runlog import RunLog

LEAST = dict.fromkeys(("save_every", "keep", "log_every", "accumulation"), 1)
LEAST |= dict.fromkeys(("sample_every", "warm_up", "workers"), 0)
RECORD = {"step": int, "finished": bool, "seconds": float, "settings": dict}
KEPT = "precision accumulation clip warm_up ema_decay compile channels_last".split()
"""What decides the weights, to the last bit, and must not change when a run is resumed."""


@dataclass(frozen=True)
class Run:
    """How and where a stage is trained; the preset says what is learned."""

    folder: Path | None = None  # configuration, log, samples and checkpoints; None keeps nothing
    resume: bool = False  # from the newest intact checkpoint in the folder
    allow_changes: bool = False  # resume although settings or images have changed since
    save_every: int = 500  # steps from checkpoint to checkpoint
    keep: int = 3  # checkpoints kept per stage
    sample_every: int = 1000  # steps from one sheet of samples to the next; 0 for none
    log_every: int = 10  # steps from one line of the log to the next
    precision: Literal["no", "bf16"] = "no"  # bf16: mixed precision
    accumulation: int = 1  # parts that a batch is computed in, one after the other, to save memory
    clip: float = 1.0  # largest norm of the gradient
    warm_up: int = 100  # steps until the full learning rate, at most a tenth of all; then a cosine
    ema_decay: float = 0.999  # of the denoiser's averaged weights
    workers: int = 0  # processes that prepare batches; 0: the training process itself
    compile: bool = False  # by torch.compile, for GPUs: slow to start, then faster
    checkpointing: bool = False  # recompute the U-Net's activations: less memory, more time
    channels_last: bool = False  # memory layout of convolutions; faster on GPUs in bf16
    latents: Path | None = None  # where encoded images are kept; by default in the folder

    def __post_init__(self) -> None:
        """Refuse numbers out of range by ValueError."""
        if self.resume and self.folder is None:
            raise InputError("resume needs a folder, that of the run")
        for name, least in LEAST.items():
            if getattr(self, name) < least:
                raise InputError(f"{name} is at least {least}, got {getattr(self, name)}")
        if self.precision not in ("no", "bf16"):
            raise InputError(f"precision is 'no' or 'bf16', got {self.precision!r}")
        if not self.clip > 0:
            raise InputError(f"clip is positive, got {self.clip}")
        if not 0 <= self.ema_decay < 1:
            raise InputError(f"ema_decay is in [0, 1), got {self.ema_decay}")


class Stage(nn.Module):
    """One stage of training: the tensors of a step, and the loss.

    Parameters that require no gradient are not trained. All of the state is in the checkpoints.
    """

    name: str
    batch: int  # images per step, all processes together
    lr: float  # Adam's
    preset: Preset
    unit = "latents"  # what the throughput counts

    @property
    def averaged(self) -> nn.Module | None:
        """The part that ends in the moving average of its weights, if any."""
        return None

    def facts(self) -> dict[str, Any]:
        """Return what decides the weights beside preset and run, as JSON; see `compare`."""
        return {}

    def prepare(self, run: Run, accelerator: Any, seed: int) -> None:
        """Do what is done once, before the first step."""

    def draw(self, generator: torch.Generator, part: slice) -> dict[str, Tensor]:
        """Return the tensors that `forward` takes, for `part` of the batch that is drawn."""
        raise NotImplementedError

    def preview(self) -> list[tuple[Tensor, str]]:
        """Return images (3, H, W) with their labels, the same ones each time."""
        return []


def optimise(stage: Stage, steps: int, seed: int = 0, run: Run | None = None) -> list[float]:
    """Train a stage by Adam with warm-up, cosine decay and clipping; return the loss of each step.

    Raises RuntimeError where the loss or the gradient is not finite, the disk is full or SIGTERM
    came, and KeyboardInterrupt for Ctrl-C; both say how to resume. RuntimeError where another
    process has the folder, ValueError where the run does not fit it.
    """
    return _Training(stage, steps, seed, run or Run()).fit()


class _Training:
    """The training of one stage: its network, optimiser, average, log and step."""

    def __init__(self, stage: Stage, steps: int, seed: int, run: Run):
        self.stage, self.steps, self.seed, self.run = stage, steps, seed, run
        self.accelerator = make_accelerator(run.precision, next(stage.parameters()).device)
        self.folder = run.folder and Path(run.folder) / "checkpoints" / stage.name
        self.step, self.losses, self.seconds = 0, [], 0.0

    def fit(self) -> list[float]:
        """Train from the folder's newest checkpoint, or from the start."""
        alone = self.folder and self.accelerator.is_main_process
        try:
            with store.locked(self.run.folder) if alone else contextlib.nullcontext():
                return self._fit()
        except OSError as error:
            raise self._error(str(error)) from error
        except KeyboardInterrupt as stop:
            if stop.args:  # it came in the loop, which has saved a checkpoint
                raise
            raise self._error("interrupted", KeyboardInterrupt) from None

    def _fit(self) -> list[float]:
        found = self._find()
        if found:
            self._load(found[0])
        if found and found[1]["finished"]:
            if found[1]["step"] != self.steps:
                text = f"finished after {found[1]['step']} steps"
                raise InputError(f"{self.folder} has {text}; to train on, --start another run")
            return found[0]["losses"].tolist()
        try:
            self._build(found)
            if self.step < self.steps:
                self._loop()
            else:
                self._finish()
        finally:  # leave the network as a plain module, in the usual layout
            if self.run.channels_last:
                self.stage.to(memory_format=torch.contiguous_format)
            if hasattr(self, "log"):
                self.log.close()
        return self.losses

    def _find(self) -> tuple[dict[str, Tensor], dict] | None:
        if self.folder is None:
            return None
        self.settings = self._settings()  # now: an image may be gone at the first checkpoint
        if not self.run.resume:
            if checkpoints.saved(self.folder):
                raise InputError(f"{self.folder} is not empty: resume it, or take another folder")
            return None
        with self.accelerator.main_process_first():
            found = checkpoints.load_newest(self.folder, RECORD)
        if found:
            run, before = self.run, found[1]["settings"]
            checkpoints.compare(run.folder, before, self.settings, run.allow_changes)
        return found

    def _settings(self) -> dict:
        """Return what must stay the same when a run is resumed; learning rates may change."""
        preset = {k: v for k, v in self.stage.preset.to_dict().items() if not k.endswith("_lr")}
        preset = {k: list(v) if isinstance(v, tuple) else v for k, v in preset.items()}
        run = {k: getattr(self.run, k) for k in KEPT}
        if self.stage.averaged is None:
            del run["ema_decay"]
        return {"steps": self.steps, "seed": self.seed, **preset, **run, **self.stage.facts()}

    def _load(self, tensors: dict[str, Tensor]) -> None:
        try:
            self.stage.load_state_dict(_under("stage", tensors))
        except RuntimeError:
            text = f"{self.folder} holds another network; use its preset, or another folder"
            raise InputError(text) from None

    def _build(self, found: tuple[dict[str, Tensor], dict] | None) -> None:
        run, stage, accelerator = self.run, self.stage, self.accelerator
        if accelerator.num_processes > 1:
            stage.to(accelerator.device)
        self.device = next(stage.parameters()).device
        stage.prepare(run, accelerator, self.seed)
        if run.channels_last:
            stage.to(memory_format=torch.channels_last)
        if run.compile:
            stage.compile()
        self.average = copy.deepcopy(stage.averaged)
        self.parameters = [p for p in stage.parameters() if p.requires_grad]
        self.optimiser = torch.optim.Adam(self.parameters, lr=stage.lr, fused=True)
        if found:
            self._restore(*found)
        self.module = accelerator.prepare_model(stage, device_placement=False)
        self.log = RunLog(run.folder, stage.name, self.step, accelerator.is_main_process)

    def _restore(self, tensors: dict[str, Tensor], record: dict) -> None:
        self.step = record["step"]
        self.losses, self.seconds = tensors["losses"].tolist(), record["seconds"]
        if self.average is not None:
            self.average.load_state_dict(_under("average", tensors))
        moments: dict[int, dict[str, Tensor]] = {}
        # Laid out as the parameters are: the fused optimiser pairs numbers by place in memory.
        for name, tensor in self._place(_under("optimiser", tensors)).items():
            index, key = name.split(".")
            moments.setdefault(int(index), {})[key] = tensor
        shapes = {i: p.shape for i, p in enumerate(self.parameters)}  # changes may be allowed
        if all(shapes.get(i) == state["exp_avg"].shape for i, state in moments.items()):
            groups = self.optimiser.state_dict()["param_groups"]
            self.optimiser.load_state_dict({"state": moments, "param_groups": groups})

    def _loop(self) -> None:
        run, accelerator = self.run, self.accelerator
        wanted = range(self.step * run.accumulation, self.steps * run.accumulation)
        shared = run.accumulation, run.workers, accelerator.num_processes, accelerator.process_index
        options = {"initial": self.step, "total": self.steps, "unit": "step", "mininterval": 1}
        options["disable"] = not accelerator.is_main_process
        with (
            noted_signals(self.folder is not None) as signals,
            tqdm(desc=self.stage.name, **options) as bar,
        ):
            # Begun here so that its workers, too, outlive the first Ctrl-C.
            batches = iter(loader(self.stage, wanted, self.seed, *shared))
            while self.step < self.steps:
                started = time.perf_counter()
                waited, stop = self._advance(batches, signals)
                self._report(bar, time.perf_counter() - started, waited)
                if self.step == self.steps:
                    self._finish()
                elif stop or self.step % run.save_every == 0:
                    self._save()
                if stop:
                    name = signals[0] if signals else "a signal to another process"
                    kind = KeyboardInterrupt if name == "SIGINT" else StateError
                    raise self._error(f"stopped by {name}", kind)

    def _advance(
        self, batches: Iterator[dict[str, Tensor]], signals: list[str]
    ) -> tuple[float, bool]:
        """Take one step; return the seconds waited for data, and whether to stop."""
        self.optimiser.zero_grad()
        parts, total, waited = self.run.accumulation, 0.0, 0.0
        for k in range(parts):
            started = time.perf_counter()
            tensors = self._place(next(batches))
            waited += time.perf_counter() - started
            last = k == parts - 1
            with contextlib.nullcontext() if last else self.accelerator.no_sync(self.module):
                loss = self.module(**tensors) / parts
                self.accelerator.backward(loss)
            total = total + loss.detach().float()
        norm = self.accelerator.clip_grad_norm_(self.parameters, self.run.clip).item()
        value, stop = self._agree(total, bool(signals))
        for what, number in (("loss", value), ("gradient", norm)):
            if not math.isfinite(number):
                text = f"the {what} became {number} at step {self.step}; take a lower learning rate"
                raise self._error(text)
        for group in self.optimiser.param_groups:
            group["lr"] = self.stage.lr * learning_rate(self.step, self.steps, self.run.warm_up)
        self.optimiser.step()
        self._update_average()
        self.step += 1
        self.losses.append(value)
        return waited, stop

    def _place(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        placed = {k: v.to(self.device, non_blocking=True) for k, v in tensors.items()}
        if self.run.channels_last:
            images = {k: v for k, v in placed.items() if v.ndim == 4}
            placed |= {k: v.to(memory_format=torch.channels_last) for k, v in images.items()}
        return placed

    def _agree(self, loss: Tensor, stop: bool) -> tuple[float, bool]:
        """Return the mean loss, and whether any process is to stop."""
        if self.accelerator.num_processes == 1:
            return loss.item(), stop
        both = torch.stack([loss, torch.as_tensor(float(stop), device=loss.device)])
        value, stopping = self.accelerator.reduce(both, "mean").tolist()
        return value, stopping > 0

    @torch.no_grad()
    def _update_average(self) -> None:
        if self.average is not None:
            decay = min(self.run.ema_decay, (1 + self.step) / (10 + self.step))
            pairs = (self.average.parameters(), self.stage.averaged.parameters())
            for average, parameter in zip(*pairs, strict=True):
                average.lerp_(parameter, 1 - decay)

    def _report(self, bar: tqdm, seconds: float, waited: float) -> None:
        self.seconds += seconds
        rate = self.stage.batch * self.step / max(self.seconds, 1e-9)
        shown = {"loss": f"{_mean(self.losses[-50:]):.4f}", f"{self.stage.unit}/s": f"{rate:.0f}"}
        bar.set_postfix(shown, refresh=False)
        bar.update()
        if self.step % self.run.log_every == 0 or self.step == self.steps:
            rates = {"rate": rate, "seconds": seconds, "waiting": waited / seconds}
            lr = self.optimiser.param_groups[0]["lr"]
            self.log.scalars(self.step, loss=self.losses[-1], lr=lr, **rates)
        every = self.run.sample_every
        if every and self.step % every == 0 and self.log.active:
            self._preview()

    def _preview(self) -> None:
        """Draw samples with the averaged weights."""
        if self.average is None:
            return self.log.samples(self.step, self.stage.preview())
        kept = copy.deepcopy(self.stage.averaged.state_dict())
        self.stage.averaged.load_state_dict(self.average.state_dict())
        try:
            self.log.samples(self.step, self.stage.preview())
        finally:
            self.stage.averaged.load_state_dict(kept)

    def _save(self, finished: bool = False) -> None:
        if self.folder is None:
            return
        if self.accelerator.is_main_process:
            tensors = {f"stage.{k}": v for k, v in self.stage.state_dict().items()}
            tensors["losses"] = torch.tensor(self.losses, dtype=torch.float64)
            if not finished:
                tensors |= self._optimiser_tensors()
            record = {"stage": self.stage.name, "finished": finished, "seconds": self.seconds}
            record["settings"] = self.settings
            keep = 1 if finished else self.run.keep
            checkpoints.save(self.folder, self.step, tensors, record, keep)
        self.accelerator.wait_for_everyone()

    def _optimiser_tensors(self) -> dict[str, Tensor]:
        tensors = {}
        for i, moments in self.optimiser.state_dict()["state"].items():
            tensors |= {f"optimiser.{i}.{key}": value for key, value in moments.items()}
        if self.average is not None:
            tensors |= {f"average.{k}": v for k, v in self.average.state_dict().items()}
        return tensors

    def _finish(self) -> None:
        if self.average is not None:
            self.stage.averaged.load_state_dict(self.average.state_dict())
        self._save(finished=True)
        self.log.summary(
            steps=self.steps,
            loss=_mean(self.losses[-100:]),
            seconds=round(self.seconds, 1),
            rate=round(self.stage.batch * self.steps / max(self.seconds, 1e-9), 1),
            device=f"{self.device.type} x {self.accelerator.num_processes}",
            torch=torch.__version__,
            settings=asdict(self.run),
        )

    def _error(self, text: str, kind: type[BaseException] = StateError) -> BaseException:
        """Return an error that says where the run can be resumed from."""
        newest = checkpoints.saved(self.folder)[:1] if self.folder else []
        mend = f"resume from {newest[0]}" if newest else "no checkpoint was kept; start again"
        return kind(f"{self.stage.name}: {text}; {mend}")


def learning_rate(step: int, steps: int, warm_up: int) -> float:
    """Return the share of the full rate: a straight rise, then half a cosine down to 0."""
    warm_up = max(1, min(warm_up, steps // 10))
    if step < warm_up:
        return 1 / warm_up + (1 - 1 / warm_up) * step / warm_up
    return 0.5 + 0.5 * math.cos(math.pi * (step - warm_up) / (steps - warm_up))


def _mean(losses: list[float]) -> float:
    return sum(losses) / max(1, len(losses))


def _under(prefix: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return the tensors whose names start with `prefix.`, without it."""
    start = len(prefix) + 1
    return {k[start:]: v for k, v in tensors.items() if k.startswith(f"{prefix}.")}
