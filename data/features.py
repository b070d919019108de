"""Writes data/cats/real.safetensors: AlexNet's features of real cats, for notebook 07.

ARBSCALE_DATA names the folder of afhq_cats256, ARBSCALE_WEIGHTS that of AlexNet's weights.
"""

from pathlib import Path

from safetensors.torch import save_file

from arbscale.data import open_dataset
from arbscale.evaluation import extractor
from arbscale.evaluation.sets import RealPictures

COUNT, SIZE = 480, (128, 128)

network = extractor("alexnet")
features = {
    split: RealPictures(open_dataset("afhq_cats256", split), COUNT).features(SIZE, network, split)
    for split in ("train", "test")
}
halves = {split: rows.half() for split, rows in features.items()}  # (480, 256) each
save_file(halves, Path(__file__).parent / "cats" / "real.safetensors", {"network": network.label})
