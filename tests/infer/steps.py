"""Small pairs, and runs that are compared: eager and recorded, at equal noise."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor, nn

from pyrovae import Pair
from pyrovae.infer import SVI, Trace_ELBO
from pyrovae.models import VAE

Setup = Callable[[], tuple[Pair, Any]]


def batches(number: int = 6, size: int = 8) -> Tensor:
    return torch.rand(number, size, 4, generator=torch.Generator().manual_seed(1)).round()


def vae() -> VAE:
    torch.manual_seed(0)
    return VAE(4, 2, hidden_dims=(5,))


class Plain(Pair):
    """Without latents: a location, and a scale that is an argument."""

    def __init__(self) -> None:
        super().__init__()
        self.loc = nn.Parameter(torch.zeros(4))

    def model(self, x: Tensor, scale: Any = 1.0) -> None:
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Normal(self.loc, scale).to_event(1), obs=x)

    def guide(self, x: Tensor, scale: Any = 1.0) -> None: ...


class Odd(Pair):
    """A VAE whose guide computes its scale in a way of its own."""

    def __init__(self, scale: Callable[[Any, Tensor], Any]) -> None:
        super().__init__()
        self._scale, self.count = (scale,), 0
        self.loc = nn.Parameter(torch.zeros(4))
        self.register_buffer("average", torch.zeros(()))
        self.table = nn.Embedding.from_pretrained(torch.ones(4, 4))

    def counted(self) -> int:
        self.count += 1
        return self.count

    def model(self, x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(4), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(z, 1.0).to_event(1), obs=x)

    def guide(self, x: Tensor) -> None:
        scale = self._scale[0](self, x)
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(self.loc + x, scale).to_event(1))


def sgd(pair: Pair, lr: float = 0.01) -> torch.optim.Optimizer:
    return torch.optim.SGD(pair.parameters(), lr=lr)


def adam(pair: Pair, **options: Any) -> torch.optim.Optimizer:
    return torch.optim.Adam(pair.parameters(), **{"lr": 0.01, **options})


def vae_and_adam() -> tuple[Pair, Any]:
    pair = vae()
    return pair, adam(pair)


def run(
    setup: Setup,
    backend: str,
    calls: Iterable[Any] | None = None,
    *,
    loss: Callable[[], Any] = Trace_ELBO,
    act: Callable[[int, SVI, Any], None] = lambda step, svi, pair: None,
    **options: Any,
) -> tuple[Tensor, dict[str, Tensor], SVI]:
    """Losses of steps at fixed noise and the state that they lead to; ``act`` is done before each step. A call is a
    batch, or a tuple of positional or a dict of named arguments.
    """
    pair, optim = setup()
    svi = SVI(pair.model, pair.guide, optim, loss(), backend=backend, **options)
    torch.manual_seed(7)
    losses = []
    for step, args in enumerate(batches() if calls is None else calls):
        act(step, svi, pair)
        if isinstance(args, dict):
            losses.append(svi.step(**args))
        else:
            losses.append(svi.step(*args) if isinstance(args, tuple) else svi.step(args))
    return torch.stack(losses), {name: value.clone() for name, value in pair.state_dict().items()}, svi


def assert_same_run(
    setup: Setup, calls: Iterable[Any] | None = None, *, backend: str = "compiled", **options: Any
) -> SVI:
    """A recorded run equals an eager one to rounding. Returns the recorded one."""
    calls = list(batches() if calls is None else calls)
    eager, mine = run(setup, "eager", calls, **options), run(setup, backend, calls, **options)
    torch.testing.assert_close(mine[:2], eager[:2], rtol=2e-5, atol=2e-6)
    return mine[2]


def store() -> dict[str, Tensor]:
    """The values in Pyro's store of parameters."""
    return {name: value.detach().clone() for name, value in pyro.get_param_store().items()}
