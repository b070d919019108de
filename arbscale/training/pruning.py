"""Where a narrow tiny encoder starts: the channels of a wide one that carry most."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from arbscale.autoencoder import TinyEncoder
from arbscale.store import InputError


@torch.no_grad()
def inherit(student: TinyEncoder, teacher: TinyEncoder, images: Tensor) -> None:
    """Copy into the student those channels of the teacher that matter most on images.

    A channel matters by its root mean square times the norm of the weights that read it. Where it
    is left out, its mean goes into the next bias. Images are (B, 3, H, W) in [-1, 1]; a student as
    wide as its teacher becomes its copy. ValueError where it, or its latent, is wider.
    """
    width, most = student.layers[0].out_channels, teacher.layers[0].out_channels
    if width > most:
        raise InputError(f"a student of {width} channels is wider than its teacher: {most}")
    given, wanted = (encoder.layers[-1].out_channels for encoder in (teacher, student))
    if given != wanted:
        raise InputError(f"the teacher's latents have {given} channels, not {wanted}")
    means, worth = _inputs(teacher, images)
    # The channels between two plain convolutions are one stream, to which blocks add.
    plain = [k for k, layer in enumerate(teacher.layers) if isinstance(layer, nn.Conv2d)]
    kept = torch.arange(teacher.layers[0].in_channels)
    for start, end in zip(plain, [*plain[1:], None], strict=True):
        blocks = [layer.conv[::2] for layer in teacher.layers[start + 1 : end]]
        if end is None:
            stream = torch.arange(teacher.layers[start].out_channels)
        else:
            readers = [first for first, _, _ in blocks] + [teacher.layers[end]]
            stream = _best(sum(worth[c] / worth[c].sum() for c in readers), width)
        _copy(student.layers[start], teacher.layers[start], stream, kept, means)
        for narrow, (first, second, third) in zip(
            student.layers[start + 1 : end], blocks, strict=True
        ):
            a, b = _best(worth[second], width), _best(worth[third], width)
            _copy(narrow.conv[0], first, a, stream, means)
            _copy(narrow.conv[2], second, b, a, means)
            _copy(narrow.conv[4], third, stream, b, means)
        kept = stream


def _inputs(encoder: TinyEncoder, images: Tensor) -> tuple[dict, dict]:
    """Return, for each convolution, its inputs' means (C,) and what they are worth to it (C,)."""
    means: dict[nn.Module, Tensor] = {}
    worth: dict[nn.Module, Tensor] = {}

    def note(layer: nn.Conv2d, inputs: tuple[Tensor]) -> None:
        means[layer] = inputs[0].mean((0, 2, 3))
        strength = inputs[0].square().mean((0, 2, 3)).sqrt()
        worth[layer] = strength * layer.weight.square().sum((0, 2, 3)).sqrt()

    layers = [m for m in encoder.modules() if isinstance(m, nn.Conv2d)]
    hooks = [layer.register_forward_pre_hook(note) for layer in layers]
    encoder(images)
    for hook in hooks:
        hook.remove()
    return means, worth


def _best(worth: Tensor, n: int) -> Tensor:
    return worth.topk(n).indices.sort().values


def _copy(
    narrow: nn.Conv2d,
    wide: nn.Conv2d,
    rows: Tensor,
    columns: Tensor,
    means: dict[nn.Module, Tensor],
) -> None:
    narrow.weight.copy_(wide.weight[rows][:, columns])
    if wide.bias is not None:
        mean = means[wide].clone()
        mean[columns] = 0
        narrow.bias.copy_(wide.bias[rows] + wide.weight[rows].sum((2, 3)) @ mean)
