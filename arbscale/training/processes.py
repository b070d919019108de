"""The processes of a run: where they compute, and the signals that stop them."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
from collections.abc import Iterator
from datetime import timedelta
from typing import Any

import torch

PATIENCE = timedelta(days=7)


def process_state(cpu: bool = False) -> Any:
    """Return accelerate's PartialState; processes that were launched together find each other.

    Where there is no GPU, or accelerate was told to use none, they talk over gloo. They wait for
    each other for days: shares of work may end hours apart, and who launched them ends them all
    where one fails.
    """
    from accelerate import PartialState
    from accelerate.utils import parse_flag_from_env

    several = int(os.environ.get("WORLD_SIZE", "1")) > 1
    no_gpu = not torch.cuda.is_available() or parse_flag_from_env("ACCELERATE_USE_CPU")
    return PartialState(cpu=no_gpu, timeout=PATIENCE) if several else PartialState(cpu=cpu)


def make_accelerator(precision: str, device: torch.device) -> Any:
    """Return accelerate's Accelerator, on `device` unless several processes share the run."""
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState
    from accelerate.utils import GradientAccumulationPlugin

    # Its settings live as long as the Python process; a notebook's next cell may want others.
    AcceleratorState._reset_state(not torch.distributed.is_initialized())
    process_state(cpu=device.type == "cpu")
    plugin = GradientAccumulationPlugin(num_steps=1)  # the loop accumulates
    return Accelerator(mixed_precision=precision, gradient_accumulation_plugin=plugin)


@contextlib.contextmanager
def noted_signals(wanted: bool) -> Iterator[list[str]]:
    """Collect SIGTERM and SIGINT by name; a second one acts as usual."""
    came: list[str] = []
    if not wanted or threading.current_thread() is not threading.main_thread():
        yield came
        return
    before = {s: signal.getsignal(s) for s in (signal.SIGTERM, signal.SIGINT)}

    def note(number: int, frame: Any) -> None:
        came.append(signal.Signals(number).name)
        signal.signal(number, before[number])

    for number in before:
        signal.signal(number, note)
    try:
        yield came
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
