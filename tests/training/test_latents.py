"""The cache of latents: the same numbers from disk, and never a stale or half-written one."""

import numpy as np
import pytest
import torch

from arbscale.training import latents


class Parts:
    """Seven rows of two arrays in three pieces; counts how often it is asked."""

    def __init__(self):
        self.asked = 0
        generator = torch.Generator().manual_seed(0)
        self.z, self.c = (torch.randn(7, 2, 3, 3, generator=generator) for _ in range(2))

    def __call__(self):
        self.asked += 1
        for rows in torch.arange(7).split(3):
            yield self.z[rows], self.c[rows]


def test_disk_and_memory_hold_the_same(tmp_path):
    parts, picks = Parts(), torch.tensor([6, 0, 3, 3])
    cache = latents.cached(tmp_path / "cache", "key", 7, parts)
    for found in (cache, latents.in_memory(parts)):
        assert len(found) == 7
        assert torch.equal(found[picks][0], parts.z[picks])
        assert torch.equal(found[picks][1], parts.c[picks])
        assert found.std() == pytest.approx(parts.z.std().item(), rel=1e-6)
    assert isinstance(cache.arrays[0], np.memmap)


def test_encoded_once(tmp_path):
    parts = Parts()
    for _ in range(3):
        latents.cached(tmp_path / "cache", "key", 7, parts)
    assert parts.asked == 1


def test_a_stale_cache_is_noticed(tmp_path):
    parts = Parts()
    latents.cached(tmp_path / "cache", "key", 7, parts)
    with pytest.warns(UserWarning, match="cache"):
        latents.cached(tmp_path / "cache", "other", 7, parts)
    assert parts.asked == 2


@pytest.mark.parametrize("harm", ["cut", "record", "missing"])
def test_a_damaged_cache_is_made_anew(tmp_path, harm):
    parts, place = Parts(), tmp_path / "cache"
    latents.cached(place, "key", 7, parts)
    if harm == "cut":
        (place / "0.npy").write_bytes((place / "0.npy").read_bytes()[:-5])
    elif harm == "record":
        (place / "record.json").write_text("{}")
    else:
        (place / "1.npy").unlink()
    cache = latents.cached(place, "key", 7, parts)
    assert parts.asked == 2
    assert torch.equal(cache[torch.arange(7)][1], parts.c)


def test_an_interrupted_one_is_never_taken_for_finished(tmp_path):
    parts, place = Parts(), tmp_path / "cache"

    def broken():
        yield from list(parts())[:2]
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        latents.cached(place, "key", 7, broken)
    assert not (place / "record.json").exists() and not list(place.glob("*.npy"))
    assert torch.equal(latents.cached(place, "key", 7, parts)[torch.arange(7)][0], parts.z)
