"""What each step looks at: a function of the seed, the stage, the step and the part of a batch."""

from __future__ import annotations

import signal
import zlib
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from arbscale.store import InputError


@dataclass(frozen=True)
class _Draws(Dataset):
    """Item k is one process's share of part k of the run: a function of k alone."""

    stage: Any
    seed: int
    parts: int
    processes: int
    process: int

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        step, part = divmod(index, self.parts)
        share = self.stage.batch // (self.parts * self.processes)
        first = (part * self.processes + self.process) * share
        generator = step_generator(self.seed, self.stage.name, step)
        return self.stage.draw(generator, slice(first, first + share))


def loader(
    stage: Any,
    wanted: range,
    seed: int,
    parts: int = 1,
    workers: int = 0,
    processes: int = 1,
    process: int = 0,
) -> DataLoader:
    """Return what process `process` of `processes` looks at in the wanted parts of a `Stage`.

    A step has `parts` parts; part 0 is the first of step 0. ValueError where a batch cannot be
    shared evenly.
    """
    if stage.batch % (parts * processes):
        several = f"{processes} processes x {parts} parts"
        text = f"{stage.batch} images per step are no multiple of {several}"
        raise InputError(f"{stage.name}: {text}")
    return DataLoader(
        _Draws(stage, seed, parts, processes, process),
        batch_size=None,
        sampler=wanted,
        num_workers=workers,
        pin_memory=next(stage.parameters()).device.type == "cuda",
        generator=torch.Generator(),  # the loader would draw from the global one
        worker_init_fn=_outlive_signals,
    )


def _outlive_signals(worker: int) -> None:
    """Leave Ctrl-C and the first SIGTERM, which reach a whole group, to the process that trains."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda number, _: signal.signal(number, signal.SIG_DFL))


def step_generator(seed: int, name: str, step: int) -> torch.Generator:
    """Return the generator of one step of a stage."""
    entropy = (seed % (1 << 64), zlib.crc32(name.encode()), step)
    state = np.random.SeedSequence(entropy).generate_state(1, np.uint64)
    return torch.Generator().manual_seed(int(state[0]) >> 1)
