"""Evaluation: image pairs against a ground truth, sets against sets, and speed."""

from arbscale.evaluation.bench import images_per_second, naive_render
from arbscale.evaluation.distances import fid, interval, patch_frechet_distance, random_patches
from arbscale.evaluation.features import extractor
from arbscale.evaluation.pairs import (
    Rows,
    evaluate_pairs,
    get_protocol,
    lpips_or_why_not,
    pair_protocol,
    reconstruction_rows,
    upscaling_rows,
)
from arbscale.evaluation.resume import Partial
