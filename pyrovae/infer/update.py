"""The optimizer's update after a recorded gradient, without the optimizer's Python where that is possible."""

from __future__ import annotations

from collections.abc import Sequence
from operator import itemgetter
from typing import Any

import torch
from pyro.optim import PyroOptim
from torch import Tensor
from torch.optim import Adam, AdamW, Optimizer

from pyrovae.infer.snapshot import same_objects

__all__ = ["Update"]

_ADAM_STATE = itemgetter("exp_avg", "exp_avg_sq", "step")


class Update:
    """``update(parameters, gradients)`` is one step of ``optim``.

    For fused Adam and AdamW it calls torch's kernel itself: ``Optimizer.step`` spends as long in Python as the kernel
    takes for a small network. State and hyperparameters stay the optimizer's own, read anew at each call. A
    ``pyro.optim`` optimizer, one object for each parameter, becomes one ``torch.optim`` optimizer that shares their
    state.
    """

    def __init__(self, optim: Any, params: Sequence[Tensor]) -> None:
        self._params = list(params)
        self._pyro = optim if isinstance(optim, PyroOptim) else None
        self._optimizer: Optimizer | None = optim if self._pyro is None else _merged(optim, self._params)
        self._tensors: list[Tensor] = []
        self._ones: dict[Any, Tensor] = {}  # kept: a CUDA graph goes on reading them

    @property
    def is_capturable(self) -> bool:
        """Whether it can become part of a CUDA graph, learning rate included."""
        groups = [] if self._optimizer is None else self._optimizer.param_groups
        return bool(groups) and all(
            group.get("capturable") and isinstance(group["lr"], Tensor) and group["lr"].is_cuda for group in groups
        )

    def fixed(self) -> list[Any]:
        """The objects that a CUDA graph of it goes on using: state, tensors, Python numbers."""
        assert self._optimizer is not None
        state, groups = self._optimizer.state, self._optimizer.param_groups
        values = [value for holder in (*groups, *state.values()) for value in holder.values()]
        return [state, *groups, *values]

    def __call__(self, params: Sequence[Tensor], gradients: Sequence[Tensor]) -> None:
        if self._pyro is not None and self._optimizer is not None:
            self._follow_rate(self._pyro, self._optimizer)
        if params and self._is_fused_adam() and self._fused_adam(params, gradients):
            return
        if self._optimizer is not None:
            self._optimizer.zero_grad()
        for param, gradient in zip(params, gradients, strict=True):
            param.grad = gradient
        if self._optimizer is not None:
            self._optimizer.step()
        elif self._pyro is not None:
            self._pyro(self._params)
        for param in params:
            param.grad = None

    def _follow_rate(self, many: PyroOptim, merged: Optimizer) -> None:
        """Read the learning rate of the many; where they have come to differ, they go on as they are."""
        group = merged.param_groups[0]
        rates = [many.optim_objs[param].param_groups[0]["lr"] for param in group["params"]]
        group["lr"] = rates[0]
        if any(rate != rates[0] for rate in rates):
            self._optimizer = None

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
        group = self._optimizer.param_groups[0]
        entries = [self._optimizer.state.get(param, {}) for param in params]
        if not all("exp_avg" in entry for entry in entries):
            return False
        # Looked up at each step: another program may use other parameters, and loading a state dict replaces tensors.
        tensors = [tensor for entry in entries for tensor in _ADAM_STATE(entry)]
        means, squares, steps = tensors[0::3], tensors[1::3], tensors[2::3]
        if not same_objects(tensors, self._tensors):
            if len({(param.dtype, param.device) for param in params}) > 1:
                return False
            self._tensors = tensors
        # Learning-rate schedulers warn unless the optimizer's own step was called.
        self._optimizer._opt_called = True  # type: ignore[attr-defined]
        kind = steps[0].device, steps[0].dtype
        if kind not in self._ones:
            self._ones[kind] = torch.ones_like(steps[0])
        with torch.no_grad():
            torch._foreach_add_(steps, [self._ones[kind]] * len(steps))  # a Python number takes twice as long
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
    """One optimizer with the constructor, arguments and state of the many; None where they differ, clip gradients or
    change their own options."""
    constructor: Any = optim.pt_optim_constructor
    plain = type(optim) is PyroOptim and constructor.__module__.startswith("torch.optim")
    if not plain or callable(optim.pt_optim_args) or optim.pt_clip_args:
        return None
    if not all(param in optim.optim_objs for param in params):
        return None
    options = dict(optim.pt_optim_args)
    if constructor in (Adam, AdamW) and options.keys() <= {"lr", "betas", "eps", "weight_decay", "maximize"}:
        options["fused"] = True
    merged = constructor(params, **options)
    for param in params:
        merged.state[param] = state = optim.optim_objs[param].state[param]
        if options.get("fused") and "step" in state:  # which fused kernels want beside the parameter
            state["step"] = state["step"].to(param.device, torch.float32)
    return merged
