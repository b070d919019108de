"""Published state dicts: what fits is read, what does not is named."""

import copy
import json
import os
import re
import time
from pathlib import Path

import pytest
import torch
import yaml
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import arbscale
from arbscale import compat
from arbscale.__main__ import main
from arbscale.autoencoder import TinyDecoder, TinyEncoder
from arbscale.data import sample_photos

GOLDEN = Path(__file__).parent / "golden"
TAESD = Path(os.environ.get("ARBSCALE_WEIGHTS", "")).expanduser() / "taesd"


def read(name: str):
    """Return config, first stage's state, denoiser's state and recorded tensors."""
    with safe_open(GOLDEN / f"{name}.safetensors", "pt") as f:
        config = json.loads(f.metadata()["config"])
        groups: dict[str, dict[str, torch.Tensor]] = {}
        for key in f.keys():
            group, rest = key.split("/", 1)
            groups.setdefault(group, {})[rest] = f.get_tensor(key)
    return config, groups["first_stage"], groups["unet"], groups["inputs"] | groups["outputs"]


@pytest.fixture(params=["plain", "posterior"])
def golden(request):
    return read(request.param)


READERS = {
    "first stage": (
        compat.first_stage_from_reference,
        1,
        "decoder.inr.imnet.layers.2.weight",
    ),
    "U-Net": (compat.unet_from_reference, 2, "middle_block.1.qkv.weight"),
}


@pytest.mark.parametrize("reader", READERS)
def test_a_missing_tensor_is_named(golden, reader):
    read_it, part, key = READERS[reader]
    state = dict(golden[part])
    del state[key]
    with pytest.raises(ValueError, match=f"missing \\['{key}'\\]"):
        read_it(golden[0], state)


@pytest.mark.parametrize("reader", READERS)
def test_an_unexpected_tensor_is_named(golden, reader):
    read_it, part, _ = READERS[reader]
    state = golden[part] | {"extra.weight": torch.zeros(1)}
    with pytest.raises(ValueError, match="extra.weight"):
        read_it(golden[0], state)


@pytest.mark.parametrize("reader", READERS)
def test_an_ill_shaped_tensor_is_named(golden, reader):
    read_it, part, key = READERS[reader]
    state = golden[part] | {key: golden[part][key][:-1]}
    with pytest.raises(ValueError, match=re.escape(key)):
        read_it(golden[0], state)


@pytest.mark.parametrize("reader", READERS)
def test_several_faults_are_told_at_once(golden, reader):
    read_it, part, key = READERS[reader]
    state = {k: v for k, v in golden[part].items() if k != key} | {"a": torch.zeros(1)}
    with pytest.raises(ValueError) as error:
        read_it(golden[0], state)
    assert key in str(error.value) and "'a'" in str(error.value)


def test_a_config_of_another_network(golden):
    config = copy.deepcopy(golden[0])
    config["ddconfig"]["num_res_blocks"] += 1
    config["unet"]["num_res_blocks"] += 1
    for read_it, part, _ in READERS.values():
        with pytest.raises(ValueError, match="missing"):
            read_it(config, golden[part])


def test_the_state_is_left_as_it_was(golden):
    config, state, unet_state, _ = golden
    before = set(state), set(unet_state)
    stage = compat.first_stage_from_reference(config, state)
    assert (set(state), set(unet_state)) == before
    assert all(p.dtype == torch.float32 for p in stage.parameters())


# CompVis' latent diffusion ------------------------------------------------------------------------


def ldm_checkpoint(state, unet_state):
    """Arrange a whole checkpoint under CompVis' published names, up-sampling decoder and all."""
    checkpoint = {"betas": torch.zeros(1000), "model_ema.decay": torch.tensor(0.9999)}
    for key, tensor in state.items():
        if key.startswith("encoder.0."):
            checkpoint["first_stage_model.encoder." + key[len("encoder.0.") :]] = tensor
        elif key.startswith("encoder.1."):
            checkpoint["first_stage_model.quant_conv." + key[len("encoder.1.") :]] = tensor
        elif key.startswith("decoder.decoder.1."):
            checkpoint["first_stage_model.decoder." + key[len("decoder.decoder.1.") :]] = tensor
    checkpoint |= {
        "first_stage_model.decoder.up.1.upsample.conv.weight": torch.zeros(4, 4, 3, 3),
        "first_stage_model.decoder.conv_out.weight": torch.zeros(3, 4, 3, 3),
        "first_stage_model.post_quant_conv.weight": torch.zeros(3, 3, 1, 1),
        "first_stage_model.quantize.embedding.weight": torch.zeros(16, 3),
        "first_stage_model.loss.logvar": torch.zeros(()),
        "first_stage_model.loss.perceptual_loss.lin0.model.1.weight": torch.zeros(1, 64, 1, 1),
    }
    for key, tensor in unet_state.items():
        checkpoint["model.diffusion_model." + key] = tensor
        checkpoint["model_ema.diffusion_model" + key.replace(".", "")] = torch.zeros(1)
    return checkpoint


@torch.no_grad()
def test_the_encoder_of_a_whole_checkpoint(golden):
    config, state, unet_state, tensors = golden
    encoder = compat.encoder_from_ldm(config, ldm_checkpoint(state, unet_state))
    latent = encoder(tensors["image"])[:, : config["ddconfig"]["z_channels"]]
    assert (latent - tensors["latent"]).abs().max() <= 1e-4


@torch.no_grad()
def test_the_encoder_of_a_first_stage_alone(golden):
    config, state, unet_state, tensors = golden
    prefix = "first_stage_model."
    alone = {
        k[len(prefix) :]: v
        for k, v in ldm_checkpoint(state, unet_state).items()
        if k.startswith(prefix)
    }
    encoder = compat.encoder_from_ldm(config, alone)
    latent = encoder(tensors["image"])[:, : config["ddconfig"]["z_channels"]]
    assert (latent - tensors["latent"]).abs().max() <= 1e-4


@torch.no_grad()
def test_the_unet_of_a_whole_checkpoint(golden):
    config, state, unet_state, tensors = golden
    unet = compat.unet_from_reference(config, ldm_checkpoint(state, unet_state))
    eps = unet(tensors["z_t"], tensors["t"], tensors["condition"])
    assert (eps - tensors["eps"]).abs().max() <= 1e-4


@pytest.mark.parametrize(
    "key", ["first_stage_model.quant_conv.bias", "first_stage_model.encoder.conv_in.weight"]
)
def test_a_checkpoint_without_a_part_of_the_encoder(golden, key):
    checkpoint = ldm_checkpoint(*golden[1:3])
    del checkpoint[key]
    with pytest.raises(ValueError, match=key.removeprefix("first_stage_model.")):
        compat.encoder_from_ldm(golden[0], checkpoint)


def test_a_checkpoint_with_more_in_the_encoder(golden):
    checkpoint = ldm_checkpoint(*golden[1:3])
    checkpoint["first_stage_model.encoder.extra.weight"] = torch.zeros(1)
    with pytest.raises(ValueError, match="encoder.extra.weight"):
        compat.encoder_from_ldm(golden[0], checkpoint)


# Whole folders ------------------------------------------------------------------------------------


def published(config, whole=True, liif=True):
    """Arrange the golden config as the YAML of a whole model, or of a first stage alone."""
    first = {"ddconfig": config["ddconfig"], "lossconfig": {"target": "torch.nn.Identity"}}
    if liif:
        first["liifconfig"] = config["liifconfig"]
    train = {"params": {"train": {"params": {"size": 32, "lr_size": 8}}}}
    if not whole:
        first["trainconfig"] = {"gt_min": 8, "gt_max": 32}
        return {"model": {"params": first}, "data": train}
    params = {
        **config["schedule"],
        "c_encode": True,
        "scale_by_std": True,
        "unet_config": {"target": "UNetModel", "params": config["unet"]},
        "first_stage_config": {"target": "FirstStageModel", "params": first},
    }
    return {"model": {"params": params}, "data": train}


def released(config, state, unet_state):
    """Arrange a whole checkpoint as the released code saves it."""
    checkpoint = {"first_stage_model." + k: v for k, v in state.items()}
    checkpoint |= {"model.diffusion_model." + k: v for k, v in unet_state.items()}
    checkpoint |= {"betas": torch.zeros(1000), "sqrt_recipm1_alphas_cumprod": torch.zeros(1000)}
    return checkpoint | {"scale_factor": torch.tensor(config["scale_factor"])}


def averaged(checkpoint):
    """Move the U-Net's weights to their moving averages, and put noise in their place."""
    checkpoint = dict(checkpoint)
    for key in [k for k in checkpoint if k.startswith("model.diffusion_model.")]:
        name = "model_ema." + key.removeprefix("model.").replace(".", "")
        checkpoint[name] = checkpoint[key]
        checkpoint[key] = torch.randn(checkpoint[key].shape)
    return checkpoint


@pytest.fixture
def convert(tmp_path, capsys):
    """Return a function that writes a checkpoint and its YAML, and converts them."""

    def call(checkpoint, config, name="model.ckpt"):
        path, yaml_path = tmp_path / name, tmp_path / "config.yaml"
        if path.suffix == ".safetensors":
            save_file(checkpoint, path)
        else:
            torch.save({"state_dict": checkpoint, "epoch": 3}, path)
        yaml_path.write_text(yaml.safe_dump(config))
        words = ["convert", str(path), "--config", str(yaml_path), "-o", str(tmp_path / "out")]
        status, said = main(words), capsys.readouterr()
        return status, said.out + said.err, tmp_path / "out"

    return call


def check_outputs(model, config, tensors):
    close = {"atol": 1e-4, "rtol": 0}
    latent = model.first_stage.encode(tensors["image"])
    torch.testing.assert_close(latent, tensors["latent"], **close)
    for size in config["output_sizes"]:
        decoded = model.first_stage.decode(latent, size)
        torch.testing.assert_close(decoded, tensors[f"decoded_{size}"], **close)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["model.ckpt", "model.safetensors"])
@pytest.mark.parametrize("ema", [False, True])
@torch.no_grad()
def test_a_released_checkpoint_becomes_a_folder(golden, convert, name, ema):
    config, state, unet_state, tensors = golden
    checkpoint = released(config, state, unet_state)
    checkpoint = averaged(checkpoint) if ema else checkpoint
    status, said, folder = convert(checkpoint, published(config), name)
    assert status == 0 and "untrained" not in said
    model = arbscale.load(folder)
    check_outputs(model, config, tensors)
    condition = model.condition(tensors["lr_image"])
    torch.testing.assert_close(condition, tensors["condition"], atol=1e-4, rtol=0)
    eps = model.denoise(condition)(tensors["z_t"], tensors["t"])
    torch.testing.assert_close(eps, tensors["eps"], atol=2e-4, rtol=0)
    torch.testing.assert_close(model.schedule.alpha_bar, tensors["alphas_cumprod"])
    assert model.upscale(tensors["lr_image"][0], 3.7, steps=1).shape == (3, 30, 30)


@pytest.mark.slow
@torch.no_grad()
def test_a_released_first_stage_becomes_a_folder(golden, convert):
    config, state, _, tensors = golden
    checkpoint = state | {"loss.logvar": torch.zeros(())}
    status, said, folder = convert(checkpoint, published(config, whole=False))
    assert status == 0 and "denoiser: untrained" in said
    model = arbscale.load(folder)
    check_outputs(model, config, tensors)
    assert "untrained" in model.manifest["denoiser"] and model.preset.target_sizes == (8, 32)


@torch.no_grad()
def test_a_compvis_checkpoint_becomes_a_folder_with_an_untrained_decoder(golden, convert):
    config, state, unet_state, tensors = golden
    checkpoint = ldm_checkpoint(state, unet_state)
    checkpoint = {k: v for k, v in checkpoint.items() if not k.startswith("model_ema.diff")}
    checkpoint["scale_factor"] = torch.tensor(config["scale_factor"])
    status, said, folder = convert(checkpoint, published(config, liif=False))
    assert status == 0 and "decoder: untrained" in said
    model = arbscale.load(folder)
    latent = model.first_stage.encode(tensors["image"])
    torch.testing.assert_close(latent, tensors["latent"], atol=1e-4, rtol=0)
    assert model.scale_factor == pytest.approx(config["scale_factor"])
    assert "untrained" in model.manifest["decoder"] and "denoiser" not in model.manifest


UNET_CONFIG = "unet_config", "params"
FIRST_CONFIG = "first_stage_config", "params", "ddconfig"


@pytest.mark.parametrize(
    ("place", "value"),
    [
        ((*UNET_CONFIG, "model_channels"), 32_000),
        ((*UNET_CONFIG, "model_channels"), 10**9),
        ((*FIRST_CONFIG, "ch"), 16_000),
        ((*FIRST_CONFIG, "num_res_blocks"), 10**6),
    ],
)
def test_a_config_of_sizes_that_no_memory_holds_is_compared_first(convert, place, value):
    config, state, unet_state, _ = read("plain")
    tree = published(config)
    part = tree["model"]["params"]
    for name in place[:-1]:
        part = part[name]
    part[place[-1]] = value
    start = time.process_time()
    status, said, folder = convert(released(config, state, unet_state), tree)
    assert status == 2 and "Traceback" not in said and not folder.exists()
    assert time.process_time() - start < 10


@pytest.mark.parametrize(
    ("key", "change"),
    [
        ("first_stage_model.encoder.0.conv_in.weight", "remove"),
        ("model.diffusion_model.out.2.bias", "remove"),
        ("model.diffusion_model.extra.weight", "add"),
        ("first_stage_model.extra.weight", "add"),
        ("cond_stage_model.embedding.weight", "add"),
        ("unheard.of", "add"),
    ],
)
def test_a_checkpoint_that_does_not_fit_is_not_converted(convert, key, change):
    config, state, unet_state, _ = read("plain")
    checkpoint = released(config, state, unet_state)
    if change == "add":
        checkpoint[key] = torch.zeros(1)
    else:
        del checkpoint[key]
    status, said, folder = convert(checkpoint, published(config))
    name = key.removeprefix("first_stage_model.").removeprefix("model.diffusion_model.")
    assert status == 2 and name in said and not folder.exists()


@pytest.mark.parametrize(
    ("path", "value", "fact"),
    [
        (("model", "params", "unet_config"), {}, "params"),
        (("model", "params", "beta_schedule"), "cosine", "cosine"),
        (("model", "params", "parameterization"), "x0", "x0"),
        (("model", "params", "c_encode"), False, "condition"),
        (("data",), None, "config.yaml"),
        (("model",), "none", "config.yaml"),
    ],
)
def test_a_config_that_is_not_supported_is_named(convert, path, value, fact):
    config, state, unet_state, _ = read("plain")
    tree = published(config)
    inner = tree
    for step in path[:-1]:
        inner = inner[step]
    inner[path[-1]] = value
    status, said, folder = convert(released(config, state, unet_state), tree)
    assert status == 2 and fact in said and not folder.exists()


class Surprise:
    """What a checkpoint must not run."""

    def __reduce__(self):
        return (Path.touch, (Path("surprise"),))


def test_nothing_is_unpickled(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.save({"state_dict": {"a": torch.zeros(1)}, "callbacks": Surprise()}, "evil.ckpt")
    with pytest.raises(ValueError, match="evil.ckpt"):
        compat.read_checkpoint(Path("evil.ckpt"))
    assert not Path("surprise").exists()
    torch.save({"state_dict": {"a": 1}}, "numbers.ckpt")
    Path("damaged.ckpt").write_bytes(b"damaged")
    Path("unpicklable.ckpt").write_bytes(b"(abc")  # torch.load's IndexError
    Path("damaged.safetensors").write_bytes(b"damaged")
    Path("empty.ckpt").touch()
    Path("cut.ckpt").write_bytes(Path("numbers.ckpt").read_bytes()[:-100])  # a zip without its end
    pickles = "numbers.ckpt", "damaged.ckpt", "unpicklable.ckpt", "empty.ckpt", "cut.ckpt"
    for name in (*pickles, "damaged.safetensors"):
        with pytest.raises(ValueError, match=name):
            compat.read_checkpoint(Path(name))


# Variants of the U-Net ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    "option",
    [
        {"use_spatial_transformer": True},
        {"use_scale_shift_norm": True},
        {"resblock_updown": True},
        {"use_new_attention_order": True},  # another order of heads, in tensors of the same shape
        {"num_head_channels": -1, "num_heads": 2},
    ],
    ids=lambda o: next(iter(o)),
)
def test_networks_of_another_kind_are_refused(golden, option):
    """Rather than read into a network that computes something else."""
    config = copy.deepcopy(golden[0])
    config["unet"] |= option
    with pytest.raises(ValueError, match=next(iter(option))):
        compat.unet_from_reference(config, golden[2])


def test_options_that_are_off_are_no_hindrance(golden):
    config = copy.deepcopy(golden[0])
    config["unet"] |= {"use_spatial_transformer": False, "use_scale_shift_norm": False}
    compat.unet_from_reference(config, golden[2])


def test_the_width_of_a_head_must_be_given(golden):
    config = copy.deepcopy(golden[0])
    del config["unet"]["num_head_channels"]
    with pytest.raises(ValueError, match="num_head_channels"):
        compat.unet_from_reference(config, golden[2])


def test_attention_by_factor_and_by_size(golden):
    """The U-Net's `attention_resolutions` are factors, the encoder's are sizes in pixels."""
    config, state, unet_state, _ = golden
    unet = compat.unet_from_reference(config, unet_state)
    factors = config["unet"]["attention_resolutions"]
    with_attention = [len(stacks[0]) > 1 for stacks in unet.down]
    assert with_attention == [2**i in factors for i in range(len(with_attention))]
    encoder = compat.first_stage_from_reference(config, state).encoder
    sizes = [config["ddconfig"]["resolution"] // 2**i for i in range(len(encoder.levels))]
    with_attention = [any(hasattr(m, "q") for m in level) for level in encoder.levels]
    assert with_attention == [s in config["ddconfig"]["attn_resolutions"] for s in sizes]


@pytest.mark.slow
@torch.no_grad()
def test_the_tiny_nets_are_diffusers():
    """The same random weights give the same latents and images as `AutoencoderTiny`."""
    from diffusers import AutoencoderTiny

    torch.manual_seed(0)
    theirs = AutoencoderTiny()
    encoder = compat.tiny_encoder(dict(theirs.encoder.layers.state_dict()))
    decoder = TinyDecoder()
    decoder.layers.load_state_dict(theirs.decoder.layers.state_dict())
    image = torch.rand(2, 3, 32, 40) * 2 - 1
    z = theirs.encode(image).latents
    torch.testing.assert_close(encoder(image), z, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(decoder(3 * z), theirs.decode(3 * z).sample, atol=1e-5, rtol=1e-4)


def test_weights_that_are_not_taesds_are_refused():
    with pytest.raises(ValueError, match="TAESD"):
        compat.tiny_encoder({"encoder.conv_in.weight": torch.zeros(4, 3, 3, 3)})
    state = dict(TinyEncoder(8, 4).layers.state_dict())
    with pytest.raises(ValueError, match=r"7\.conv\.2\.bias"):
        compat.tiny_encoder({k: v for k, v in state.items() if k != "7.conv.2.bias"})
    with pytest.raises(ValueError, match="extra"):
        compat.tiny_encoder(state | {"extra.weight": torch.zeros(1)})
    for wrong in (float("nan"), float("inf")):
        state["0.bias"] = torch.full((8,), wrong)
        with pytest.raises(ValueError, match=r"0\.bias"):
            compat.tiny_encoder(state)


@pytest.mark.skipif(not TAESD.is_dir(), reason="ARBSCALE_WEIGHTS names no folder with taesd/")
@pytest.mark.parametrize(("kind", "least"), [("taesd", 22), ("taesd3", 25)])
@torch.no_grad()
def test_published_taesd_gives_an_image_back(kind, least):
    encoder = compat.tiny_encoder(load_file(TAESD / f"{kind}_encoder.safetensors"))
    published = load_file(TAESD / f"{kind}_decoder.safetensors")
    decoder = TinyDecoder(published["1.weight"].shape[0], published["1.weight"].shape[1])
    decoder.layers.load_state_dict(  # published with a clamp first
        {f"{int(k.split('.')[0]) - 1}.{k.split('.', 1)[1]}": v for k, v in published.items()}
    )
    image = sample_photos()["cat"][None, :, :296, :448]
    error = (decoder(encoder(image)).clamp(-1, 1) - image).square().mean()
    psnr = 10 * torch.log10(4 / error)
    assert psnr > least
