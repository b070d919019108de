"""The whole model: generate images and up-sample photographs at any size."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from arbscale import presets, store
from arbscale.coords import Size, Window, check_size, same_area, scaled_size
from arbscale.diffusion import Denoiser, guided, noise_of
from arbscale.presets import Preset
from arbscale.samplers import UPSCALING, Callback, Sampling, noise_field, streams
from arbscale.store import InputError, StateError
from arbscale.tiles import BAND, Tile, as_floats, bands, blend, blended, paint, tiles
from arbscale.unet import computing, limit_attention, pick_precision, unfilled

OVERLAP = 12  # input pixels that neighbouring tiles share, at most a quarter of a tile
BORDER = 4  # latent pixels by which tiles reach beyond an image
LARGEST = 2**25  # bytes of the encoder's widest activation of a tile, in float32
Progress = Callable[[int, int], None]
"""`progress(done, total)` after each denoising step of the whole job."""


class ArbitraryScaleModel(nn.Module):
    """First stage, denoiser and schedule, built from a preset; untrained until loaded or trained.

    Its weights are float32. Its methods run without autograd; its parts `first_stage`, `denoiser`
    and `schedule` are differentiable, as the alignment of the denoiser with the decoder needs.
    `scale_factor` is 1 / std(z) on training data: the diffusion works on `z * scale_factor`.
    `manifest` holds what is known of the weights: data, training command, licence.
    """

    def __init__(self, preset: Preset, scale_factor: float = 1.0, manifest: dict | None = None):
        super().__init__()
        self.preset = preset
        self.first_stage = presets.build_first_stage(preset)
        self.denoiser = presets.build_denoiser(preset)
        self.guide = presets.build_guide(preset)  # None for most
        self.schedule = presets.build_schedule(preset)
        if preset.low_size:  # a photograph may be far larger than the training's crops
            for part in self.children():
                limit_attention(part, 2 * preset.latent_size)
            for i, level in enumerate(getattr(self.first_stage.encoder, "levels", ())):
                limit_attention(level, 2 * preset.image_size >> i)
        self.scale_factor = _positive(scale_factor)
        self.manifest = manifest or {}

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return next(self.parameters()).device

    def _check_precision(self) -> None:
        """Raise ValueError unless all weights are float32."""
        if other := {p.dtype for p in self.parameters()} - {torch.float32}:
            raise InputError(f"a model computes in float32, got {other.pop()}; call model.float()")

    @torch.no_grad()
    def generate(
        self,
        n: int,
        size: int | Size,
        seed: int = 0,
        steps: int = Sampling.steps,
        sampler: str = Sampling.sampler,
        progress: Progress | None = None,
        generator: torch.Generator | None = None,
        guidance: float | None = None,
    ) -> Tensor:
        """Generate n images from noise at any `size`: (n, 3, height, width) in [-1, 1].

        `size` is (height, width) or the side of a square; seed, steps, sampler and guidance are as
        in `samplers.Sampling`. The same seed gives the same images at every size of one aspect
        ratio, and image i does not depend on `n`. For another ratio the latent grid takes that
        ratio at about the area that the model was trained at. Several calls with one `generator`
        continue its stream of noise: they give the images of one large call.
        """
        size = check_size(size)
        grid = self.latent_grid(size)
        z = self.sample(n, seed, steps, sampler, grid, progress, generator, guidance)
        return self.decode(z, size)

    @torch.no_grad()
    def sample(
        self,
        n: int,
        seed: int = 0,
        steps: int = Sampling.steps,
        sampler: str = Sampling.sampler,
        grid: Size | None = None,
        progress: Progress | None = None,
        generator: torch.Generator | None = None,
        guidance: float | None = None,
    ) -> Tensor:
        """Draw n unscaled latents (n, c, h, w); `grid` is (h, w), by default as in training.

        Raises RuntimeError for a super-resolution model, ValueError for n < 1.
        """
        if self.preset.low_size:
            raise StateError(f"{self.preset.name} is a super-resolution model; call upscale")
        self._check_precision()
        if n < 1:
            raise InputError(f"n is the number of images, at least 1, got {n}")
        sampling = Sampling(steps, sampler, seed, guidance)
        noise = self.start_noise(n, grid, generator or sampling.generator())
        callback = progress and (lambda i, z_t, z_0: progress(i + 1, steps))
        return self._sample(self.denoise(guidance=guidance), noise, sampling, callback)

    def start_noise(self, n: int, grid: Size | None, generator: torch.Generator) -> Tensor:
        """Draw the noise (n, c, h, w) that n images start from."""
        shape = (self.preset.latent_channels, *(grid or (self.preset.latent_size,) * 2))
        return torch.stack([torch.randn(shape, generator=generator) for _ in range(n)])

    @torch.no_grad()
    def upscale(
        self,
        image: Any,
        scale: float | None = None,
        size: int | Size | None = None,
        seed: int = 0,
        steps: int = UPSCALING.steps,
        sampler: str = UPSCALING.sampler,
        tile: int | None = None,
        progress: Progress | None = None,
        precision: str = "float32",
        to: str | Path | None = None,
        guidance: float | None = None,
    ) -> Any:
        """Enlarge an image to any size, tile by overlapping tile.

        Beyond the image and its latent, the memory is bounded by the tile. Tiles of different
        sizes, from the training's `low_size` on, give nearly the same image: noise and attention's
        reach do not depend on the tile, but group normalisation sees another part of the image.
        Raises RuntimeError for a generator, ValueError for a bad image, scale or size.

        Parameters
        ----------
        image
            PIL image (turned upright and converted to sRGB as `data.pixels` says), uint8 array
            (H, W), (H, W, 3) or (H, W, 4), or float tensor (3, H, W) or (B, 3, H, W) in [-1, 1].
        scale, size
            One of the two: a positive factor, or the output's (height, width).
        seed, steps, sampler, guidance
            As in `samplers.Sampling`; the first step is half-way, from the input under noise.
        tile
            Side of a tile in pixels of the input; by default the largest for which an activation
            of the encoder takes `LARGEST` bytes, at least twice the training's `low_size`.
        progress
            Called after each step of each tile.
        precision
            "float32", or "auto" for the networks in bfloat16 where that is faster; see
            `pick_precision`. The sampler, the head and back-projection stay in float32.
        to
            A TIFF file, for an image that memory need not hold: painted and written in bands, with
            transparency on white. The same call resumes one that was stopped, but samples again.

        Returns
        -------
        Any
            The kind it was given: PIL image (RGB), uint8 array (H', W', 3), or tensor in [-1, 1];
            RGBA or (H', W', 4) with the transparency enlarged, too, where there is any. None where
            it is written.

        """
        from arbscale.data.images import like, open_upright, to_tensor
        from arbscale.data.large import write_tiff
        from arbscale.data.pixels import fill_clear, on_white

        if not self.preset.low_size:
            raise StateError(f"{self.preset.name} is a generator; load a super-resolution model")
        self._check_precision()
        sampling = Sampling(steps, sampler, seed, guidance)
        if isinstance(image, Tensor) and image.ndim == 4:
            if to:
                raise InputError("a file holds one image; call once for each image of the batch")
            if not (n := len(image)):
                raise InputError(f"a batch holds at least one image, got {tuple(image.shape)}")

            def one(i: int) -> Tensor:
                report = progress and (lambda done, total: progress(i * total + done, n * total))
                options = scale, size, seed, steps, sampler, tile, report, precision, None, guidance
                return self.upscale(image[i], *options)

            return torch.stack([one(i) for i in range(n)])
        low, alpha = (image, None) if isinstance(image, Tensor) else open_upright(image)[:2]
        low = to_tensor((on_white if to else fill_clear)(low, alpha))  # (3, h, w)
        low = low.cpu() if low.device.type == "mps" else low  # which lacks antialiased resampling
        if (scale is None) == (size is None):
            raise InputError("give either scale, such as 3.7, or size, such as (480, 640)")
        size = scaled_size(low.shape[-2:], scale) if size is None else check_size(size)
        spans = self.tiles(low.shape[-2:], tile)
        dtype = pick_precision(precision, self.device)
        keep_float = isinstance(image, Tensor) and image.is_floating_point()

        def latents() -> Iterator[tuple[Tile, Tensor]]:
            z = self._sample_tiles(low, spans, sampling, progress, dtype)
            yield from ((span, z[span.latent(self.zoom)]) for span in spans)

        if to:
            how = vars(sampling), list(map(vars, spans)), str(dtype), self._facts()
            painted = partial(bands, self.first_stage, low, size, latents(), dtype)
            return write_tiff(to, size, store.content_key(low, how, module=self), painted)
        kind = torch.float32 if keep_float else torch.uint8
        return like(self.paint(low, size, latents(), kind, dtype), image, alpha)

    def tiles(self, size: Size, side: int | None = None) -> list[Tile]:
        """Cut an input of `size` into tiles; `side` in its pixels, by default as for `upscale`.

        They reach beyond the input, so that the frame which the networks draw, where what they see
        ends, lies outside the image.
        """
        p = self.preset
        wide = 4 * p.channels * p.image_size**2 / p.low_size**2  # bytes per pixel of the input
        side = max(2 * p.low_size, math.isqrt(int(LARGEST / wide))) if side is None else side
        overlap = max(0, min(OVERLAP, side // 4))
        return list(tiles(size, side, overlap, math.ceil(BORDER / self.zoom)))

    @property
    def zoom(self) -> float:
        """Latent pixels per input pixel in super-resolution."""
        return self.preset.image_size / self.preset.low_size / self.preset.factor

    def _sample_tiles(
        self,
        low: Tensor,
        spans: list[Tile],
        sampling: Sampling,
        progress: Progress | None,
        dtype: torch.dtype = torch.float32,
    ) -> Tensor:
        """Return the unscaled latent (1, c, h', w') of all tiles of an image (3, h, w)."""
        conditions, denoisers = [], []
        for span in spans:
            place = span.latent(self.zoom)
            grid = tuple(part.stop - part.start for part in place[1:])
            part = as_floats(span.cut(low))[None].to(self.device)
            part = part.contiguous(memory_format=torch.channels_last)  # convolutions are faster
            with computing(self.device, dtype):
                condition = self.condition(part, grid).float()
            conditions.append((place, condition))
            denoisers.append((place, self.denoise(condition, dtype, sampling.guidance)))
        done, total = itertools.count(1), sampling.steps * len(spans)
        denoise = blended(denoisers, progress and (lambda: progress(next(done), total)))
        size = tuple(max(place[axis].stop for place, _ in denoisers) for axis in (1, 2))
        noise = noise_field(sampling.seed, self.preset.latent_channels, (0, 0), size)[None]
        guess = blend(conditions, noise.to(self.device))
        return self._sample(denoise, noise, sampling, guess=guess)

    def paint(
        self,
        low: Tensor,
        size: Size,
        latents: Iterable[tuple[Tile, Tensor]],
        dtype: torch.dtype = torch.float32,
        features_dtype: torch.dtype = torch.float32,
    ) -> Tensor:
        """Decode tiles' latents into one image that agrees with `low`; see `tiles.paint`."""
        return paint(self.first_stage, low, size, latents, dtype, features_dtype)

    @torch.no_grad()
    def condition(self, low: Tensor, grid: Size | None = None) -> Tensor:
        """Turn low-resolution images (B, 3, h, w) in [-1, 1] into scaled latents (B, c, h', w').

        Enlarged by nearest neighbour to the encoder's input size and encoded, as in the released
        code; `grid` is (h', w'), by default (h, w) times `zoom`.
        """
        self._check_precision()
        grid = grid or tuple(max(1, round(n * self.zoom)) for n in low.shape[-2:])
        enlarged = F.interpolate(low, size=[n * self.preset.factor for n in grid], mode="nearest")
        return self.first_stage.encode(enlarged) * self.scale_factor

    @torch.no_grad()
    def decode(self, z: Tensor, size: int | Size, window: Window | None = None) -> Tensor:
        """Unscaled latents (B, c, h, w) -> images (B, 3, H, W) in [-1, 1], or a window."""
        self._check_precision()
        return self.first_stage.decode(z, size, window).clamp_(-1, 1)

    @torch.no_grad()
    def render_to(self, path: str | Path, z: Tensor, size: int | Size) -> None:
        """Write the image of one unscaled latent (1, c, h, w) to a TIFF file, of any size.

        It is rendered and written in bands, and the same call resumes a stopped one: see
        `data.large.write_tiff`.
        """
        from arbscale.data.large import write_tiff

        self._check_precision()
        if len(z) != 1:
            raise InputError(f"a file holds one image, got {len(z)} latents; call once for each")
        height, width = size = check_size(size)
        features = self.first_stage.features(z)  # (1, C, h, w)
        step = max(1, BAND // width)

        def rendered(row: int) -> Iterator[Tensor]:
            for top in range(row, height, step):
                window = (top, 0, min(step, height - top), width)
                yield self.first_stage.render(features, size, window)[0]

        key = store.content_key(size, z, self._facts(), module=self.first_stage)
        write_tiff(path, size, key, rendered)

    def latent_grid(self, size: Size) -> Size:
        """Return the latent grid (h, w) for an image's aspect ratio, at about the trained area."""
        return same_area(self.preset.latent_size, size)

    def denoise(
        self,
        condition: Tensor | None = None,
        dtype: torch.dtype = torch.float32,
        guidance: float | None = 1.0,
    ) -> Denoiser:
        """Return `denoise(z_t, t)`, which gives the noise; see `diffusion.noise_of` and `guided`.

        A `guidance` of None is the preset's. RuntimeError for one that needs a guide, without one.
        """
        guidance = self.preset.guidance if guidance is None else guidance
        how = self.schedule, self.preset.prediction, condition, dtype
        denoise = noise_of(self.denoiser, *how)
        if guidance == 1:
            return denoise
        if self.guide is None:
            raise StateError(f"{self.preset.name} has no guide; leave guidance out, or take 1")
        return guided(denoise, noise_of(self.guide, *how), guidance)

    def _sample(
        self,
        denoise: Denoiser,
        noise: Tensor,
        sampling: Sampling,
        callback: Callback | None = None,
        guess: Tensor | None = None,
        drawn: Callable[[int], Tensor] | None = None,
    ) -> Tensor:
        """Return the unscaled latents that sampling from `noise` (B, c, h, w) leads to.

        With a `guess` at the scaled latents it starts half-way, from that under noise, as Meng et
        al. 2022 (SDEdit) do. `drawn(t)` is the noise that steps add, by default each image's own.
        """
        z, first = noise.to(self.device) * self.preset.noise_level, self.schedule.steps - 1
        if guess is not None:
            first = min(first, max(first // 2, sampling.steps - 1))
            z = self.schedule.add_noise(guess, torch.tensor([first]), z)
        z = sampling.run(denoise, z, self.schedule, None, callback, first, drawn or streams(noise))
        return z / self.scale_factor

    def _facts(self) -> dict:
        """Return what decides the images beside the weights, as JSON."""
        return {"preset": self.preset.to_dict(), "scale_factor": _positive(self.scale_factor)}

    def save(self, path: str | Path, half: bool = False) -> None:
        """Write weights and manifest into the folder `path`; `half` stores float16."""
        store.save(path, self.state_dict(), {**self.manifest, **self._facts()}, half)

    @classmethod
    def load(cls, name_or_path: str | Path) -> ArbitraryScaleModel:
        """Load a shipped model by name, or one from a folder, on the CPU; see `store.load`."""
        folder = store.find(name_or_path)
        state, manifest = store.load(folder)
        try:
            scale_factor = _positive(manifest.get("scale_factor"))
            wanted = shapes(preset := Preset.from_dict(manifest["preset"]))
        except InputError as error:
            raise InputError(f"the manifest in {folder}: {error}") from None
        found = {name: tensor.shape for name, tensor in state.items()}
        if misfits := sorted(dict(wanted.items() ^ found.items())):
            text = f"the weights in {folder} do not fit the preset in its manifest: {misfits[0]}"
            raise InputError(text)
        model = cls(preset, scale_factor, manifest)
        model.load_state_dict(state)
        return model.eval().requires_grad_(False)


def _positive(scale_factor: Any) -> float:
    """Return the scale factor; ValueError unless it is positive and finite."""
    if type(scale_factor) not in (int, float) or not 0 < scale_factor < 1e30:
        raise InputError(f"scale_factor is positive and finite, got {scale_factor!r}")
    return float(scale_factor)


def shapes(preset: Preset) -> dict[str, torch.Size]:
    """Return the shapes of a model's tensors; InputError for a preset that no model can have."""
    presets.build_schedule(preset)
    builders = {"first_stage": presets.build_first_stage, "denoiser": presets.build_denoiser}
    if preset.guide_multipliers:
        builders["guide"] = presets.build_guide
    parts = nn.ModuleDict({name: unfilled(build, preset) for name, build in builders.items()})
    return {name: tensor.shape for name, tensor in parts.state_dict().items()}
