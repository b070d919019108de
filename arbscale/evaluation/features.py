"""Networks that turn images into features, and the features of reference sets kept on disk.

A distance over features is a statement about a network, so an `Extractor` carries its name. Two of
them, Inception and VGG-16, are those of published numbers and are downloaded by torch-fidelity. The
encoder ships with the package; AlexNet's weights come from torchvision. What is measured with these
two is not an FID.
"""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from pickle import UnpicklingError

import torch
import torch.nn.functional as F
from torch import Tensor

from arbscale.data import resize, to_uint8
from arbscale.data.folders import image_files
from arbscale.evaluation.resume import kept
from arbscale.store import InputError, content_key, reading, sha256

ENCODER = "photos-tiny"
"""The shipped model whose encoder serves as an extractor, for every model that is measured."""

SHA256 = {
    "6726825d": "6726825d0af5f729cebd5821db510b11b1cfad8faad88a03f1befd49fb9129b2",  # Inception
    "397923af": "397923af8e79cdbb6a7127f12361acd7a2f83e06b05044ddf496e83de57a5bf0",  # VGG-16
}
"""By their first digits, of the networks that published numbers are over."""

CHUNK = (64, 4)
"""Images at once on a GPU, and on a CPU, whose cache holds no more."""


@dataclass(frozen=True)
class Extractor:
    """Images (B, 3, H, W) in [-1, 1] -> features (B, D), float32 on the CPU.

    `label` says which numbers of which network they are, `key` tells two sets of weights apart.
    Images are rounded to 8 bits first, as a file would hold them.
    """

    name: str
    label: str
    dimensions: int
    key: str
    network: Callable[[Tensor], Tensor]  # takes 8-bit images
    device: torch.device = torch.device("cpu")

    @torch.no_grad()
    def __call__(self, images: Tensor) -> Tensor:
        """Return the features; ValueError for what is not a batch of images."""
        if images.ndim != 4 or images.shape[1] != 3 or not images.is_floating_point():
            raise InputError(f"expected float (B, 3, H, W), got {images.dtype} {images.shape}")
        if images.isnan().any():
            raise InputError("expected numbers in [-1, 1], got NaN")
        few = to_uint8(images).split(CHUNK[self.device.type == "cpu"])
        return torch.cat([self.network(x.to(self.device)).float().cpu() for x in few])


def extractor(name: str, device: torch.device | str = "cpu") -> Extractor:
    """Return an extractor by name.

    "inception" (2,048 numbers, FID's) and "vgg16" (4,096, precision's and recall's) are
    torch-fidelity's; "encoder" (the shipped encoder of `ENCODER`) and "alexnet" (torchvision's) are
    for machines that have neither. FileNotFoundError where weights are missing says what to do.
    """
    makers = {"encoder": _encoder, "alexnet": _alexnet, "inception": _fidelity, "vgg16": _fidelity}
    if name not in makers:
        raise InputError(f"unknown features {name!r}; take one of {', '.join(makers)}")
    return makers[name](name, torch.device(device))


def _encoder(name: str, device: torch.device) -> Extractor:
    """Average what the last convolution sees over the four quarters of an image of 128 px."""
    from arbscale.model import ArbitraryScaleModel

    model = ArbitraryScaleModel.load(ENCODER)
    encoder = model.first_stage.encoder.to(device)
    encoder.conv = encoder.head = torch.nn.Identity()  # to end with what the last one sees

    def network(levels: Tensor) -> Tensor:
        found = encoder(resize(levels.float() / 127.5 - 1, 128))
        return F.adaptive_avg_pool2d(found, 2).flatten(1)  # (B, C, 2, 2) -> (B, 4 C)

    width = 4 * encoder.norm.num_channels
    label = f"{ENCODER}'s encoder at 128 px, normalised middle activations, means over the quarters"
    label, key = f"{label}, {width} numbers", content_key(model.manifest["files"])
    return Extractor(name, label, width, key, network, device)


def _alexnet(name: str, device: torch.device) -> Extractor:
    """Average the activations after the last convolution over an image of 224 px."""
    import torchvision

    state = alexnet_state()
    layers = torchvision.models.alexnet().features[:12]  # up to the last ReLU
    layers.load_state_dict({k.removeprefix("features."): v for k, v in state.items()})
    layers = layers.eval().to(device)
    mean = torch.tensor([0.485, 0.456, 0.406], device=device).view(3, 1, 1)
    std = torch.tensor([0.229, 0.224, 0.225], device=device).view(3, 1, 1)

    def network(levels: Tensor) -> Tensor:
        images = resize(levels.float() / 127.5 - 1, 224) / 2 + 0.5  # in [0, 1]
        return layers((images - mean) / std).mean(dim=(2, 3))  # (B, 256)

    label = "AlexNet (ImageNet) at 224 px, last convolution, means over the image, 256 numbers"
    return Extractor(name, label, 256, content_key(module=layers), network, device)


def _fidelity(name: str, device: torch.device) -> Extractor:
    """Take one layer of an extractor that torch-fidelity has registered."""
    from torch_fidelity.feature_extractor_inceptionv3 import URL_INCEPTION_V3
    from torch_fidelity.utils import create_feature_extractor
    from torchvision.models import VGG16_Weights

    if name == "inception":
        registered, layer, width, url = "inception-v3-compat", "2048", 2048, URL_INCEPTION_V3
        label = "Inception-v3 (2015-12-05) of torch-fidelity, pool 3, 2048 numbers"
    else:
        registered, layer, width, url = name, "fc2_relu", 4096, VGG16_Weights.IMAGENET1K_V1.url
        label = "VGG-16 of torch-fidelity, fc2 after its ReLU, 4096 numbers"
    # torch-fidelity unpickles the file as it is: see first that it is the published one.
    _hub_state(url, "measure with --features encoder or alexnet, which is not an FID")
    network = create_feature_extractor(registered, [layer], cuda=False, verbose=False).to(device)
    key = f"torch-fidelity {registered} {layer}"
    return Extractor(name, label, width, key, lambda x: network(x)[0], device)


def alexnet_file() -> Path | None:
    """Return AlexNet's weights in torch hub's cache, or in ARBSCALE_WEIGHTS' folder; or None."""
    folders = [_checkpoints()]
    if own := os.environ.get("ARBSCALE_WEIGHTS"):
        folders.append(Path(os.path.expanduser(own)))
    for folder in folders:
        for path in (*sorted(folder.glob("alexnet-owt-*.pth")), folder / "alexnet_features.pth"):
            if path.is_file():
                return path
    return None


def alexnet_state() -> dict[str, Tensor]:
    """Return torchvision's convolutions `features.*`, downloaded where `alexnet_file` is None."""
    if path := alexnet_file():
        state = _checked_state(path)
    else:
        from torchvision.models import AlexNet_Weights

        mend = "put alexnet_features.pth into the folder that ARBSCALE_WEIGHTS names"
        state = _hub_state(AlexNet_Weights.IMAGENET1K_V1.url, mend)
    return {k: v for k, v in state.items() if k.startswith("features.")}


def _hub_state(url: str, mend: str) -> dict[str, Tensor]:
    """Return weights from torch hub's cache, or downloaded there, checked by their SHA-256.

    FileNotFoundError where they are neither in the cache nor within reach, ValueError for a file
    of another SHA-256.
    """
    path = _checkpoints() / url.rpartition("/")[2]
    if path.is_file():  # torch hub does not look at what it has
        return _checked_state(path)
    try:
        return torch.hub.load_state_dict_from_url(
            url, map_location="cpu", weights_only=True, check_hash=True
        )
    except RuntimeError as error:  # the hash
        raise InputError(f"{url} arrived damaged ({error}); run this again") from error
    except OSError as error:
        raise FileNotFoundError(
            f"{url} is neither in {_checkpoints()} nor can it be downloaded ({error}); run this "
            f"once where there is a network and copy that folder, or {mend}"
        ) from error


def _checked_state(path: Path) -> dict[str, Tensor]:
    """Return the weights in a file; ValueError unless it is the one that its name promises.

    Published files carry the first digits of their SHA-256 at the end of their names; of those in
    `SHA256` all digits are compared.
    """
    if digits := re.search("-([0-9a-f]{8})$", path.stem):
        wanted, found = SHA256.get(digits[1], digits[1]), sha256(path)
        if not found.startswith(wanted):
            raise InputError(f"{path} is damaged: its SHA-256 is {found}, not {wanted}; delete it")
    with reading(path, RuntimeError, UnpicklingError):
        return torch.load(path, map_location="cpu", weights_only=True)


def _checkpoints() -> Path:
    return Path(torch.hub.get_dir()) / "checkpoints"


def cache_folder() -> Path:
    """Return where features are kept: ARBSCALE_CACHE, or `arbscale` in the user's cache folder.

    Raises OSError where the user has no home folder.
    """
    own, usual = os.environ.get("ARBSCALE_CACHE"), os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    try:
        return Path(own).expanduser() if own else Path(usual).expanduser() / "arbscale"
    except RuntimeError as error:
        raise FileNotFoundError(f"{error}; set ARBSCALE_CACHE to a folder") from error


def reference_features(
    name: str, images: Sequence[Tensor], network: Extractor, batches: Callable[[], Iterable[Tensor]]
) -> Tensor:
    """Return the features (N, D) of a reference set, computed once and then read from disk.

    Where the cache cannot be used, a line on stderr says why, and they are computed each time.
    `images` is the source, which `fingerprint` tells from another; `name` says what was done to
    them: size and resize kernel. `batches()` gives the images (B, 3, H, W) as they are to be seen;
    it is called where nothing is kept yet.
    """
    key = content_key(name, fingerprint(images), network.name, network.label, network.key)

    def compute() -> dict[str, Tensor]:
        return {"features": torch.cat([network(x) for x in batches()])}

    try:
        path = cache_folder() / "features" / f"{key[:32]}.safetensors"
    except OSError as error:
        print(f"features are not kept: {error}", file=sys.stderr)
        return compute()["features"]
    return kept(path, compute, optional=True)["features"]


def fingerprint(images: Sequence[Tensor]) -> str:
    """Return what tells a set of images from another: files by name, length and time of change.

    Scenes go by seed and place in their sequence, tensors by their numbers.
    """
    if files := image_files(images):
        return content_key(files)
    if hasattr(images, "first"):
        return content_key("scenes", images.seed, images.first, images.count)
    return content_key([content_key(to_uint8(x).numpy().tobytes().hex()) for x in images])
