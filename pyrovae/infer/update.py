"""The optimizer's update after a recorded gradient, without the optimizer's Python where that is possible."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from pyro.optim import PyroOptim
from torch import Tensor
from torch.optim import Adam, AdamW, Optimizer

__all__ = ["Update"]


class Update:
    """``update(parameters, gradients)`` is one step of ``optim``.

    For fused Adam and AdamW it calls torch's kernel itself: ``Optimizer.step`` spends as long in Python as the kernel
    takes for a small network. State and hyperparameters stay the optimizer's own, read anew at each call. A
    ``pyro.optim`` optimizer, one object for each parameter, becomes one ``torch.optim`` optimizer that shares their
    state.
    """

    def __init__(self, optim: Any, params: Sequence[Tensor]) -> None:
        self._params = list(params)
        self._pyro = None
        if isinstance(optim, PyroOptim):
            merged = _merged(optim, self._params)
            self._pyro, optim = (optim, None) if merged is None else (None, merged)
        self._optimizer: Optimizer | None = optim
        self._lists: tuple[list[Tensor], ...] | None = None

    @property
    def is_capturable(self) -> bool:
        """Whether it can become part of a CUDA graph."""
        groups = [] if self._optimizer is None else self._optimizer.param_groups
        return bool(groups) and all(group.get("capturable") for group in groups)

    def __call__(self, params: Sequence[Tensor], gradients: Sequence[Tensor]) -> None:
        if self._is_fused_adam() and self._fused_adam(params, gradients):
            return
        for param, gradient in zip(params, gradients, strict=True):
            param.grad = gradient
        if self._optimizer is not None:
            self._optimizer.step()
        elif self._pyro is not None:
            self._pyro(self._params)
        for param in params:
            param.grad = None

    def _is_fused_adam(self) -> bool:
        optimizer = self._optimizer
        if type(optimizer) not in (Adam, AdamW) or not hasattr(torch, "_fused_adam_"):
            return False
        assert optimizer is not None
        groups = optimizer.param_groups
        hooks = optimizer._optimizer_step_pre_hooks or optimizer._optimizer_step_post_hooks
        return len(groups) == 1 and bool(groups[0].get("fused")) and not groups[0]["amsgrad"] and not hooks

    def _fused_adam(self, params: Sequence[Tensor], gradients: Sequence[Tensor]) -> bool:
        """False where the optimizer has no state yet: its own first step makes it."""
        assert self._optimizer is not None
        state, group = self._optimizer.state, self._optimizer.param_groups[0]
        if any(param not in state for param in params[:1]) or len(state) < len(params):
            return False
        # Loading a state dict replaces the tensors.
        if self._lists is None or self._lists[0][0] is not state[params[0]]["exp_avg"]:
            self._lists = tuple([state[p][key] for p in params] for key in ("exp_avg", "exp_avg_sq", "step"))
        means, squares, steps = self._lists
        with torch.no_grad():
            torch._foreach_add_(steps, 1)
            (torch._fused_adamw_ if _decouples(self._optimizer) else torch._fused_adam_)(
                list(params),
                list(gradients),
                means,
                squares,
                [],
                steps,
                lr=group["lr"],
                beta1=group["betas"][0],
                beta2=group["betas"][1],
                weight_decay=group["weight_decay"],
                eps=group["eps"],
                amsgrad=False,
                maximize=group["maximize"],
            )
        return True


def _decouples(optimizer: Optimizer) -> bool:
    return isinstance(optimizer, AdamW) or bool(optimizer.param_groups[0].get("decoupled_weight_decay"))


def _merged(optim: PyroOptim, params: list[Tensor]) -> Optimizer | None:
    """One optimizer with the constructor, arguments and state of the many; None where they differ or clip gradients."""
    if type(optim) is not PyroOptim or callable(optim.pt_optim_args) or optim.pt_clip_args:
        return None
    constructor: Any = optim.pt_optim_constructor
    options = dict(optim.pt_optim_args)
    if constructor in (Adam, AdamW) and not options.get("amsgrad"):
        options.setdefault("fused", True)
    merged = constructor(params, **options)
    for param in params:
        if param in optim.optim_objs:
            merged.state[param] = optim.optim_objs[param].state[param]
    return merged
