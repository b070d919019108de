"""The records of a run: a log, TensorBoard scalars and images, and a summary."""

from __future__ import annotations

import contextlib
import json
from pathlib import Path

from torch import Tensor

from arbscale import store

LOG, SUMMARY = "log.jsonl", "summary.json"


class RunLog:
    """Writes into a run's folder, or nowhere: without a folder, and in all but one process.

    `step` is where the stage resumes; what a killed run wrote after it is dropped.
    """

    def __init__(self, folder: Path | None, stage: str, step: int, main: bool):
        self.active = folder is not None and main
        self.stage = stage
        if not self.active:
            return
        from torch.utils.tensorboard import SummaryWriter

        self.folder = Path(folder)
        kept = [  # without what comes after `step`, and without a line that was cut off
            json.dumps(line) + "\n"
            for line in read_log(self.folder)
            if line["stage"] != stage or line["step"] <= step
        ]
        store.write_text(self.folder / LOG, "".join(kept))
        self.file = (self.folder / LOG).open("a", encoding="utf-8")
        self.board = SummaryWriter(self.folder / "tensorboard", purge_step=step)

    def scalars(self, step: int, **values: float) -> None:
        """Note numbers after a step."""
        if self.active:
            line = {"stage": self.stage, "step": step, **values}
            self.file.write(json.dumps(line) + "\n")
            self.file.flush()
            for name, value in values.items():
                self.board.add_scalar(f"{self.stage}/{name}", value, step)

    def samples(self, step: int, images: list[tuple[Tensor, str]]) -> None:
        """Write labelled images (3, H, W) as one sheet."""
        if not self.active or not images:
            return
        from torchvision.transforms.functional import pil_to_tensor

        from arbscale.viz import contact_sheet

        sheet = contact_sheet(images, columns=2, box=192)  # they come in pairs
        path = self.folder / "samples" / f"{self.stage}-{step:08d}.png"
        with store.replacing(path) as draft:
            sheet.save(draft)
        self.board.add_image(f"{self.stage}/samples", pil_to_tensor(sheet), step)

    def summary(self, **values: object) -> None:
        """Add the stage to `summary.json`."""
        if self.active:
            stages = {**read_summary(self.folder), self.stage: values}
            text = json.dumps(stages, indent=2, default=str)
            store.write_text(self.folder / SUMMARY, text + "\n")

    def close(self) -> None:
        """Finish the files."""
        if self.active:
            self.file.close()
            self.board.close()


def read_log(folder: Path) -> list[dict]:
    """Return a run's log: stage, step, loss, lr, rate, a step's seconds, share of waiting."""
    path = Path(folder) / LOG
    lines = []
    for text in path.read_text(encoding="utf-8").splitlines() if path.is_file() else []:
        with contextlib.suppress(ValueError, *store.STRAY):  # cut off when the process was killed
            line = json.loads(text)
            lines.append({**line, "stage": str(line["stage"]), "step": int(line["step"])})
    return lines


def read_summary(folder: Path) -> dict:
    """Return what each finished stage of a run noted; `seconds` is always there."""
    path = Path(folder) / SUMMARY
    with store.reading(path):
        found = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
        return {stage: {**note, "seconds": float(note["seconds"])} for stage, note in found.items()}
