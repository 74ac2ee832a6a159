"""Stochastic variational inference: one step is loss, gradient, update."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from pyro import poutine
from pyro.infer import ELBO
from pyro.optim import PyroOptim
from pyro.poutine.messenger import Messenger
from torch import Tensor
from torch.optim import Optimizer

__all__ = ["SVI", "DatasetSize"]


class SVI:
    """A drop-in for ``pyro.infer.SVI`` that also takes the optimizers of ``torch.optim``.

    Args:
        model, guide: a pair's two functions, or any two Pyro functions.
        optim: a ``torch.optim`` optimizer of the pair's parameters; a function that makes one of a list of parameters
            (called at the first step, with the parameters that the first run named); or a ``pyro.optim`` optimizer.
        loss: a loss of :mod:`pyrovae.infer`, or one of Pyro's.

    ``step`` returns the loss as a scalar tensor, not a float: reading it is what would wait for the device.
    """

    def __init__(
        self,
        model: Callable,
        guide: Callable,
        optim: Optimizer | PyroOptim | Callable[[list[Tensor]], Optimizer],
        loss: ELBO,
    ) -> None:
        if not (isinstance(optim, Optimizer) or callable(optim)):
            raise TypeError(
                f"optim: expected a torch.optim or pyro.optim optimizer, or a function that makes one of a list of "
                f"parameters; got {type(optim).__name__}."
            )
        if isinstance(loss, type) or not hasattr(loss, "loss_and_grads"):
            raise TypeError(f"loss: expected a loss such as Trace_ELBO(); got {loss!r}.")
        self.model, self.guide, self.optim = model, guide, optim
        self.loss: Any = loss

    def step(self, *args: Any, **kwargs: Any) -> Tensor:
        """One update on one batch. Returns the loss before it, nats, a scalar tensor without gradient."""
        if isinstance(self.optim, Optimizer):
            self.optim.zero_grad(set_to_none=True)
        if isinstance(self.optim, Optimizer) and hasattr(self.loss, "_bound"):
            loss = self.loss.loss_and_grads(self.model, self.guide, *args, **kwargs)
            self.optim.step()
            self.optim.zero_grad(set_to_none=True)
            return loss
        # Parameters are those that this run names, as in Pyro.
        with poutine.trace(param_only=True) as captured:
            loss = self.loss.loss_and_grads(self.model, self.guide, *args, **kwargs)
        named: list[Any] = [site["value"] for site in captured.trace.nodes.values()]
        params = list(dict.fromkeys(v.unconstrained() if hasattr(v, "unconstrained") else v for v in named))
        if not isinstance(self.optim, Optimizer | PyroOptim):
            self.optim = self.optim(params)
        if isinstance(self.optim, PyroOptim):
            self.optim(params)
        else:
            self.optim.step()
        for param in params:
            param.grad = None
        return torch.as_tensor(loss)

    def evaluate_loss(self, *args: Any, **kwargs: Any) -> Tensor:
        """The loss on one batch, without an update."""
        with torch.no_grad():
            return torch.as_tensor(self.loss.loss(self.model, self.guide, *args, **kwargs))


class DatasetSize(Messenger):
    """Tells the sites inside the plate ``data`` how many data there are, as ``pyro.plate(..., subsample_size=)`` would.

    A pair opens its plate over the batch it is given. Under this handler the plate counts as a subsample of ``size``
    data, so every objective weighs the sites inside by dataset / batch against global latents outside.
    """

    def __init__(self, size: int) -> None:
        super().__init__()
        self.size = size

    def _pyro_sample(self, msg: Any) -> None:
        for frame in msg["cond_indep_stack"]:
            if frame.name == "data" and frame.full_size in (None, frame.size):
                msg["scale"] = msg["scale"] * (self.size / frame.size)
        msg["cond_indep_stack"] = tuple(
            frame._replace(full_size=self.size) if frame.name == "data" else frame for frame in msg["cond_indep_stack"]
        )
