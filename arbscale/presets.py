"""Every number of a model and its training, and the named sets of them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass, fields, replace
from typing import Any, Literal, get_args, get_type_hints

from arbscale import autoencoder
from arbscale.diffusion import NoiseSchedule
from arbscale.liif import LIIF, InterpolatedLIIF
from arbscale.store import InputError
from arbscale.transformer import LatentTransformer, TransformerDenoiser
from arbscale.unet import UNet

MOST, MOST_LAYERS = 1_000_000, 32  # the largest number in a preset; of levels, blocks and layers
NEEDED = "multipliers", "unet_multipliers"  # which have at least one level


@dataclass(frozen=True)
class Preset:
    """A model, its noise schedule and the sizes that it is trained at.

    Sizes are sides of square images in pixels. Fields hold numbers and tuples alone, so a preset
    travels in a manifest as JSON.
    """

    name: str
    # first stage
    channels: int = 128  # width of the first level; also of the features that LIIF reads
    multipliers: tuple[int, ...] = (1, 2, 4)  # width of each level; f = 2 ** (levels - 1)
    blocks: int = 2  # residual blocks per level
    latent_channels: int = 3  # c
    groups: int = 32  # of group normalisation; narrow networks want fewer
    posterior: bool = False  # whether the latent is a Gaussian posterior
    hidden: tuple[int, ...] = (256,) * 4  # LIIF's hidden layers
    local_ensemble: bool = True  # LIIF blends its four nearest latent pixels
    cell_decode: bool = True  # LIIF is told the pixel's extent
    encoder: Literal["residual", "tiny"] = "residual"  # tiny is TAESD's, with f = 8
    tiny_channels: int = 64  # width of the tiny encoder, TAESD's own by default
    head: Literal["liif", "interpolated"] = "liif"
    finer: int = 1  # the interpolated head's features per latent pixel along each side
    encoder_attention_levels: tuple[int, ...] = ()  # levels with attention, beside the middle
    decoder_attention_levels: tuple[int, ...] = ()  # the same for the symmetric decoder
    padding: str = "zeros"  # beyond the symmetric decoder's border: nn.Conv2d's padding_mode
    # denoiser
    unet_channels: int = 64  # width of the first level, at least 64
    unet_multipliers: tuple[int, ...] = (1, 2)  # width of each level
    unet_blocks: int = 2  # residual blocks per level
    unet_attention_levels: tuple[int, ...] = (1,)  # levels with attention, 0 the widest grid
    head_channels: int = 32  # width of an attention head
    denoiser: Literal["unet", "unet_transformer", "transformer"] = "unet"
    """a U-Net, one with a LatentTransformer in the middle, or a transformer alone"""
    transformer_width: int = 128  # of a token
    transformer_blocks: int = 4
    merge: int = 2  # side of the square of latent positions that makes one token
    guide_multipliers: tuple[int, ...] = ()  # of a weaker U-Net that guides sampling; (): none
    guidance: float = 1.0  # the denoiser's weight against its guide; 1: none
    # schedule
    beta_start: float = 0.0015  # first beta; between, the roots are evenly spaced
    beta_end: float = 0.0195  # last beta
    diffusion_steps: int = 1000  # T
    noise_level: float = 1.0  # deviation of the noise that sampling starts from; see notebook 06
    # training sizes
    image_size: int = 256  # the encoder's input
    low_size: int | None = None  # the low-resolution input of super-resolution; None: generation
    target_sizes: tuple[int, int] = (64, 256)  # LIIF's targets, uniform between these
    first_stage_batch: int = 4  # images per step
    diffusion_batch: int = 8  # images per step
    first_stage_lr: float = 5e-5  # Adam's learning rate for autoencoder and decoder
    diffusion_lr: float = 1e-6  # Adam's learning rate for the denoiser
    alignment_lr: float = 1e-6  # the same for the alignment stage
    # losses
    kl_weight: float = 1e-6  # of the posterior's divergence, while the encoder is trained
    lpips_weight: float = 0.0  # of LPIPS beside L1; needs `crop`
    lattice_weight: float = 0.0  # of patterns that repeat with each latent pixel; needs `crop`
    adversarial_weight: float = 0.0  # of a patch discriminator's loss; needs `crop`
    flat: float = 0.0  # share of random crops that are reduced to their mean colour
    crop: int = 0  # side of a window of LIIF's targets, beside scattered points; 0: none
    prediction: Literal["eps", "v"] = "eps"  # what the denoiser gives: the noise or the velocity

    def __post_init__(self) -> None:
        """Refuse what no model can be trained with; ValueError says why."""
        for field in fields(self):
            _check(field.name, str(field.type), getattr(self, field.name))
        if not self.latent_size:
            raise InputError(f"image_size is at least {self.factor} px, got {self.image_size}")
        low, high = self.target_sizes
        if low > high:
            raise InputError(f"target_sizes are a smallest and a largest side, got {low}, {high}")
        windows = self.lattice_weight or self.adversarial_weight
        least = 32 if self.lpips_weight else 8 if windows else 0
        if min(self.crop, low, self.image_size) < least:
            sides = self.crop, self.image_size, self.target_sizes
            raise InputError(f"windows (LPIPS): crop and sizes from {least} px, got {sides}")
        if self.flat > 1:
            raise InputError(f"flat is a share of all crops, from 0 to 1, got {self.flat}")

    @property
    def factor(self) -> int:
        """How many image pixels one latent pixel spans."""
        return 8 if self.encoder == "tiny" else 2 ** (len(self.multipliers) - 1)

    @property
    def latent_size(self) -> int:
        """Side of the latent grid while training."""
        return self.image_size // self.factor

    def to_dict(self) -> dict:
        """Return the fields as a dictionary that JSON can hold."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: dict) -> Preset:
        """Read what `to_dict` wrote, by default for missing fields; ValueError on unknown ones."""
        if not isinstance(values, dict) or not isinstance(values.get("name"), str):
            raise InputError(f"a preset is a dictionary of fields with a name, got {values!r:.100}")
        if unknown := sorted(set(values) - {f.name for f in fields(cls)}):
            raise InputError(f"the preset has newer fields {unknown}; update arbscale")
        return cls(**{k: tuple(v) if isinstance(v, list) else v for k, v in values.items()})


def _check(name: str, kind: str, value: Any) -> None:
    """Raise ValueError unless a field's value is of its kind and in its range."""
    if known := get_args(get_type_hints(Preset)[name]) if kind.startswith("Literal") else ():
        if value in known:
            return
        raise InputError(f"{name} is one of {', '.join(known)}, got {value!r:.100}")
    most = MOST_LAYERS if name.endswith("blocks") else MOST
    least: float = 0 if kind == "float" or name == "crop" or name.endswith("levels") else 1
    least = 1e-6 if name == "noise_level" else least
    if value is None or kind in ("str", "bool"):
        good = "None" in kind if value is None else type(value).__name__ == kind
    else:
        numbers = value if kind.startswith("tuple") and type(value) is tuple else (value,)
        kinds = (int, float) if kind == "float" else (int,)
        good = all(type(n) in kinds and least <= n <= most for n in numbers)
    if good and kind.startswith("tuple"):
        fewest, longest = (2, 2) if name == "target_sizes" else (name in NEEDED, MOST_LAYERS)
        good = type(value) is tuple and fewest <= len(value) <= longest
    if not good:
        span = "" if kind in ("str", "bool") else f" from {least} to {most}"
        raise InputError(f"{name} is {kind}{span}, got {value!r:.100}")


def tiny(low_size: int | None = None) -> Preset:
    """Build a miniature for tests and for live training in a notebook: seconds on two cores."""
    return Preset(
        name="tiny",
        channels=32,
        multipliers=(1, 1),
        blocks=1,
        groups=8,
        hidden=(64,) * 3,
        unet_multipliers=(1, 1),
        unet_blocks=1,
        noise_level=0.95,
        image_size=32,
        low_size=low_size,
        target_sizes=(16, 64),
        first_stage_batch=16,
        diffusion_batch=32,
        first_stage_lr=2e-3,
        diffusion_lr=1e-3,
        alignment_lr=1e-4,
    )


def _small(name: str, **numbers: Any) -> Preset:
    """Return what the small shipped models share: f = 4, and six transformer blocks inside."""
    shared = {
        "channels": 32,
        "multipliers": (1, 2, 2),
        "blocks": 1,
        "groups": 8,
        "hidden": (96,) * 3,
        "denoiser": "unet_transformer",
        "unet_multipliers": (1,),
        "unet_attention_levels": (),
        "transformer_width": 160,
        "transformer_blocks": 6,
        "first_stage_batch": 8,
        "diffusion_lr": 1e-3,
        "alignment_lr": 2e-5,
    }
    return Preset(name, **shared | numbers)


def scenes() -> Preset:
    """Return the generator of scenes, 64 px; its weights are of the plain U-Net in `ablation`."""
    return _small(
        "scenes",
        latent_channels=4,
        noise_level=0.95,
        image_size=64,
        target_sizes=(32, 256),
        diffusion_batch=32,
        first_stage_lr=2e-3,
    )


def cats() -> Preset:
    """Return a generator of cats' faces: 128 px, TAESD's latents 16 x 16 x 4, targets to 256 px."""
    return Preset(
        name="cats",
        encoder="tiny",
        channels=128,
        multipliers=(1, 1),
        blocks=1,
        groups=8,
        latent_channels=4,
        padding="replicate",
        head="interpolated",
        finer=2,
        hidden=(96,) * 3,
        denoiser="unet_transformer",
        unet_multipliers=(1, 2, 4),
        unet_blocks=1,
        unet_attention_levels=(1, 2),
        head_channels=64,
        transformer_width=256,
        transformer_blocks=1,
        merge=1,
        image_size=128,
        target_sizes=(64, 256),
        first_stage_batch=8,
        diffusion_batch=64,
        first_stage_lr=1e-3,
        diffusion_lr=1e-3,
        alignment_lr=2e-5,
        lpips_weight=0.25,
        lattice_weight=100.0,
        crop=64,
        prediction="v",
    )


def photos() -> Preset:
    """Return the shipped super-resolver of photographs: low 24 px, latent 24 x 24 x 8."""
    return _small(
        "photos",
        latent_channels=8,
        posterior=True,
        unet_blocks=1,
        beta_end=0.0155,
        image_size=96,
        low_size=24,
        target_sizes=(48, 192),
        padding="replicate",
        head="interpolated",
        finer=2,
        diffusion_batch=16,
        first_stage_lr=1e-3,
        kl_weight=1e-4,
        lpips_weight=0.25,
        lattice_weight=100.0,
        flat=0.125,
        crop=64,
        prediction="v",
    )


def photos_tiny() -> Preset:
    """Return a small super-resolver, low 16 px; its weights, too, are of an older denoiser."""
    return _small(
        "photos-tiny",
        latent_channels=8,
        noise_level=0.95,
        beta_end=0.0155,
        image_size=64,
        low_size=16,
        target_sizes=(32, 128),
        diffusion_batch=32,
        first_stage_lr=2e-3,
    )


def paper_generation_256() -> Preset:
    """Return generation at 256 px, Kim and Kim 2024; the U-Net is CompVis' FFHQ model's."""
    return Preset(
        name="paper_generation_256",
        unet_channels=224,
        unet_multipliers=(1, 2, 3, 4),
        unet_attention_levels=(1, 2, 3),
    )


def paper_faces_sr() -> Preset:
    """Super-resolution of faces, 16 to 128 px and beyond, Kim and Kim 2024."""
    return Preset(
        name="paper_faces_sr",
        latent_channels=32,
        posterior=True,
        unet_channels=256,
        unet_multipliers=(1, 2, 4, 4),
        unet_attention_levels=(0, 1, 2),
        beta_start=0.0001,
        beta_end=0.015,
        image_size=128,
        low_size=16,
        target_sizes=(32, 128),
        first_stage_batch=8,
    )


def paper_div2k_sr() -> Preset:
    """Super-resolution of photographs, 48 px crops, Kim and Kim 2024."""
    return Preset(
        name="paper_div2k_sr",
        unet_channels=160,
        unet_multipliers=(1, 2, 2, 4),
        unet_attention_levels=(3,),
        beta_end=0.0155,
        image_size=192,
        low_size=48,
        target_sizes=(48, 192),
        first_stage_batch=8,
    )


def paper_tower_sr() -> Preset:
    """Super-resolution of LSUN Tower, 16 to 256 px; U-Net and betas of `paper_faces_sr`, ours."""
    return replace(
        paper_faces_sr(),
        name="paper_tower_sr",
        multipliers=(1, 2, 4, 4),
        image_size=256,
        target_sizes=(32, 256),
        first_stage_batch=6,
    )


SHIPPED = tiny, scenes, cats, photos, photos_tiny
PAPER = paper_generation_256, paper_faces_sr, paper_div2k_sr, paper_tower_sr
PRESETS: dict[str, Callable[[], Preset]] = {make().name: make for make in (*SHIPPED, *PAPER)}


def get(name: str) -> Preset:
    """Return the preset of that name; ValueError lists the names."""
    if name not in PRESETS:
        raise InputError(f"no preset {name!r}; there are {', '.join(PRESETS)}")
    return PRESETS[name]()


def build_encoder(preset: Preset) -> autoencoder.Encoder | autoencoder.TinyEncoder:
    """Build an untrained encoder."""
    if preset.encoder == "tiny":
        return autoencoder.TinyEncoder(preset.tiny_channels, preset.latent_channels)
    options = preset.posterior, preset.encoder_attention_levels, preset.groups
    return autoencoder.Encoder(*_widths(preset), *options)


def build_decoder(preset: Preset) -> autoencoder.Decoder | autoencoder.TinyDecoder:
    """Build the untrained up-sampling decoder that pre-trains the encoder."""
    if preset.encoder == "tiny":
        return autoencoder.TinyDecoder(preset.tiny_channels, preset.latent_channels)
    return autoencoder.Decoder(*_widths(preset), preset.encoder_attention_levels, preset.groups)


def build_first_stage(preset: Preset) -> autoencoder.FirstStage:
    """Build an untrained first stage."""
    options = preset.decoder_attention_levels, preset.groups, preset.padding
    decoder = autoencoder.SymmetricDecoder(*_widths(preset), *options)
    width, encoder = preset.channels * preset.multipliers[0], build_encoder(preset)
    if preset.head == "interpolated":
        head = InterpolatedLIIF(width, preset.hidden, preset.cell_decode, preset.finer)
    else:
        head = LIIF(width, preset.hidden, preset.local_ensemble, preset.cell_decode)
    coarsest = preset.target_sizes[0] * encoder.factor / preset.image_size
    return autoencoder.FirstStage(encoder, decoder, head, preset.posterior, coarsest)


def _widths(preset: Preset) -> tuple:
    """Return what encoder and decoders take first."""
    return preset.channels, preset.multipliers, preset.blocks, preset.latent_channels


def build_denoiser(preset: Preset) -> UNet | TransformerDenoiser:
    """Build an untrained denoiser; super-resolution's takes a condition of c channels."""
    p = preset
    channels = p.latent_channels, p.latent_channels if p.low_size else 0
    tokens = p.transformer_width, p.transformer_blocks, p.merge, p.head_channels
    if p.denoiser == "transformer":
        return TransformerDenoiser(*channels, *tokens)
    mixed = p.denoiser == "unet_transformer"
    middle = (lambda *sizes: LatentTransformer(*sizes, *tokens)) if mixed else None
    levels = p.unet_channels, p.unet_multipliers, p.unet_blocks, p.unet_attention_levels
    return UNet(*channels, *levels, p.head_channels, middle)


def build_guide(preset: Preset) -> UNet | None:
    """Build the untrained guide, a plain U-Net of its own levels; None where there is none."""
    levels = preset.guide_multipliers
    plain = replace(preset, denoiser="unet", unet_multipliers=levels) if levels else preset
    return build_denoiser(plain).requires_grad_(False) if levels else None


def build_schedule(preset: Preset) -> NoiseSchedule:
    """Build the noise schedule."""
    return NoiseSchedule(preset.beta_start, preset.beta_end, preset.diffusion_steps)
