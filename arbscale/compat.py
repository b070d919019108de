"""Read published weights: the paper's released code, CompVis' latent diffusion, TAESD's.

Each reader pairs every published layer with one of ours, and raises ValueError that lists what is
missing, unexpected or of another shape. `convert` turns a checkpoint and its YAML into a folder
that `arbscale.load` reads. Nothing here unpickles: checkpoints are safetensors, or are read with
`torch.load(..., weights_only=True)`.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from arbscale import presets, store
from arbscale.autoencoder import Encoder, FirstStage, SymmetricDecoder, TinyEncoder
from arbscale.model import ArbitraryScaleModel
from arbscale.presets import Preset
from arbscale.store import InputError
from arbscale.unet import UNet, unfilled

State = dict[str, Tensor]
Pairs = Iterable[tuple[str, str]]

FIRST_STAGE, UNET, EMA = "first_stage_model.", "model.diffusion_model.", "model_ema."
"""Prefixes of the parts of a whole checkpoint."""

BUFFERS = re.compile(
    r"(sqrt_|log_)?(recip(m1)?_)?(one_minus_)?alphas_cumprod(_prev)?|lvlb_weights"
    r"|betas|logvar|scale_factor|posterior_(variance|log_variance_clipped|mean_coef[12])"
)
"""Numbers in a whole checkpoint that follow from its config, and the scale factor."""

RESIDUAL = ("norm1", "norm1"), ("conv1", "conv1"), ("norm2", "norm2"), ("conv2", "conv2")
FIRST_STAGE_BLOCK = (*RESIDUAL, ("nin_shortcut", "skip"))
FIRST_STAGE_ATTENTION = ("norm", "norm"), ("q", "q"), ("k", "k"), ("v", "v"), ("proj_out", "out")
UNET_BLOCK = (
    ("in_layers.0", "norm1"),
    ("in_layers.2", "conv1"),
    ("emb_layers.1", "time"),
    ("out_layers.0", "norm2"),
    ("out_layers.3", "conv2"),
    ("skip_connection", "skip"),
)
UNET_ATTENTION = ("norm", "norm"), ("qkv", "qkv"), ("proj_out", "out")
LDM_UNUSED = ("decoder.", "post_quant_conv.", "quantize.", "loss.")
"""Parts of a CompVis first stage that have no place here: its decoder up-samples."""


def convert(checkpoint: Path, config: Path, folder: Path) -> str:
    """Write a published model as a folder that `arbscale.load` reads; return what it holds.

    Parameters
    ----------
    checkpoint
        Of the released code (a first stage, or a whole diffusion model) or of CompVis' latent
        diffusion: safetensors, or what `torch.save` wrote, with tensors and plain numbers alone.
    config
        The YAML that it was trained with, as published.
    folder
        Where weights and manifest go.

    Raises ValueError that names what is missing, unexpected or not supported.

    """
    import yaml

    state = read_checkpoint(checkpoint)
    with store.reading(config, yaml.YAMLError):
        tree = yaml.safe_load(config.read_text(encoding="utf-8"))
        preset = _preset(tree, folder.resolve().name)
        params = tree["model"]["params"]
        first = params.get("first_stage_config", {"params": params})["params"]
        scale_factor = float(state.get("scale_factor", params.get("scale_factor", 1.0)))
    whole = "unet_config" in params
    trained, untrained = {}, {}
    if whole:
        again = {"cond_stage_model." + k for k in _under(state, FIRST_STAGE)}  # where they are one
        known = (k for k in state if k.startswith((FIRST_STAGE, UNET, EMA)) or BUFFERS.fullmatch(k))
        if unexpected := sorted(state.keys() - again - {*known}):
            raise InputError(f"the checkpoint does not fit its config: unexpected {unexpected}")
        u = {"unet": params["unet_config"]["params"]}
        trained["denoiser"] = unet_from_reference(u, _averaged(state))
    else:
        untrained["denoiser"] = "0 0 4000 0"
    state = _under(state, FIRST_STAGE)
    if "liifconfig" in first:
        own = {k: v for k, v in state.items() if not k.startswith("loss.")}
        trained["first_stage"] = first_stage_from_reference(first, own)
    else:
        trained["first_stage.encoder"] = encoder_from_ldm(first, state)
        untrained["decoder"] = "0 2500 0 0"
    model = ArbitraryScaleModel(preset, scale_factor)  # its sizes are those of the checkpoint
    for name, part in trained.items():
        model.get_submodule(name).load_state_dict(part.state_dict())
    for part, steps in untrained.items():
        model.manifest[part] = (
            f"untrained; train it with `python -m arbscale train tiny --start {folder} "
            f"--data IMAGES --steps {steps} -o OUTPUT`"
        )
    model.manifest |= {"name": preset.name, "source": checkpoint.name, "config": config.name}
    model.save(folder)
    notes = [f"{part}: {model.manifest[part]}" for part in untrained]
    return "\n".join([f"wrote {folder}; scale factor {scale_factor:.6g}", *notes])


def read_checkpoint(path: Path) -> State:
    """Return a checkpoint's tensors; ValueError where it is damaged or holds more than tensors."""
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        found = torch.load(path, map_location="cpu", weights_only=True)
    except OSError:
        raise
    except Exception:  # of a damaged file, torch.load's may be any
        raise InputError(
            f"{path} is damaged or holds Python objects, which are not read; where you trust its "
            "source, save its `state_dict` alone"
        ) from None
    state = found.get("state_dict", found) if isinstance(found, dict) else {}
    if not state or not all(isinstance(tensor, Tensor) for tensor in state.values()):
        raise InputError(f"{path} holds no state dict")
    return state


def _preset(tree: dict, name: str) -> Preset:
    """Return the preset that a published config describes."""
    params = tree["model"]["params"]
    first = params.get("first_stage_config", {"params": params})["params"]
    fields = _first_stage_fields(first)
    train = first.get("trainconfig", params.get("trainconfig", {}))
    size = fields["image_size"]
    fields["target_sizes"] = train.get("gt_min", size // 4), train.get("gt_max", size)
    if params.get("beta_schedule", "linear") != "linear":
        raise InputError(f"beta_schedule {params['beta_schedule']} is not supported, but linear is")
    if params.get("parameterization", "eps") not in ("eps", "v"):
        raise InputError(f"parameterization {params['parameterization']} is not supported")
    if "unet_config" in params:
        unet = params["unet_config"]["params"]
        fields |= _unet_fields(unet)
        fields["beta_start"] = params.get("linear_start", 1e-4)
        fields["beta_end"] = params.get("linear_end", 2e-2)
        fields["diffusion_steps"] = params.get("timesteps", 1000)
        fields["prediction"] = params.get("parameterization", "eps")
        if unet["in_channels"] != unet["out_channels"]:
            if not params.get("c_encode"):
                raise InputError("a condition that is not an encoded image is not supported")
            fields["low_size"] = tree["data"]["params"]["train"]["params"]["lr_size"]
    return Preset(name, **fields)


def _first_stage_fields(config: dict) -> dict:
    """Return the preset's fields of a first stage; `attn_resolutions` are sizes in pixels."""
    dd, liif = config["ddconfig"], config.get("liifconfig", {})
    levels = tuple(range(len(dd["ch_mult"])))
    attends = [dd["resolution"] // 2**i in dd["attn_resolutions"] for i in levels]
    return {
        "channels": dd["ch"],
        "multipliers": tuple(dd["ch_mult"]),
        "blocks": dd["num_res_blocks"],
        "latent_channels": dd["z_channels"],
        "posterior": dd.get("double_z", False),
        "encoder_attention_levels": tuple(i for i in levels if attends[i]),
        "decoder_attention_levels": levels if attends[-1] else (),  # all at the latent's size
        "hidden": tuple(liif.get("hidden_list", (256,) * 4)),
        "local_ensemble": liif.get("local_ensemble", True),
        "cell_decode": liif.get("cell_decode", True),
        "image_size": dd["resolution"],
    }


def _unet_fields(u: dict) -> dict:
    """Return the preset's fields of a U-Net, whose `attention_resolutions` are factors."""
    if u.get("num_head_channels", -1) < 1:
        raise InputError("the U-Net's config must give num_head_channels, the width of a head")
    return {
        "unet_channels": u["model_channels"],
        "unet_multipliers": tuple(u["channel_mult"]),
        "unet_blocks": u["num_res_blocks"],
        "unet_attention_levels": tuple(
            i for i in range(len(u["channel_mult"])) if 2**i in u["attention_resolutions"]
        ),
        "head_channels": u["num_head_channels"],
    }


def _averaged(state: State) -> State:
    """Return the U-Net's tensors, each as its moving average where the checkpoint has one."""
    unet = _under(state, UNET)
    names = {k: EMA + f"diffusion_model.{k}".replace(".", "") for k in unet}
    return {k: state.get(names[k], tensor) for k, tensor in unet.items()}


def first_stage_from_reference(config: dict, state: State) -> FirstStage:
    """Build the first stage of the paper's released code from its state dict.

    `config` holds `ddconfig` and `liifconfig` as released; `state` has the keys `encoder.0.*`,
    `encoder.1.*`, `decoder.decoder.0.*`, `decoder.decoder.1.*`, `decoder.inr.imnet.*`.
    """
    preset = Preset("released", **_first_stage_fields(config))
    first_stage = unfilled(presets.build_first_stage, preset)
    first_stage.coarsest = 0.0  # the released code renders every size directly
    layers = range(len(first_stage.liif.layers))
    pairs = [
        *_prefixed(_encoder_pairs(first_stage.encoder), "encoder.0.", "encoder."),
        ("encoder.1", "encoder.head"),
        ("decoder.decoder.0", "decoder.stem.0"),
        *_prefixed(_decoder_pairs(first_stage.decoder), "decoder.decoder.1.", "decoder."),
        *((f"decoder.inr.imnet.layers.{2 * i}", f"liif.layers.{i}") for i in layers),
    ]
    return _load(first_stage, pairs, state)


def encoder_from_ldm(config: dict, state: State) -> Encoder:
    """Build the encoder of a CompVis first stage (`encoder.*` and `quant_conv`).

    `config` holds `ddconfig`; `state` is the first stage's or a whole checkpoint's state dict
    (keys under `first_stage_model.`). The up-sampling decoder, the codebook and the training loss
    have no place here and are left out.
    """
    state = _under(state, FIRST_STAGE)
    state = {k: v for k, v in state.items() if not k.startswith(LDM_UNUSED)}
    encoder = unfilled(presets.build_encoder, Preset("ldm", **_first_stage_fields(config)))
    pairs = [*_prefixed(_encoder_pairs(encoder), "encoder.", ""), ("quant_conv", "head")]
    return _load(encoder, pairs, state)


def unet_from_reference(config: dict, state: State) -> UNet:
    """Build the denoiser of the released code or of CompVis' latent diffusion.

    `config` holds `unet`, the network's arguments as published, and, for a conditional network,
    more input than output channels. `state` is the network's own state dict or a whole
    checkpoint's (keys under `model.diffusion_model.`).
    """
    u = config["unet"]
    options = "use_spatial_transformer", "use_scale_shift_norm", "resblock_updown"
    for option in (*options, "use_new_attention_order"):
        if u.get(option):
            raise InputError(f"{option} is not supported; this reader takes plain attention U-Nets")
    channels = u["out_channels"], u["in_channels"] - u["out_channels"]
    unet = unfilled(UNet, *channels, *_unet_fields(u).values())
    return _load(unet, _unet_pairs(unet), _under(state, UNET))


def tiny_encoder(state: State) -> TinyEncoder:
    """Build TAESD's encoder from its state dict; ValueError on what does not fit."""
    last = f"{max((int(k.partition('.')[0]) for k in state if k[0].isdigit()), default=0)}.weight"
    if "0.weight" not in state or last not in state:
        raise InputError("these are not TAESD's weights: no numbered layers; see its repository")
    net = unfilled(TinyEncoder, state["0.weight"].shape[0], state[last].shape[0])
    names = {k.rpartition(".")[0] for k in net.layers.state_dict()}
    return _load(net, [(name, f"layers.{name}") for name in sorted(names)], state)


def _prefixed(pairs: Pairs, theirs: str, ours: str) -> Pairs:
    return [(theirs + a, ours + b) for a, b in pairs]


def _level_pairs(level: nn.Sequential, theirs: str, ours: str) -> Pairs:
    """Pair the blocks and attentions of one level; published code keeps them in two lists."""
    blocks = attentions = 0
    for i, layer in enumerate(level):
        if hasattr(layer, "conv1"):
            yield from _prefixed(FIRST_STAGE_BLOCK, f"{theirs}.block.{blocks}.", f"{ours}.{i}.")
            blocks += 1
        else:
            yield from _prefixed(
                FIRST_STAGE_ATTENTION, f"{theirs}.attn.{attentions}.", f"{ours}.{i}."
            )
            attentions += 1


def _middle_pairs() -> Pairs:
    yield from _prefixed(FIRST_STAGE_BLOCK, "mid.block_1.", "middle.0.")
    yield from _prefixed(FIRST_STAGE_ATTENTION, "mid.attn_1.", "middle.1.")
    yield from _prefixed(FIRST_STAGE_BLOCK, "mid.block_2.", "middle.2.")


def _encoder_pairs(encoder: Encoder) -> Pairs:
    yield "conv_in", "stem"
    for i, level in enumerate(encoder.levels):
        yield from _level_pairs(level, f"down.{i}", f"levels.{i}")
        if i < len(encoder.downs):
            yield f"down.{i}.downsample.conv", f"downs.{i}.conv"
    yield from _middle_pairs()
    yield "norm_out", "norm"
    yield "conv_out", "conv"


def _decoder_pairs(decoder: SymmetricDecoder) -> Pairs:
    yield "conv_in", "stem.1"
    yield from _middle_pairs()
    last = len(decoder.levels) - 1
    for i, level in enumerate(decoder.levels):
        yield from _level_pairs(level, f"up.{last - i}", f"levels.{i}")


def _unet_pairs(unet: UNet) -> Pairs:
    yield from (("time_embed.0", "time.0"), ("time_embed.2", "time.2"))
    yield from (("input_blocks.0.0", "stem"), ("out.0", "norm"), ("out.2", "conv"))
    n = 1
    for level, stacks in enumerate(unet.down):
        for i, stack in enumerate(stacks):
            yield from _stack_pairs(stack, f"input_blocks.{n}", f"down.{level}.{i}")
            n += 1
        if level < len(unet.shrink):
            yield f"input_blocks.{n}.0.op", f"shrink.{level}"
            n += 1
    yield from _stack_pairs(unet.middle, "middle_block", "middle")
    n = 0
    for level, stacks in enumerate(unet.up):
        for i, stack in enumerate(stacks):
            yield from _stack_pairs(stack, f"output_blocks.{n}", f"up.{level}.{i}")
            if i == len(stacks) - 1 and level < len(unet.grow):
                yield f"output_blocks.{n}.{len(stack)}.conv", f"grow.{level}"
            n += 1


def _stack_pairs(stack: nn.ModuleList, theirs: str, ours: str) -> Pairs:
    for i, layer in enumerate(stack):
        names = UNET_BLOCK if hasattr(layer, "conv1") else UNET_ATTENTION
        yield from _prefixed(names, f"{theirs}.{i}.", f"{ours}.{i}.")


def _under(state: State, prefix: str) -> State:
    """Return the part of a checkpoint under `prefix`, or all of it where the prefix is unknown."""
    part = {k[len(prefix) :]: v for k, v in state.items() if k.startswith(prefix)}
    return part or state


def _load(module: nn.Module, pairs: Pairs, state: State) -> nn.Module:
    """Copy the paired tensors; InputError names keys that are missing, left over, misfits."""
    own = module.state_dict()
    leaves = [(f"{a}.{leaf}", f"{b}.{leaf}") for a, b in pairs for leaf in ("weight", "bias")]
    names = {theirs: ours for theirs, ours in leaves if ours in own}
    missing, unexpected = [k for k in names if k not in state], sorted(state.keys() - names.keys())
    misfits = [
        f"{k} {tuple(state[k].shape)} for {tuple(own[name].shape)}"
        for k, name in names.items()
        if k in state and state[k].squeeze().shape != own[name].squeeze().shape
    ]
    if missing or unexpected or misfits:
        raise InputError(
            f"the checkpoint does not fit its config: missing {missing}, unexpected {unexpected}, "
            f"of another shape {misfits}"
        )
    store.check_finite(state, "the checkpoint")
    # A copy: the module's weights become these tensors, and the checkpoint's are not its own.
    for k, name in names.items():
        own[name] = torch.empty(own[name].shape).copy_(state[k].reshape(own[name].shape))
    module.load_state_dict(own, assign=True)
    return module
