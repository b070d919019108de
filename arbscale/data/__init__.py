"""Data: images from named sets, folders and downloads, single images, and continuous scenes."""

from arbscale.data.folders import ImageFolder
from arbscale.data.images import (
    load_image,
    low_high_pair,
    random_crop,
    resize,
    to_pil,
    to_tensor,
    to_uint8,
    training_crop,
)
from arbscale.data.scenes import FIELDS, MOODS, Scenes, render_scenes, sample_scenes, scene_colors
from arbscale.data.sets import (
    ContinuousScenes,
    PatchDataset,
    data_root,
    find_folder,
    open_dataset,
    sample_photos,
)
