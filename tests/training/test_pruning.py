"""A narrow encoder starts as the part of a wide one that matters."""

import pytest
import torch
from torch import nn

from arbscale.autoencoder import TinyEncoder
from arbscale.training.pruning import inherit


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def images() -> torch.Tensor:
    return torch.rand(4, 3, 32, 24, generator=seeded()) * 2 - 1


def encoder(channels: int) -> TinyEncoder:
    """One whose blocks do something: they start as the identity."""
    torch.manual_seed(channels)
    made = TinyEncoder(channels, 4)
    for parameter in made.parameters():
        nn.init.normal_(parameter, std=0.1)
    return made.requires_grad_(False)


def test_an_equally_wide_one_becomes_a_copy():
    teacher, student = encoder(10), encoder(10)
    inherit(student, teacher, images())
    torch.testing.assert_close(student(images()), teacher(images()))


def test_channels_without_worth_are_the_ones_left_out():
    """The wide encoder is a narrow one with idle channels, strewn over all layers."""
    narrow, wide, student = encoder(6), encoder(10), encoder(6)
    places = torch.randperm(10, generator=seeded())[:6].sort().values
    for small, large in zip(narrow.modules(), wide.modules(), strict=True):
        if isinstance(small, nn.Conv2d):
            rows = places if small.out_channels == 6 else torch.arange(small.out_channels)
            columns = places if small.in_channels == 6 else torch.arange(small.in_channels)
            nn.init.zeros_(large.weight)
            large.weight[rows[:, None], columns] = small.weight
            if small.bias is not None:
                nn.init.zeros_(large.bias)
                large.bias[rows] = small.bias
    inherit(student, wide, images())
    torch.testing.assert_close(student(images()), narrow(images()))


def test_what_is_constant_moves_into_the_bias():
    """Channels whose value never changes can go, however large they are."""
    wide, student = encoder(8), encoder(7)
    block = wide.layers[1].conv
    block[0].weight[3], block[0].bias[3] = 0, 1e-3  # inside a block: no other reads it
    inherit(student, wide, images())
    hidden = wide.layers[1].conv[1](block[0](wide.layers[0]((images() + 1) / 2)))
    assert hidden[:, 3].std() == 0
    lost = wide.layers[1].conv[2].weight[:, 3].sum((1, 2)) * 1e-3
    kept = student.layers[1].conv[2].bias
    whole = block[2].bias + lost
    assert torch.isclose(kept[:, None], whole[None], atol=1e-6).any(dim=1).all()


def test_a_wider_one_is_refused():
    with pytest.raises(ValueError, match="10"):
        inherit(encoder(12), encoder(10), images())
    with pytest.raises(ValueError, match="4 channels, not 3"):
        inherit(TinyEncoder(10, 3), encoder(10), images())
