"""Widgets for notebooks: the scale explorer, and the plain slider that came before it."""

from arbscale.widgets.explorer import ScaleExplorer
from arbscale.widgets.slider import png, scale_slider
from arbscale.widgets.sources import mixed_latent

__all__ = ["ScaleExplorer", "mixed_latent", "png", "scale_slider"]
