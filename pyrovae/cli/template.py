"""The file that ``pyrovae new`` writes."""

TEMPLATE = '''"""A pair of my own. Train it: pyrovae fit mypair.py:MyPair --data digits"""

import pyro
import pyro.distributions as dist

from pyrovae import Pair
from pyrovae.networks import BernoulliNetwork, NormalNetwork


class MyPair(Pair):
    """A small variational autoencoder over pixels that are 0 or 1."""

    # Arguments with a default can be set from the command line: --set latent_dim=2
    def __init__(self, data_dim, latent_dim=4, hidden_dim=100):
        super().__init__()
        self.data_dim, self.latent_dim = data_dim, latent_dim
        # Networks return distributions: z -> Bernoulli(x), x -> Normal(z).
        self.decoder = BernoulliNetwork(latent_dim, [hidden_dim], data_dim)
        self.encoder = NormalNetwork(data_dim, [hidden_dim], latent_dim)

    # The generative story, p(x, z). x: (batch, data_dim).
    def model(self, x):
        with pyro.plate("data", len(x)):  # one plate over the batch, always named "data"
            z = pyro.sample("z", dist.Normal(x.new_zeros(self.latent_dim), 1.0).to_event(1))
            pyro.sample("x", self.decoder(z), obs=x)

    # The approximate posterior, q(z | x): samples every latent of the model, under the same name.
    def guide(self, x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", self.encoder(x))

    # Optional: called once with the training data before the first step.
    def initialize(self, x):
        self.decoder.initialize(x)  # pixels start at their mean
'''
