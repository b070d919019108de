"""Widgets for notebooks: the scale explorer."""

from arbscale.widgets.explorer import ScaleExplorer
from arbscale.widgets.sources import mixed_latent
