"""Arbitrary-scale image generation and up-sampling: latent diffusion and an implicit decoder.

Implements Kim and Kim 2024 (CVPR, arXiv 2403.10255).
"""

import os
import signal
import sys

if sys.argv[:1] == ["-m"] and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
    # `python -m arbscale` imports for seconds; Ctrl-C meanwhile is one line, not a traceback.
    signal.signal(signal.SIGINT, lambda *_: os._exit(os.write(2, b"arbscale: stopped\n") and 130))

from arbscale import metrics, presets
from arbscale.autoencoder import FirstStage
from arbscale.liif import LIIF
from arbscale.model import ArbitraryScaleModel
from arbscale.unet import UNet, pick_device

__version__ = "0.1.0"
REPOSITORY = "arbscale/arbscale"  # owner/name on GitHub; badges and the Colab cell take it
BRANCH = "main"
load = ArbitraryScaleModel.load
