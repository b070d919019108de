"""Training: the stages, the pictures they draw, and the loop that runs them."""

from arbscale.training.latents import fingerprint
from arbscale.training.loop import Run, Stage, optimise, step_generator
from arbscale.training.runlog import read_log, read_summary
from arbscale.training.sources import (
    Batch,
    PhotoBatch,
    PhotoSource,
    SceneBatch,
    SceneSource,
    Source,
    photo_source,
    scene_source,
    whole_source,
)
from arbscale.training.stages import (
    distil_encoder,
    finetune_alignment,
    train_autoencoder,
    train_decoder,
    train_diffusion,
    train_first_stage,
)

__all__ = [
    "Batch",
    "PhotoBatch",
    "PhotoSource",
    "Run",
    "SceneBatch",
    "SceneSource",
    "Source",
    "Stage",
    "distil_encoder",
    "finetune_alignment",
    "fingerprint",
    "optimise",
    "photo_source",
    "read_log",
    "read_summary",
    "scene_source",
    "step_generator",
    "train_autoencoder",
    "train_decoder",
    "train_diffusion",
    "train_first_stage",
    "whole_source",
]
