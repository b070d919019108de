"""Shapes, independence and errors of encoder and decoders; the posterior against torch's Normal."""

import pytest
import torch
from torch.distributions import Normal, kl_divergence

from arbscale.autoencoder import (
    Attention,
    Decoder,
    Downsample,
    Encoder,
    GaussianPosterior,
    ResidualBlock,
    SymmetricDecoder,
    TinyDecoder,
    TinyEncoder,
)


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def noise(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=seeded())


def awake(net: torch.nn.Module) -> torch.nn.Module:
    """Replace the zeros that training starts from."""
    torch.manual_seed(1)
    for p in net.parameters():
        if not p.detach().abs().sum():
            torch.nn.init.normal_(p, std=0.05)
    return net


@pytest.mark.parametrize("size", [(4, 4), (8, 20), (12, 4), (28, 36)], ids=str)
@torch.no_grad()
def test_encoder_takes_any_multiple_of_its_factor(size):
    encoder = Encoder(32, (1, 1, 2), blocks=1, latent_channels=5)
    assert encoder.factor == 4
    assert encoder(noise(2, 3, *size)).shape == (2, 5, size[0] // 4, size[1] // 4)


@torch.no_grad()
def test_a_posterior_has_twice_the_channels():
    assert Encoder(32, (1, 1), 1, 4, posterior=True)(noise(1, 3, 6, 6)).shape == (1, 8, 3, 3)


@pytest.mark.parametrize("size", [(7, 8), (8, 7), (6, 8), (1, 4)], ids=str)
def test_other_sides_are_refused_with_the_mend(size):
    encoder = Encoder(32, (1, 1, 1), blocks=1)
    with pytest.raises(ValueError, match="multiples of 4"):
        encoder(noise(1, 3, *size))


@pytest.mark.parametrize("size", [(1, 1), (2, 2), (3, 5), (8, 1)], ids=str)
@torch.no_grad()
def test_symmetric_decoder_keeps_the_size(size):
    decoder = SymmetricDecoder(32, (1, 2), blocks=1, latent_channels=3)
    assert decoder(noise(2, 3, *size)).shape == (2, 32, *size)


@pytest.mark.parametrize("size", [(1, 1), (2, 2), (3, 5)], ids=str)
@torch.no_grad()
def test_ordinary_decoder_returns_to_the_image(size):
    decoder = Decoder(32, (1, 1, 2), blocks=1, latent_channels=3)
    assert decoder(noise(2, 3, *size)).shape == (2, 3, 4 * size[0], 4 * size[1])


NETWORKS = {
    "encoder": (lambda: Encoder(32, (1, 2), 1, attention_levels=(1,)), (3, 8, 12)),
    "symmetric": (lambda: SymmetricDecoder(32, (1, 2), 1, attention_levels=(1,)), (3, 3, 5)),
    "ordinary": (lambda: Decoder(32, (1, 2), 1, attention_levels=(0,)), (3, 3, 5)),
}


@pytest.fixture(params=NETWORKS)
def network(request):
    """A network, and a batch of three for it."""
    torch.manual_seed(0)
    build, shape = NETWORKS[request.param]
    return awake(build()), noise(3, *shape)


@torch.no_grad()
def test_pictures_of_a_batch_are_independent(network):
    net, x = network
    alone = torch.cat([net(one[None]) for one in x])
    torch.testing.assert_close(net(x), alone, atol=1e-5, rtol=1e-5)


def test_gradients_reach_every_weight(network):
    net, x = network
    net(x).square().sum().backward()
    dead = [n for n, p in net.named_parameters() if p.grad is None or not p.grad.isfinite().all()]
    assert not dead
    # A constant added to all keys changes no softmax, so the keys' bias alone has no gradient.
    still = [n for n, p in net.named_parameters() if not p.grad.abs().sum() > 0]
    assert all(n.endswith("k.bias") for n in still)


def test_the_symmetric_decoder_mirrors_the_encoder():
    """One residual block more at each level, from the widest to the narrowest."""
    decoder = SymmetricDecoder(32, (1, 2, 3), blocks=2)
    assert [len(level) for level in decoder.levels] == [3, 3, 3]
    assert [level[-1].conv2.out_channels for level in decoder.levels] == [96, 64, 32]
    assert decoder.stem[0].kernel_size == (1, 1)
    assert not hasattr(decoder, "norm")


def test_attention_levels_are_the_encoders():
    """Level 0 is the encoder's first and the decoder's last."""
    encoder = Encoder(32, (1, 1, 1), 1, attention_levels=(0,))
    decoder = SymmetricDecoder(32, (1, 1, 1), 1, attention_levels=(0,))
    assert [any(isinstance(m, Attention) for m in level) for level in encoder.levels] == [1, 0, 0]
    assert [any(isinstance(m, Attention) for m in level) for level in decoder.levels] == [0, 0, 1]


@pytest.mark.parametrize("layer", [ResidualBlock(32, 32), Attention(32)], ids=["block", "attn"])
@torch.no_grad()
def test_training_starts_at_the_identity(layer):
    x = noise(2, 32, 3, 4)
    assert torch.equal(layer(x), x)


@pytest.mark.parametrize("network", [Encoder, SymmetricDecoder, Decoder])
def test_groups_of_every_normalisation(network):
    for groups in (32, 8):
        options = {} if groups == 32 else {"groups": groups}
        net = network(32, (1, 2), 1, attention_levels=(0,), **options)
        norms = [m for m in net.modules() if isinstance(m, torch.nn.GroupNorm)]
        assert len(norms) > 8
        assert {(m.num_groups, m.eps) for m in norms} == {(groups, 1e-6)}


@torch.no_grad()
def test_downsampling_pads_right_and_bottom_only():
    down = Downsample(1)
    down.conv.weight.fill_(1)
    down.conv.bias.zero_()
    corners = down(torch.ones(1, 1, 4, 4))[0, 0]
    assert corners.tolist() == [[9, 6], [6, 4]]


@torch.no_grad()
def test_attention_by_hand():
    torch.manual_seed(0)
    layer, x = awake(Attention(32)), noise(1, 32, 2, 3)
    h = layer.norm(x).flatten(2)[0].T  # (6, 32)
    q, k, v = (h @ f.weight[:, :, 0, 0].T + f.bias for f in (layer.q, layer.k, layer.v))
    mixed = torch.softmax(q @ k.T / 32**0.5, dim=1) @ v
    mixed = mixed @ layer.out.weight[:, :, 0, 0].T + layer.out.bias
    torch.testing.assert_close(layer(x), x + mixed.T.reshape(1, 32, 2, 3), atol=1e-5, rtol=1e-5)


# The posterior ------------------------------------------------------------------------------------


@pytest.fixture
def posterior():
    return GaussianPosterior.from_moments(noise(3, 8, 4, 5))


def normal(posterior):
    return Normal(posterior.mean, (0.5 * posterior.logvar).exp())


def test_moments_are_mean_then_log_variance():
    moments = noise(3, 8, 4, 5)
    posterior = GaussianPosterior.from_moments(moments)
    assert torch.equal(posterior.mean, moments[:, :4])
    assert torch.equal(posterior.logvar, moments[:, 4:])


def test_mode(posterior):
    assert torch.equal(posterior.mode, normal(posterior).mode)


def test_kl(posterior):
    terms = kl_divergence(normal(posterior), Normal(0.0, 1.0))
    torch.testing.assert_close(posterior.kl(), terms.mean(dim=(1, 2, 3)))
    standard = GaussianPosterior(torch.zeros(2, 4, 3, 3), torch.zeros(2, 4, 3, 3))
    assert standard.kl().tolist() == [0, 0]


def test_samples_follow_the_distribution():
    mean, logvar = torch.full((1, 1, 200, 200), 0.7), torch.full((1, 1, 200, 200), -1.2)
    draws = GaussianPosterior(mean, logvar).sample(seeded())
    assert draws.mean().item() == pytest.approx(0.7, abs=0.01)
    assert draws.var().log().item() == pytest.approx(-1.2, abs=0.03)


def test_samples_are_seeded_and_differentiable(posterior):
    assert torch.equal(posterior.sample(seeded(1)), posterior.sample(seeded(1)))
    assert not torch.equal(posterior.sample(seeded(1)), posterior.sample(seeded(2)))
    moments = noise(1, 2, 3, 3).requires_grad_()
    GaussianPosterior.from_moments(moments).sample(seeded()).square().sum().backward()
    assert (moments.grad != 0).all()


def test_the_log_variance_is_clamped():
    moments = torch.cat([torch.zeros(1, 1, 1, 2), torch.tensor([[[[-1e9, 1e9]]]])], dim=1)
    posterior = GaussianPosterior.from_moments(moments)
    assert posterior.logvar.flatten().tolist() == [-30, 20]
    assert posterior.kl().isfinite().all() and posterior.sample(seeded()).isfinite().all()


@torch.no_grad()
def test_signals_are_as_strong_at_the_end_as_at_the_beginning():
    """PyTorch's own draw of the weights would leave less than a third of the decoder's."""
    torch.manual_seed(0)
    encoder, decoder = Encoder(64, (1, 2, 2), 1, groups=8), SymmetricDecoder(64, (1, 2, 2), 1)
    z = encoder(noise(4, 3, 32, 32))
    assert 0.3 < z.std() < 2
    assert 0.3 < decoder(z / z.std()).std() < 3


@pytest.mark.parametrize("size", [(8, 8), (16, 40), (24, 8)], ids=str)
@torch.no_grad()
def test_tiny_nets_take_any_multiple_of_eight(size):
    z = TinyEncoder(16, 5)(noise(2, 3, *size))
    assert z.shape == (2, 5, size[0] // 8, size[1] // 8)
    assert TinyDecoder(16, 5)(z).shape == (2, 3, *size)


def test_the_tiny_encoder_refuses_other_sides():
    with pytest.raises(ValueError, match="12 x 16"):
        TinyEncoder(16)(noise(1, 3, 12, 16))


@pytest.mark.parametrize("mode", ["zeros", "replicate", "reflect"])
@torch.no_grad()
def test_padding_decides_whether_a_flat_latent_has_a_frame(mode):
    decoder = awake(SymmetricDecoder(32, (1, 2), 1, 3, padding=mode))
    features = decoder(torch.ones(1, 3, 6, 7))
    spread = (features - features[..., 3:4, 3:4]).abs().max().item()
    assert (spread > 0.01) == (mode == "zeros")
