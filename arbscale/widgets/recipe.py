"""How what is explored was made, and the Python that makes it again."""

from __future__ import annotations

from dataclasses import dataclass

from arbscale import store
from arbscale.coords import Size, Window
from arbscale.model import ArbitraryScaleModel
from arbscale.samplers import Sampling
from arbscale.store import InputError
from arbscale.widgets.sources import Photo


@dataclass(frozen=True)
class Settings:
    """How the latent was drawn."""

    seed: int = 0
    to_seed: int = 1
    share: float = 0.0  # of the way from the one seed's noise to the other's
    steps: int = Sampling.steps
    sampler: str = Sampling.sampler
    size: Size = (64, 64)  # its aspect ratio decides the latent grid

    @classmethod
    def read(cls, message: dict, size: Size) -> Settings:
        """Take settings from a browser's message; ValueError for what is no number."""
        try:
            seed, to_seed, steps = (int(message[k]) for k in ("seed", "to_seed", "steps"))
            share = min(max(float(message["share"]), 0.0), 1.0)
        except (KeyError, TypeError, ValueError, OverflowError):
            raise InputError("seeds and steps are whole numbers") from None
        seeds = seed % 2**63, to_seed % 2**63
        return cls(*seeds, share, steps, str(message.get("sampler")), size)

    @property
    def shown(self) -> dict:
        """What a page that opens shows in its fields."""
        fields = {name: getattr(self, name) for name in ("seed", "to_seed", "steps", "sampler")}
        return {**fields, "mix": self.share}

    @property
    def sampling(self) -> Sampling:
        """The part that `samplers` knows."""
        return Sampling(self.steps, self.sampler, self.seed)

    @property
    def arguments(self) -> str:
        """The settings as arguments in Python."""
        return f'seed={self.seed}, steps={self.steps}, sampler="{self.sampler}"'


def _load_code(model: ArbitraryScaleModel) -> str:
    """Return the line that loads a model, by its name where its weights are those that ship."""
    name, files = model.preset.name, model.manifest.get("files")
    known = name in store.shipped() and store.read_manifest(store.find(name))["files"] == files
    return f'model = arbscale.load("{name if known else "PATH"}")'


def generator_code(
    model: ArbitraryScaleModel, settings: Settings, size: Size, window: Window
) -> str:
    """Return the Python that renders a window of a generated image."""
    grid = model.latent_grid(settings.size)
    arguments = settings.arguments
    if grid != (model.preset.latent_size,) * 2:
        arguments += f", grid={grid}"
    lines = ["import torch", "import arbscale"]
    draw = f"z = model.sample(1, {arguments})"
    if settings.share:
        lines.append("from arbscale.widgets import mixed_latent")
        seeds = f"({settings.seed}, {settings.to_seed}), {settings.share}"
        draw = f"z = mixed_latent(model, {seeds}, {arguments.split(', ', 1)[1]})"
    lines += ["", _load_code(model), draw, "with torch.no_grad():"]
    return "\n".join([*lines, f"    view = model.decode(z, {size}, window={window})[0]", ""])


def enlarger_code(
    model: ArbitraryScaleModel, settings: Settings, photo: Photo, size: Size, window: Window
) -> str:
    """Return the Python that enlarges a photograph and cuts a window out."""
    top, left, height, width = window
    lines = ["import arbscale", "from arbscale.data import load_image, resize", ""]
    lines += [_load_code(model), f"image = load_image({photo.name!r})"]
    if photo.truth is not None:
        lines.append(f"image = resize(image, {tuple(photo.low.shape[-2:])})")
    lines.append(f"image = model.upscale(image, size={size}, {settings.arguments})")
    lines.append(f"view = image[:, {top}:{top + height}, {left}:{left + width}]")
    return "\n".join([*lines, ""])


def features_code(size: Size, window: Window) -> str:
    """Return the Python that renders a window of given features."""
    render = f"first_stage.render(features, {size}, window={window})[0]"
    return f"import torch\n\nwith torch.no_grad():\n    view = {render}\n"
