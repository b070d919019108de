"""Read published state dicts: the paper's released code, CompVis' latent diffusion, TAESD's.

Each reader pairs every published layer with one of ours, and raises ValueError that lists what is
missing and what is left over. The dictionaries are read with `torch.load(..., weights_only=True)`
or from safetensors by the caller; nothing here unpickles.
"""

from __future__ import annotations

import re
from collections.abc import Iterable

from torch import Tensor, nn

from arbscale.autoencoder import (
    Encoder,
    FirstStage,
    SymmetricDecoder,
    TinyDecoder,
    TinyEncoder,
)
from arbscale.liif import LIIF
from arbscale.unet import UNet

State = dict[str, Tensor]
Pairs = Iterable[tuple[str, str]]

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


def first_stage_from_reference(config: dict, state: State) -> FirstStage:
    """Build the first stage of the paper's released code from its state dict.

    `config` holds `ddconfig` and `liifconfig` as released; `state` has the keys `encoder.0.*`,
    `encoder.1.*`, `decoder.decoder.0.*`, `decoder.decoder.1.*`, `decoder.inr.imnet.*`.
    Raises ValueError on missing, unexpected or ill-shaped tensors.
    """
    dd, liif = config["ddconfig"], config["liifconfig"]
    encoder = _encoder(dd)
    decoder = SymmetricDecoder(
        dd["ch"],
        tuple(dd["ch_mult"]),
        dd["num_res_blocks"],
        dd["z_channels"],
        _levels_with_attention(dd, "decoder"),
    )
    head = LIIF(
        dd["ch"] * dd["ch_mult"][0],
        tuple(liif["hidden_list"]),
        liif.get("local_ensemble", True),
        liif.get("cell_decode", True),
    )
    first_stage = FirstStage(encoder, decoder, head, posterior=dd.get("double_z", False))
    pairs = [
        *_prefixed(_encoder_pairs(encoder), "encoder.0.", "encoder."),
        ("encoder.1", "encoder.head"),
        ("decoder.decoder.0", "decoder.stem.0"),
        *_prefixed(_decoder_pairs(decoder), "decoder.decoder.1.", "decoder."),
        *(
            (f"decoder.inr.imnet.layers.{2 * i}", f"liif.layers.{i}")
            for i in range(len(head.layers))
        ),
    ]
    return _load(first_stage, pairs, state)


def encoder_from_ldm(config: dict, state: State) -> Encoder:
    """Build the encoder of a CompVis first stage (`encoder.*` and `quant_conv`).

    `config` holds `ddconfig`; `state` is the first stage's or a whole checkpoint's state dict
    (keys under `first_stage_model.`). The up-sampling decoder, the codebook and the training loss
    have no place here and are left out; anything else unknown raises ValueError.
    """
    state = _under(state, "first_stage_model.")
    state = {k: v for k, v in state.items() if not k.startswith(LDM_UNUSED)}
    encoder = _encoder(config["ddconfig"])
    pairs = [*_prefixed(_encoder_pairs(encoder), "encoder.", ""), ("quant_conv", "head")]
    return _load(encoder, pairs, state)


def unet_from_reference(config: dict, state: State) -> UNet:
    """Build the denoiser of the released code or of CompVis' latent diffusion.

    `config` holds `unet`, the network's arguments as published, and, for a conditional network,
    more input than output channels. `state` is the network's own state dict or a whole
    checkpoint's (keys under `model.diffusion_model.`). Raises ValueError on what does not fit.
    """
    u = config["unet"]
    for option in (
        "use_spatial_transformer",
        "use_scale_shift_norm",
        "resblock_updown",
        "use_new_attention_order",
    ):
        if u.get(option):
            raise ValueError(f"{option} is not supported; this reader takes plain attention U-Nets")
    if u.get("num_head_channels", -1) < 1:
        raise ValueError("the U-Net's config must give num_head_channels, the width of a head")
    multipliers = tuple(u["channel_mult"])
    unet = UNet(
        u["out_channels"],
        u["in_channels"] - u["out_channels"],
        u["model_channels"],
        multipliers,
        u["num_res_blocks"],
        tuple(i for i in range(len(multipliers)) if 2**i in u["attention_resolutions"]),
        u["num_head_channels"],
    )
    return _load(unet, _unet_pairs(unet), _under(state, "model.diffusion_model."))


def tiny_encoder(state: State) -> TinyEncoder:
    """Build TAESD's encoder from its state dict; ValueError on what does not fit."""
    return _load_tiny(TinyEncoder, "0.weight", 0, state)


def tiny_decoder(state: State) -> TinyDecoder:
    """Build TAESD's decoder from its state dict; ValueError on what does not fit."""
    # Published, the decoder's first entry draws in outliers and has no weights.
    state = {re.sub(r"^\d+", lambda n: str(int(n[0]) - 1), k): v for k, v in state.items()}
    return _load_tiny(TinyDecoder, "0.weight", 1, state)


def _load_tiny(kind: type, first: str, axis: int, state: State) -> nn.Module:
    last = f"{max((int(k.partition('.')[0]) for k in state if k[0].isdigit()), default=0)}.weight"
    if first not in state or last not in state:
        raise ValueError("these are not TAESD's weights: no numbered layers; see its repository")
    latent = state[first].shape[1] if axis else state[last].shape[0]
    net = kind(state[first].shape[0], latent)
    names = {k.rpartition(".")[0] for k in net.layers.state_dict()}
    return _load(net, [(name, f"layers.{name}") for name in sorted(names)], state)


def _encoder(dd: dict) -> Encoder:
    return Encoder(
        dd["ch"],
        tuple(dd["ch_mult"]),
        dd["num_res_blocks"],
        dd["z_channels"],
        dd.get("double_z", False),
        _levels_with_attention(dd, "encoder"),
    )


def _levels_with_attention(dd: dict, part: str) -> tuple[int, ...]:
    """Levels whose working size is among `attn_resolutions`; the decoder works at the latent's."""
    levels = range(len(dd["ch_mult"]))
    last = levels[-1]
    sizes = [dd["resolution"] // 2 ** (last if part == "decoder" else i) for i in levels]
    return tuple(i for i in levels if sizes[i] in dd["attn_resolutions"])


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
    """Copy the paired tensors; ValueError names every key that is missing, left over or misfits."""
    wanted = module.state_dict()
    taken, missing, misfits = {}, [], []
    for theirs, ours in pairs:
        for leaf in ("weight", "bias"):
            if f"{ours}.{leaf}" not in wanted:
                continue
            if f"{theirs}.{leaf}" not in state:
                missing.append(f"{theirs}.{leaf}")
                continue
            ours_shape = wanted[f"{ours}.{leaf}"].shape
            tensor = state[f"{theirs}.{leaf}"]
            if tensor.squeeze().shape != ours_shape.__class__([n for n in ours_shape if n != 1]):
                misfits.append(f"{theirs}.{leaf} {tuple(tensor.shape)} for {tuple(ours_shape)}")
                continue
            taken[f"{theirs}.{leaf}"] = f"{ours}.{leaf}", tensor.reshape(ours_shape)
    unexpected = sorted(set(state) - set(taken) - {m.split()[0] for m in misfits})
    if missing or unexpected or misfits:
        raise ValueError(
            f"the state dict does not fit its config: missing {missing}, unexpected {unexpected}, "
            f"of another shape {misfits}; pass the config that the weights were trained with"
        )
    module.load_state_dict({name: tensor.float() for name, tensor in taken.values()})
    return module
