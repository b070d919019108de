"""Every tensor that the paper's released code produced, from our modules."""

import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from arbscale import compat
from arbscale.diffusion import NoiseSchedule, alignment_loss, denoising_loss
from arbscale.samplers import ddim
from arbscale.unet import timestep_embedding

GOLDEN = Path(__file__).parent / "golden"


class Case:
    """One golden file: its config, its tensors, and our modules with its weights."""

    def __init__(self, name: str):
        with safe_open(GOLDEN / f"{name}.safetensors", "pt") as f:
            self.config = json.loads(f.metadata()["config"])
            tensors = {k: f.get_tensor(k) for k in f.keys()}
        groups: dict[str, dict[str, torch.Tensor]] = {}
        for key, tensor in tensors.items():
            group, rest = key.split("/", 1)
            groups.setdefault(group, {})[rest] = tensor
        self.inputs, self.outputs = groups["inputs"], groups["outputs"]
        self.state, self.unet_state = groups["first_stage"], groups["unet"]
        self.first_stage = compat.first_stage_from_reference(self.config, self.state).eval()
        self.unet = compat.unet_from_reference(self.config, self.unet_state).eval()
        s = self.config["schedule"]
        self.schedule = NoiseSchedule(s["linear_start"], s["linear_end"], s["timesteps"])
        self.scale = self.config["scale_factor"]

    def denoise(self, z, t):
        return self.unet(z, t, self.outputs["condition"])

    def decode(self, z, size=32):
        return self.first_stage.decode(z / self.scale, size)


@pytest.fixture(scope="module", params=["plain", "posterior"])
def case(request):
    with torch.no_grad():
        yield Case(request.param)


def check(ours, golden, tolerance=1e-4):
    assert ours.shape == golden.shape
    assert (ours - golden).abs().max().item() <= tolerance


def test_latent(case):
    check(case.first_stage.encode(case.inputs["image"]), case.outputs["latent"])


def test_posterior(case):
    if "posterior_mean" not in case.outputs:
        with pytest.raises(RuntimeError, match="posterior"):
            case.first_stage.posterior(case.inputs["image"])
        return
    posterior = case.first_stage.posterior(case.inputs["image"])
    check(posterior.mean, case.outputs["posterior_mean"])
    check(posterior.logvar, case.outputs["posterior_logvar"])


def test_features_and_pictures_at_every_size(case):
    features = case.first_stage.features(case.outputs["latent"])
    check(features, case.outputs["decoder_feature"])
    for size in case.config["output_sizes"]:
        check(case.first_stage.render(features, size), case.outputs[f"decoded_{size}"], 2e-5)


def test_schedule(case):
    assert case.outputs["alphas_cumprod"].dtype == torch.float64
    torch.testing.assert_close(
        case.schedule.alpha_bar, case.outputs["alphas_cumprod"], rtol=1e-12, atol=1e-12
    )


def test_condition(case):
    enlarged = torch.nn.functional.interpolate(case.inputs["lr_image"], size=32, mode="nearest")
    check(case.first_stage.encode(enlarged) * case.scale, case.outputs["condition"])


def test_denoiser(case):
    z0 = case.outputs["latent"] * case.scale
    z_t = case.schedule.add_noise(z0, case.inputs["t"], case.inputs["noise"])
    check(z_t, case.outputs["z_t"])
    embedding = case.outputs["timestep_embedding"]
    check(timestep_embedding(case.inputs["t"], embedding.shape[1]), embedding)
    eps = case.denoise(case.outputs["z_t"], case.inputs["t"])
    check(eps, case.outputs["eps"])
    z0_hat = case.schedule.predict_z0(z_t, case.inputs["t"], eps)
    check(z0_hat, case.outputs["pred_z0"])
    check(case.decode(z0_hat), case.outputs["pred_image"], 2e-5)


def test_losses(case):
    z0 = case.outputs["latent"] * case.scale
    t, noise = case.inputs["t"], case.inputs["noise"]
    check(denoising_loss(case.denoise, z0, t, noise, case.schedule), case.outputs["denoising_loss"])
    latent, image = alignment_loss(
        case.denoise, case.decode, z0, case.inputs["image"], t, noise, case.schedule
    )
    check(latent, case.outputs["alignment_latent_loss"])
    check(image, case.outputs["alignment_image_loss"])


@pytest.mark.parametrize("eta", [0, 1])
def test_ddim(case, eta):
    z0 = ddim(
        case.denoise,
        case.inputs["x_T"],
        case.schedule,
        timesteps=case.config["ddim_timesteps"][::-1],
        eta=eta,
        final_alpha_bar=case.schedule.alpha_bar[0].item(),
        noise=lambda t: case.inputs[f"ddim_noise_{t}"],
    )
    check(z0, case.outputs[f"ddim_eta{eta}"])


def test_every_golden_tensor_is_compared(case):
    """A new tensor in the golden files must not go unnoticed."""
    known = {
        "latent", "posterior_mean", "posterior_logvar", "decoder_feature", "alphas_cumprod",
        "condition", "z_t", "timestep_embedding", "eps", "denoising_loss", "pred_z0", "pred_image",
        "alignment_latent_loss", "alignment_image_loss", "ddim_eta0", "ddim_eta1",
    }  # fmt: skip
    known |= {f"decoded_{size}" for size in case.config["output_sizes"]}
    assert set(case.outputs) <= known
