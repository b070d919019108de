"""Protocols: sizes, borders and crops, against the conventions they are named after."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from arbscale.data import to_pil, to_uint8
from arbscale.evaluation import get_protocol
from arbscale.evaluation.pairs import PROTOCOLS, centre_crop


def picture(height: int, width: int, seed: int = 0) -> torch.Tensor:
    levels = torch.randint(
        0, 256, (3, height, width), generator=torch.Generator().manual_seed(seed)
    )
    return levels / 127.5 - 1


@pytest.mark.parametrize(
    ("name", "scale", "border"),
    [
        ("whole", 4, 0),
        ("benchmark", 4, 4),
        ("benchmark", 3.7, 4),
        ("div2k", 4, 10),
        ("div2k", 2.5, 9),
        ("paper_faces", 8, 0),
        ("paper_div2k", 8, 0),
    ],
)
def test_borders(name, scale, border):
    assert get_protocol(name).border(scale) == border


def test_the_benchmarks_compare_luma_of_pictures_cropped_to_a_multiple():
    rule = get_protocol("benchmark")
    low, high = rule.pair(picture(101, 82), 4)
    assert (low.shape, high.shape) == ((3, 25, 20), (3, 100, 80))
    assert rule.space == "y" and torch.equal(high, picture(101, 82)[:, :100, :80])
    reduced = np.asarray(to_pil(high).resize((20, 25), 3))  # 3: PIL's bicubic
    levels = to_uint8(low).permute(1, 2, 0).numpy()
    assert np.abs(reduced.astype(int) - levels.astype(int)).max() <= 1
    assert torch.equal(low, levels_of(low))
    low, high = rule.pair(picture(101, 82), 3.7)
    assert high.shape[1:] == tuple(round(3.7 * n) for n in low.shape[1:])


def levels_of(image):
    return to_uint8(image).float() / 127.5 - 1


def test_the_papers_faces_have_a_low_size_of_16():
    low, high = get_protocol("paper_faces").pair(picture(140, 200), 5.3)
    assert low.shape == (3, 16, 16) and high.shape == (3, 85, 85)
    flat = torch.zeros(3, 100, 140)
    flat[..., :20] = flat[..., -20:] = 1  # outside the centred square
    assert get_protocol("paper_faces").pair(flat, 5)[1].abs().max() == 0
    with pytest.raises(ValueError, match="128 px.*100 x 140"):
        get_protocol("paper_faces").pair(flat, 8)


def test_the_papers_div2k_takes_one_random_crop():
    rule, image = get_protocol("paper_div2k"), picture(220, 300)
    low, high = rule.pair(image, 4, seed=1)
    assert low.shape == (3, 48, 48) and high.shape == (3, 192, 192)
    assert any(
        torch.equal(high, image[:, top : top + 192, left : left + 192])
        for top in range(29)
        for left in range(109)
    )
    assert torch.equal(high, rule.pair(image, 4, seed=1)[1])
    assert not torch.equal(high, rule.pair(image, 4, seed=2)[1])


def test_unknown_names_and_descriptions():
    with pytest.raises(ValueError, match="set5.*whole, benchmark, div2k, paper_faces"):
        get_protocol("set5")
    for name, rule in PROTOCOLS.items():
        assert rule.describe()["name"] == name and "bicubic" in rule.describe()["low"]


@pytest.mark.parametrize(
    ("size", "shape", "expected"),
    [((90, 120), (1, 1), (90, 90)), ((90, 120), (64, 128), (60, 120)), ((7, 5), (7, 5), (7, 5))],
)
def test_centre_crop(size, shape, expected):
    image = picture(*size)
    cropped = centre_crop(image, shape)
    assert cropped.shape[1:] == expected
    top, left = ((n - m) // 2 for n, m in zip(size, expected, strict=True))
    assert torch.equal(cropped[:, 0, 0], image[:, top, left])
