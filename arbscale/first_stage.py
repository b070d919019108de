"""The first stage: image -> latent -> features -> image of any size."""

from __future__ import annotations

from torch import Tensor, nn

from arbscale.autoencoder import Encoder, GaussianPosterior, SymmetricDecoder, TinyEncoder
from arbscale.coords import Size, Window
from arbscale.liif import LIIF, InterpolatedLIIF


class FirstStage(nn.Module):
    """Encoder, symmetric decoder and LIIF together.

    `features` is slow and wanted once for a latent; `render` is fast and wanted often.
    `posterior` tells whether the encoder's output holds the moments of a Gaussian.
    """

    def __init__(
        self,
        encoder: Encoder | TinyEncoder,
        decoder: SymmetricDecoder,
        liif: LIIF | InterpolatedLIIF,
        posterior: bool = False,
    ):
        super().__init__()
        self.encoder, self.decoder, self.liif = encoder, decoder, liif
        self.has_posterior = posterior

    @property
    def factor(self) -> int:
        """How many image pixels one latent pixel spans."""
        return self.encoder.factor

    def encode(self, image: Tensor) -> Tensor:
        """Image (B, 3, H, W) in [-1, 1] -> unscaled latent (B, c, H/f, W/f).

        The posterior's mode where there is one. H and W must be multiples of `factor`.
        """
        return self.posterior(image).mode if self.has_posterior else self.encoder(image)

    def posterior(self, image: Tensor) -> GaussianPosterior:
        """Return the Gaussian over latents; RuntimeError where latents are deterministic."""
        if not self.has_posterior:
            raise RuntimeError("this first stage has no posterior; call encode for its latent")
        return GaussianPosterior.from_moments(self.encoder(image))

    def features(self, z: Tensor) -> Tensor:
        """Latent (B, c, h, w) -> the features (B, C, h, w) that `render` reads."""
        return self.decoder(z)

    def render(self, features: Tensor, size: int | Size, window: Window | None = None) -> Tensor:
        """Features (B, C, h, w) -> picture (B, 3, H, W) of any size; see `LIIF.render`."""
        return self.liif.render(features, size, window)

    def decode(self, z: Tensor, size: int | Size, window: Window | None = None) -> Tensor:
        """Latent (B, c, h, w) -> picture (B, 3, H, W) of any size, or a window of it."""
        return self.render(self.features(z), size, window)
