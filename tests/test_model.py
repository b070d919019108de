"""The whole model: seeds, sizes, kinds of pictures, and tiles that bound the memory."""

import dataclasses
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

import arbscale
from arbscale import presets
from arbscale.data.images import to_uint8
from arbscale.model import ArbitraryScaleModel
from arbscale.samplers import SAMPLERS, Sampling, noise_field
from arbscale.tiles import tiles
from arbscale.unet import pick_precision


def build(low_size: int | None = None, **changes) -> ArbitraryScaleModel:
    """Return an untrained model whose denoiser does not answer zero."""
    torch.manual_seed(0)
    preset = dataclasses.replace(presets.tiny(low_size), hidden=(16,), **changes)
    model = ArbitraryScaleModel(preset, scale_factor=1.3).eval()
    for p in model.denoiser.parameters():
        if not p.detach().abs().sum():
            torch.nn.init.normal_(p, std=0.03)
    return model


@pytest.fixture(scope="module")
def generator():
    return build()


@pytest.fixture(scope="module")
def upscaler():
    return build(8)


def picture(height: int, width: int, seed: int = 0) -> torch.Tensor:
    """Smooth colours (3, height, width) in [-1, 1]."""
    coarse = torch.rand(1, 3, 4, 4, generator=torch.Generator().manual_seed(seed)) * 2 - 1
    return F.interpolate(coarse, (height, width), mode="bilinear")[0].clamp(-1, 1)


# Generation ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [16, (24, 32), (33, 7), (1, 1), (1, 50)], ids=str)
def test_generate_at_any_size(generator, size):
    height, width = (size, size) if isinstance(size, int) else size
    pictures = generator.generate(2, size, steps=2)
    assert pictures.shape == (2, 3, height, width)
    assert pictures.dtype == torch.float32 and pictures.abs().max() <= 1


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_a_seed_decides_everything(generator, sampler):
    one, again, other = (generator.sample(1, seed, steps=3, sampler=sampler) for seed in (5, 5, 6))
    assert torch.equal(one, again)
    assert (one - other).abs().max() > 0.1


def test_sampling_starts_from_noise_of_the_presets_level():
    """With a denoiser that answers zero and one step, z is the starting noise over a constant."""
    loud, quiet = build(), build(noise_level=0.5)
    for model in (loud, quiet):
        model.denoise = lambda **_: lambda z, t: torch.zeros_like(z)
    one, half = (m.sample(1, seed=4, steps=1) for m in (loud, quiet))
    torch.testing.assert_close(half, one * 0.5 / loud.preset.noise_level)


def test_the_global_seed_decides_nothing(generator):
    torch.manual_seed(1)
    one = generator.sample(1, steps=2, sampler="ddpm")
    torch.manual_seed(2)
    assert torch.equal(one, generator.sample(1, steps=2, sampler="ddpm"))


@pytest.mark.parametrize("sampler", ["ddim", "dpm_solver_pp"])  # ddpm draws at each step
def test_a_picture_does_not_depend_on_how_many_are_drawn(generator, sampler):
    one = generator.sample(1, seed=3, steps=3, sampler=sampler)
    three = generator.sample(3, seed=3, steps=3, sampler=sampler)
    torch.testing.assert_close(three[:1], one, atol=1e-3, rtol=1e-3)
    assert (three[1] - three[0]).abs().max() > 0.1


def test_one_latent_at_every_size(generator):
    """The same seed is the same latent, whatever the size; larger is more of the same picture."""
    z = generator.sample(1, seed=2, steps=3)
    pictures = {}
    for side in (64, 75, 128):
        pictures[side] = generator.generate(1, side, seed=2, steps=3)
        assert torch.equal(pictures[side], generator.decode(z, side))
    other = generator.generate(1, 64, seed=4, steps=3)
    reduced = F.avg_pool2d(pictures[128], 2)
    same, different = ((a - reduced).abs().mean() for a in (pictures[64], other))
    assert same < different / 4


def test_sizes_of_one_ratio_share_a_latent_grid(generator):
    assert generator.latent_grid((64, 64)) == generator.latent_grid((1, 1)) == (16, 16)
    assert generator.latent_grid((75, 100)) == generator.latent_grid((300, 400))


@pytest.mark.parametrize("size", [(75, 100), (100, 75), (30, 120), (64, 65), (500, 20)], ids=str)
def test_the_latent_grid_takes_the_ratio_at_the_trained_area(generator, size):
    h, w = generator.latent_grid(size)
    assert h * w == pytest.approx(16 * 16, rel=0.1)
    assert math.log(h / w) == pytest.approx(math.log(size[0] / size[1]), abs=0.15)
    assert generator.latent_grid(size[::-1]) == (w, h)


def test_sample_returns_unscaled_latents(generator):
    """Behind the sampler, `z` is divided by the scale factor."""
    try:
        generator.scale_factor = 1.0
        scaled = generator.sample(1, steps=2)
    finally:
        generator.scale_factor = 1.3
    torch.testing.assert_close(generator.sample(1, steps=2), scaled / 1.3)
    assert generator.sample(2, steps=1, grid=(3, 5)).shape == (2, 3, 3, 5)


def test_a_window_is_a_crop_of_the_picture(generator):
    z = generator.sample(1, steps=2)
    crop = generator.decode(z, (90, 50))[:, :, 20:31, 5:11]
    torch.testing.assert_close(
        generator.decode(z, (90, 50), (20, 5, 11, 6)), crop, atol=2e-5, rtol=0
    )


def test_progress_of_generation(generator):
    calls = []
    generator.generate(2, 8, steps=4, progress=lambda *done: calls.append(done))
    assert calls == [(1, 4), (2, 4), (3, 4), (4, 4)]


def test_generation_is_refused_where_it_makes_no_sense(generator, upscaler):
    with pytest.raises(RuntimeError, match="upscale"):
        upscaler.generate(1, 32)
    with pytest.raises(ValueError, match="0"):
        generator.generate(0, 32)
    with pytest.raises(ValueError, match="0"):
        generator.generate(1, (32, 0))
    with pytest.raises(ValueError, match="euler"):
        generator.generate(1, 8, sampler="euler")
    for steps in (0, 1001):
        with pytest.raises(ValueError, match=str(steps)):
            generator.generate(1, 8, steps=steps)


# Up-sampling --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "size"),
    [
        ({"scale": 3.7}, (33, 26)),
        ({"scale": 1}, (9, 7)),
        ({"scale": 0.5}, (4, 4)),
        ({"scale": 31}, (279, 217)),
        ({"size": (20, 50)}, (20, 50)),
        ({"size": 13}, (13, 13)),
    ],
    ids=str,
)
def test_any_scale_or_size(upscaler, options, size):
    out = upscaler.upscale(picture(9, 7), **options, steps=1)
    assert out.shape == (3, *size)
    assert out.isfinite().all() and out.abs().max() <= 1


@pytest.mark.parametrize("mode", ["RGB", "L", "RGBA", "P", "1", "LA", "CMYK"])
def test_pil_pictures_stay_pil_pictures(upscaler, mode):
    pixels = ((picture(9, 7) + 1) * 127).permute(1, 2, 0).byte().numpy()
    out = upscaler.upscale(Image.fromarray(pixels).convert(mode), scale=2, steps=1)
    assert isinstance(out, Image.Image)
    assert (out.mode, out.size) == ("RGBA" if mode.endswith("A") else "RGB", (14, 18))


def test_a_pil_picture_is_turned_upright(upscaler):
    pixels = ((picture(9, 7) + 1) * 127).permute(1, 2, 0).byte().numpy()
    on_its_side = Image.fromarray(np.ascontiguousarray(pixels.transpose(1, 0, 2)[::-1]))
    on_its_side.getexif()[0x0112] = 6
    expected = upscaler.upscale(pixels, scale=2, steps=1)
    assert np.array_equal(np.array(upscaler.upscale(on_its_side, scale=2, steps=1)), expected)


def test_transparency_is_enlarged(upscaler):
    pixels = np.random.default_rng(0).integers(0, 256, (9, 7, 4), dtype=np.uint8)
    pixels[..., 3] = np.linspace(1, 255, 63).reshape(9, 7)
    out = upscaler.upscale(Image.fromarray(pixels), scale=2, steps=1)
    expected = Image.fromarray(pixels[..., 3]).resize((14, 18), Image.Resampling.BICUBIC)
    assert np.array_equal(np.array(out)[..., 3], np.array(expected))
    opaque = upscaler.upscale(pixels[..., :3], scale=2, steps=1)
    assert np.array_equal(np.array(out)[..., :3], opaque)


@pytest.mark.parametrize("shape", [(9, 7), (9, 7, 3), (9, 7, 4), (9, 7, 1)], ids=str)
def test_arrays_stay_arrays(upscaler, shape):
    array = np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)
    out = upscaler.upscale(array, scale=2, steps=1)
    assert isinstance(out, np.ndarray)
    assert (out.dtype, out.shape) == (np.uint8, (18, 14, 4 if shape[2:] == (4,) else 3))


def test_tensors_stay_tensors(upscaler):
    image = picture(9, 7)
    out = upscaler.upscale(image, scale=2, steps=1)
    assert isinstance(out, torch.Tensor) and out.shape == (3, 18, 14)
    assert out.dtype == torch.float32 and not out.requires_grad
    as_bytes = upscaler.upscale(((image + 1) * 127.5).round().byte(), scale=2, steps=1)
    assert as_bytes.dtype == torch.uint8 and as_bytes.shape == (3, 18, 14)


def test_all_kinds_are_the_same_picture(upscaler):
    """Up to the rounding of the output to 8 bits."""
    array = ((picture(9, 7) + 1) * 127.5).permute(1, 2, 0).round().byte().numpy()
    tensor = torch.from_numpy(array).permute(2, 0, 1) / 127.5 - 1
    expected = upscaler.upscale(array, scale=2, steps=1)
    assert np.array_equal(np.array(upscaler.upscale(Image.fromarray(array), 2, steps=1)), expected)
    float_out = (upscaler.upscale(tensor, scale=2, steps=1) + 1) * 127.5
    assert (float_out.permute(1, 2, 0) - torch.from_numpy(expected)).abs().max() <= 0.51


def test_a_batch_is_its_pictures(upscaler):
    batch = torch.stack([picture(9, 7, seed) for seed in (0, 1)])
    out = upscaler.upscale(batch, scale=2, steps=2, seed=4)
    assert out.shape == (2, 3, 18, 14)
    for one, together in zip(batch, out, strict=True):
        assert torch.equal(upscaler.upscale(one, scale=2, steps=2, seed=4), together)


@pytest.mark.parametrize(("height", "width"), [(1, 9), (9, 1), (1, 1)])
def test_one_pixel_wide(upscaler, height, width):
    out = upscaler.upscale(picture(height, width), scale=3.7, steps=1)
    assert out.shape == (3, round(3.7 * height), round(3.7 * width))
    assert out.isfinite().all()


def test_up_sampling_is_seeded(upscaler):
    image = picture(9, 7)
    one, again, other = (upscaler.upscale(image, 2, seed=s, steps=2) for s in (1, 1, 2))
    assert torch.equal(one, again)
    assert (one - other).abs().max() > 1e-3


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_every_sampler_up_samples(upscaler, sampler):
    assert upscaler.upscale(picture(5, 5), 2, steps=2, sampler=sampler).shape == (3, 10, 10)


def test_the_condition_is_enlarged_by_nearest_neighbour(upscaler):
    low = picture(8, 6)[None]
    enlarged = low.repeat_interleave(4, dim=2).repeat_interleave(4, dim=3)
    with torch.no_grad():
        expected = upscaler.first_stage.encode(enlarged) * 1.3
        torch.testing.assert_close(upscaler.condition(low), expected)


def test_the_denoiser_sees_the_picture(upscaler):
    a, b = (upscaler.upscale(picture(8, 8, seed), 2, steps=2) for seed in (0, 1))
    assert (a - b).abs().max() > 1e-3


@pytest.mark.parametrize(
    ("options", "fact"),
    [
        ({}, "scale"),
        ({"scale": 2, "size": 20}, "scale"),
        ({"scale": 0}, "0"),
        ({"scale": -3.7}, "-3.7"),
        ({"scale": math.nan}, "nan"),
        ({"scale": math.inf}, "inf"),
        ({"size": 0}, "0"),
        ({"size": (0, 5)}, "0, 5"),
        ({"size": ()}, "size"),
        ({"size": (5, 5, 5)}, "5, 5, 5"),
        ({"size": 20.5}, "20.5"),
        ({"scale": 2, "tile": -4}, "tile"),
        ({"scale": 2, "steps": 0}, "0"),
        ({"scale": 2, "sampler": "euler"}, "euler"),
    ],
    ids=str,
)
def test_nonsense_is_refused(upscaler, options, fact):
    with pytest.raises(ValueError, match=fact):
        upscaler.upscale(picture(9, 7), **options)


def test_a_picture_that_is_none_is_refused(upscaler):
    for wrong in (torch.zeros(2, 9, 7), np.zeros((9, 7)), "cat.png", torch.full((3, 4, 4), 7.0)):
        with pytest.raises(ValueError):
            upscaler.upscale(wrong, scale=2)


def test_a_generator_does_not_up_sample(generator):
    with pytest.raises(RuntimeError, match="generator"):
        generator.upscale(picture(9, 7), scale=2)


def test_a_batch_of_none_is_refused(upscaler):
    with pytest.raises(ValueError, match="0, 3, 9, 7"):
        upscaler.upscale(torch.zeros(0, 3, 9, 7), scale=2)


@pytest.mark.slow
def test_injected_noise_has_a_stream_of_its_own(upscaler, monkeypatch):
    """It is not that of the start, whatever the seed."""
    drawn, original = [], torch.randn

    def recorded(*args, **options):
        drawn.append(original(*args, **options))
        return drawn[-1]

    monkeypatch.setattr(torch, "randn", recorded)
    for seed in (0, 1, 2**40):
        drawn.clear()
        upscaler.upscale(picture(32, 32), 2, steps=3, sampler="ddpm", seed=seed, tile=64)
        assert len(drawn) >= 3
        values = [set(noise.flatten()[:50].tolist()) for noise in drawn]
        assert all(len(a & b) < 5 for i, a in enumerate(values) for b in values[:i])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_a_model_of_another_precision_is_refused(dtype):
    generator, upscaler = build().to(dtype), build(8).to(dtype)
    z = torch.zeros(1, 3, 4, 4, dtype=dtype)
    calls = {
        "generate": lambda: generator.generate(1, 8),
        "decode": lambda: generator.decode(z, 8),
        "upscale": lambda: upscaler.upscale(picture(9, 7), 2),
        "condition": lambda: upscaler.condition(z[:, :3]),
    }
    for call in calls.values():
        with pytest.raises(ValueError, match=str(dtype)):
            call()


@pytest.mark.parametrize("seed", [2**64, -(2**63) - 1, 1.5, "1", None, True], ids=repr)
def test_a_seed_that_no_generator_takes(generator, upscaler, seed):
    with pytest.raises(ValueError, match="seed"):
        generator.generate(1, 8, seed=seed)
    with pytest.raises(ValueError, match="seed"):
        upscaler.upscale(picture(9, 7), 2, seed=seed)


@pytest.mark.parametrize("seed", [2**64 - 1, -(2**63)])
def test_any_other_seed(generator, upscaler, seed):
    assert generator.generate(1, 8, seed=seed, steps=1, sampler="ddpm").isfinite().all()
    assert upscaler.upscale(picture(9, 7), 2, seed=seed, steps=2, sampler="ddpm").isfinite().all()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
@pytest.mark.parametrize("dtype", [torch.float32, torch.uint8])
def test_an_image_on_a_gpu_stays_there(dtype):
    image = picture(45, 30) if dtype.is_floating_point else to_uint8(picture(45, 30))
    expected = build(8).upscale(image, 2.3, tile=16, steps=2)
    for model_device in ("cuda", "cpu"):
        out = build(8).to(model_device).upscale(image.cuda(), 2.3, tile=16, steps=2)
        assert out.is_cuda and out.dtype == dtype
        assert (out.cpu().float() - expected.float()).abs().max() < (
            2 if dtype.is_floating_point else 255
        )
    assert not build(8).to("cuda").upscale(image, 2.3, tile=16, steps=2).is_cuda


# Tiles --------------------------------------------------------------------------------------------


class Encoder(torch.nn.Module):
    """Latents of a picture that know their own place alone."""

    factor = 2

    def forward(self, image):
        return F.avg_pool2d(image, 2)


class Denoiser(torch.nn.Module):
    """Predicts each latent pixel from itself: the condition's, or the starting noise's."""

    def __init__(self, schedule, from_condition):
        super().__init__()
        self.schedule, self.from_condition, self.seen = schedule, from_condition, []

    def forward(self, z, t, condition):
        self.seen.append(tuple(z.shape[-2:]))
        if not self.from_condition:
            return 0.9 * z
        alpha_bar = self.schedule.at(t, z)
        return (z - alpha_bar.sqrt() * condition) / (1 - alpha_bar).sqrt()


def local(from_condition: bool = True) -> ArbitraryScaleModel:
    """Return a model in which nothing but LIIF looks further than its own latent pixel."""
    model = build(8)
    torch.manual_seed(0)
    model.first_stage.encoder = Encoder()
    model.first_stage.decoder = torch.nn.Conv2d(3, 32, 1)
    model.denoiser = Denoiser(model.schedule, from_condition)
    return model


@pytest.mark.parametrize("from_condition", [True, False])
@pytest.mark.parametrize("scale", [2.5, 4, 0.7])
def test_tiles_leave_no_trace(from_condition, scale):
    """Neither in the condition's nor in the noise's part, but for LIIF at a tile's border."""
    model, image = local(from_condition), picture(45, 30)
    whole = model.upscale(image, scale, tile=64, steps=3)
    assert len(model.denoiser.seen) == 3
    tiled = model.upscale(image, scale, tile=16, steps=3)
    spread = whole.std()
    assert spread > 0.02
    assert (tiled - whole).abs().mean() < 0.05 * spread
    assert (tiled - whole).abs().max() < spread


@pytest.mark.slow
def test_every_part_sees_a_tile_at_most():
    """What a picture needs beyond its own pixels does not grow with it."""
    model = build(8)
    seen: dict[str, list[int]] = {"encoder": [], "decoder": [], "denoiser": [], "liif": []}
    parts = {
        "encoder": model.first_stage.encoder,
        "decoder": model.first_stage.decoder,
        "denoiser": model.denoiser,
        "liif": model.first_stage.liif.layers[1],
    }
    for name, part in parts.items():
        part.register_forward_hook(
            lambda _, x, out, name=name: seen[name].append(math.prod(x[0].shape[-2:]))
        )
    model.upscale(picture(53, 44), scale=1.5, tile=12, steps=1)  # whole tiles
    # 12 px of input are 48 px for the encoder and 24 latent pixels.
    assert max(seen["encoder"]) == 48 * 48
    assert max(seen["decoder"]) == max(seen["denoiser"]) == 24 * 24
    assert max(seen["liif"]) <= 2048 * 16
    assert len(seen["encoder"]) > 20


def test_the_default_tile_is_bounded_by_the_encoders_widest_activation(monkeypatch):
    model, image = local(), picture(40, 20)
    model.upscale(image, scale=1, steps=1)
    assert model.denoiser.seen == [(88, 48)]  # in one piece, with a border of 4
    for limit, side in ((4 * 32 * (4 * 18) ** 2, 18), (1, 16)):  # 32 channels, 4 px per input pixel
        monkeypatch.setattr("arbscale.model.LARGEST", limit)
        model.denoiser.seen.clear()
        model.upscale(picture(3 * side - 12, 2 * side - 8), scale=1, steps=1)  # whole tiles
        assert set(model.denoiser.seen) == {(2 * side, 2 * side)}


def test_tiles_overlap_by_what_a_pixel_depends_on():
    for side, overlap in ((16, 4), (48, 12), (100, 12)):
        # The border of the input adds 2 px on each side.
        spans = build(8).tiles((8, side + 3 * (side - overlap) - 4), side)
        assert [span.over_left for span in spans] == [0] + 3 * [overlap]


def test_attention_reads_twice_the_training_s_grid():
    """In tokens, which are 2 x 2 positions here, half as many."""
    model = build(8, denoiser="unet_transformer", unet_multipliers=(1,))
    reach = {
        "encoder": model.first_stage.encoder.middle[1].window,
        "decoder": model.first_stage.decoder.middle[1].window,
        "denoiser": model.denoiser.middle.window,
    }
    assert set(reach.values()) == {32}  # of latents of 16 x 16
    assert build().first_stage.decoder.middle[1].window is None


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_precision(upscaler, device, monkeypatch):
    """bfloat16 is taken where the processor has it, and changes little."""
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: True)
    auto = pick_precision("auto", torch.device(device))
    assert auto == (torch.bfloat16 if device == "cpu" else torch.float32)
    assert pick_precision("float32", torch.device(device)) == torch.float32
    with pytest.raises(ValueError, match="float16"):
        upscaler.upscale(picture(9, 7), 2, precision="float16")
    exact, fast = (upscaler.upscale(picture(9, 7), 2, precision=p) for p in ("float32", "auto"))
    assert exact.dtype == fast.dtype == torch.float32
    assert 0 < (exact - fast).abs().mean() < 0.05


def test_enlarging_starts_half_way_from_the_input():
    """With a denoiser that finds no noise, one step gives the input's latent under noise."""
    model, low = build(8), picture(8, 8)
    model.denoise = lambda *_: lambda z, t: torch.zeros_like(z)
    z = model._sample_tiles(low, model.tiles((8, 8)), Sampling(steps=1), None) * 1.3
    alpha_bar = model.schedule.alpha_bar[499]
    noise = noise_field(0, 3, (0, 0), (24, 24)) * model.preset.noise_level
    wider = torch.nn.functional.pad(low[None], (2,) * 4, mode="replicate")  # by 4 latent pixels
    expected = model.condition(wider) + ((1 - alpha_bar) / alpha_bar).sqrt() * noise
    torch.testing.assert_close(z, expected.float())


@pytest.mark.slow
def test_reducing_through_tiles_that_hold_no_pixel():
    out = local().upscale(picture(60, 60), scale=0.05, tile=8, steps=1)
    assert out.shape == (3, 3, 3) and out.isfinite().all()


@pytest.mark.slow
def test_a_picture_of_bytes_is_painted_everywhere():
    """What the memory held before shines through nowhere."""
    model = local()
    for p in model.first_stage.liif.parameters():
        torch.nn.init.zeros_(p)
    array = np.full((45, 30, 3), 128, dtype=np.uint8)
    for scale in (0.31, 0.9, 1.3, 3.7):
        assert np.unique(model.upscale(array, scale, tile=8, steps=1)).tolist() == [128]


def test_progress_counts_the_whole_job():
    model, calls = local(), []
    model.upscale(picture(36, 4), 2, tile=16, steps=2, progress=lambda *done: calls.append(done))
    assert calls == [(i + 1, 6) for i in range(6)]


def test_progress_counts_a_whole_batch():
    model, calls = local(), []
    batch = torch.stack([picture(8, 8)] * 3)
    model.upscale(batch, 2, steps=2, progress=lambda *done: calls.append(done))
    assert calls == [(i + 1, 6) for i in range(6)]


# On disk ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("low_size", [None, 8])
def test_save_and_load(tmp_path, low_size):
    model = build(low_size)
    model.manifest = {"data": "none", "licence": "MIT"}
    model.save(tmp_path / "m")
    back = arbscale.load(tmp_path / "m")
    assert back.preset == model.preset and back.scale_factor == model.scale_factor
    assert back.manifest["licence"] == "MIT" and not back.training
    if low_size:
        image = picture(9, 7)
        assert torch.equal(back.upscale(image, 2, steps=2), model.upscale(image, 2, steps=2))
    else:
        assert torch.equal(back.generate(1, 20, steps=2), model.generate(1, 20, steps=2))


def test_what_is_loaded_needs_no_autograd(tmp_path, generator, upscaler):
    """Neither do a model's methods; the decoder is differentiable, as alignment needs it."""
    generator.save(tmp_path / "m")
    back = arbscale.load(tmp_path / "m")
    assert not any(p.requires_grad for p in back.parameters())
    z = torch.zeros(1, 3, 4, 4, requires_grad=True)
    assert back.first_stage.decode(z, 9).requires_grad
    assert not back.first_stage.decode(z.detach(), 9).requires_grad
    assert not generator.decode(z, 9).requires_grad
    assert not upscaler.condition(z).requires_grad


def test_half_precision_is_close(tmp_path, generator):
    generator.save(tmp_path / "m", half=True)
    back = arbscale.load(tmp_path / "m")
    assert next(back.parameters()).dtype == torch.float32
    difference = back.generate(1, 20, steps=2) - generator.generate(1, 20, steps=2)
    assert difference.abs().max() < 0.05


def test_a_model_saved_again_keeps_what_is_known(tmp_path, generator):
    generator.save(tmp_path / "a")
    back = arbscale.load(tmp_path / "a")
    back.manifest["minutes"] = 3.5
    back.save(tmp_path / "b")
    assert arbscale.load(tmp_path / "b").manifest["minutes"] == 3.5


def test_device(generator):
    assert isinstance(arbscale.pick_device(), torch.device)
    assert generator.device == torch.device("cpu")


# Painting -----------------------------------------------------------------------------------------


def test_paint_decodes_tile_by_tile_what_the_whole_decodes_at_once():
    """Latents that are the same everywhere leave no seams, whatever the tiles."""
    model = build(8)
    low = torch.zeros(3, 20, 28)
    z = torch.full((1, 3, 40, 56), 0.3)  # a latent pixel is half an input pixel

    def paint(side):
        spans = tiles(low.shape[-2:], side, side // 4)
        return model.paint(low, (50, 70), ((span, z[span.latent(2)]) for span in spans))

    one, many = paint(64), paint(12)
    assert one.shape == (3, 50, 70)
    assert (one - many).abs().max() < 0.05


@pytest.mark.slow
def test_a_file_that_other_settings_made_is_written_anew(tmp_path):
    torch.manual_seed(0)
    model = ArbitraryScaleModel(presets.tiny(8)).eval()
    low, path = torch.rand(3, 8, 8) * 2 - 1, tmp_path / "x.tif"
    model.upscale(low, 2, to=path)
    written = path.stat().st_ino
    model.upscale(low, 2, to=path)
    assert path.stat().st_ino == written  # it is whole
    model.scale_factor *= 2
    model.upscale(low, 2, to=path)
    assert path.stat().st_ino != written
    with pytest.raises(ValueError, match="x.png"):
        model.upscale(low, 2, to=tmp_path / "x.png")


def test_no_attention_reads_less_than_in_training():
    fields = {"multipliers": (1, 1, 1), "encoder_attention_levels": (0, 1)}
    model = ArbitraryScaleModel(dataclasses.replace(presets.tiny(16), **fields))
    levels = model.first_stage.encoder.levels
    found = [{m.window for m in level.modules() if hasattr(m, "window")} for level in levels]
    assert found == [{64}, {32}, set()]  # of grids of 32 and 16
    assert model.first_stage.encoder.middle[1].window == 16
