"""The pairs. ``REGISTRY`` is what the command line and the behaviour tests walk: a new pair is one line here."""

from pyrovae.models.iwae import IWAE
from pyrovae.models.vae import VAE

from pyrovae.pair import Pair

REGISTRY: dict[str, type[Pair]] = {"vae": VAE, "iwae": IWAE}

__all__ = ["IWAE", "REGISTRY", "VAE"]
