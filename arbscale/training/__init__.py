"""Training: the stages, the images they draw, and the loop that runs them."""

from arbscale.training.denoiser import finetune_alignment, train_diffusion
from arbscale.training.draws import step_generator
from arbscale.training.first_stage import (
    distil_encoder,
    train_autoencoder,
    train_decoder,
    train_first_stage,
)
from arbscale.training.loop import Run, Stage, optimise
from arbscale.training.processes import process_state
from arbscale.training.runlog import read_log, read_summary
from arbscale.training.sources import PhotoBatch, photo_source, scene_source, whole_source
