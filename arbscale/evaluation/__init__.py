"""Evaluation: pairs against a truth, sets of pictures against sets, and speed."""

from arbscale.evaluation.bench import images_per_second, measure, naive_render
from arbscale.evaluation.distances import (
    fid,
    interval,
    nearest_distances,
    patch_frechet_distance,
    random_patches,
)
from arbscale.evaluation.features import Extractor, extractor, reference_features
from arbscale.evaluation.pairs import (
    Rows,
    Sampling,
    evaluate_pairs,
    lpips_or_why_not,
    pair_protocol,
    reconstruction_rows,
    score,
    upscaling_rows,
)
from arbscale.evaluation.protocols import get_protocol
from arbscale.evaluation.resume import Partial
from arbscale.evaluation.sets import Job, RealPictures, compare_sets, evaluate_generation

__all__ = [
    "Extractor",
    "Job",
    "Partial",
    "RealPictures",
    "Rows",
    "Sampling",
    "compare_sets",
    "evaluate_generation",
    "evaluate_pairs",
    "extractor",
    "fid",
    "get_protocol",
    "images_per_second",
    "interval",
    "lpips_or_why_not",
    "measure",
    "naive_render",
    "nearest_distances",
    "pair_protocol",
    "patch_frechet_distance",
    "random_patches",
    "reconstruction_rows",
    "reference_features",
    "score",
    "upscaling_rows",
]
