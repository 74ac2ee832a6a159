"""Pairs that the library offers. The command line and the tests read ``REGISTRY``: a new pair is one line there."""

from pyrovae.models.gmm import GMM
from pyrovae.models.iwae import IWAE
from pyrovae.models.ppca import PPCA
from pyrovae.models.vae import VAE
from pyrovae.pair import Pair

REGISTRY: dict[str, type[Pair]] = {"gmm": GMM, "ppca": PPCA, "vae": VAE, "iwae": IWAE}

DEFAULT_OPTIONS = {"gmm": {"num_components": 2}, "ppca": {"latent_dim": 2}}
"""Values that the command line passes for constructor arguments that have no default."""

DEFAULT_DATA = {"gmm": "faithful", "ppca": "iris"}
"""Data sets that the command line takes where none is named; the other pairs take ``digits``."""

__all__ = ["DEFAULT_DATA", "DEFAULT_OPTIONS", "GMM", "IWAE", "PPCA", "REGISTRY", "VAE"]
