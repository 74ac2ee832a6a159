"""The pairs. ``REGISTRY`` is what the command line and the tests walk: a new pair is one line here."""

from pyrovae.models.gmm import GMM
from pyrovae.models.iwae import IWAE
from pyrovae.models.ppca import PPCA
from pyrovae.models.vae import VAE
from pyrovae.pair import Pair

REGISTRY: dict[str, type[Pair]] = {"gmm": GMM, "ppca": PPCA, "vae": VAE, "iwae": IWAE}

DEFAULT_OPTIONS = {"gmm": {"num_components": 2}, "ppca": {"latent_dim": 2}}
"""What the command line passes for constructor arguments that have no default."""

DEFAULT_DATA = {"gmm": "faithful", "ppca": "iris"}
"""What the command line trains on when no data are named; ``digits`` for the others."""

__all__ = ["DEFAULT_DATA", "DEFAULT_OPTIONS", "GMM", "IWAE", "PPCA", "REGISTRY", "VAE"]
