"""Adam as tensor operations, so that a record holds the update too."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim import Adam, AdamW, Optimizer
from torch.optim.optimizer import _global_optimizer_post_hooks, _global_optimizer_pre_hooks

__all__ = ["AdamOperations", "steps_by_itself"]


class AdamOperations:
    """Update of a ``torch.optim.Adam`` or ``AdamW`` (Kingma and Ba 2015; Loshchilov and Hutter 2019).

    It works on the optimizer's own state tensors, so that ``state_dict`` and checkpoints stay as they are. Betas, ε,
    weight decay and the like are fixed in a record; learning rates are tensors, which follow the optimizer's.
    """

    def __init__(self, optimizer: Optimizer, params: Sequence[Tensor]) -> None:
        self._optimizer, self._params = optimizer, list(params)
        self._decoupled = isinstance(optimizer, AdamW)
        of_param = {id(p): i for i, group in enumerate(optimizer.param_groups) for p in group["params"]}
        groups, device = optimizer.param_groups, self._params[0].device
        self._group_of = [of_param[id(p)] for p in params]
        self._rates: list[Any] = [None] * len(groups)
        self._rate_tensors = [torch.zeros((), dtype=torch.float64, device=device) for _ in groups]
        self._constants = [
            torch.tensor(
                [[math.log(max(beta, 1e-300)) for beta in group["betas"]], [1.0, 0.5]], dtype=torch.float64
            ).to(device)
            for group in groups
        ]

    @staticmethod
    def can_replace(optimizer: Optimizer) -> bool:
        """Return whether the operations do all that the optimizer's own step would."""
        if type(optimizer) not in (Adam, AdamW) or steps_by_itself(optimizer):
            return False
        return not any(group["amsgrad"] or group["differentiable"] for group in optimizer.param_groups)

    def tensors(self) -> list[Tensor]:
        """List the groups' learning rates and constants, then (mean, mean of squares, step) of each parameter."""
        state, groups = self._optimizer.state, self._optimizer.param_groups  # others after ``load_state_dict``
        for index, group in enumerate(groups):
            rate = group["lr"]
            if isinstance(rate, Tensor) or rate is not self._rates[index]:
                self._rate_tensors[index].fill_(rate)
                self._rates[index] = rate
        found = [*self._rate_tensors, *self._constants]
        for param, index in zip(self._params, self._group_of, strict=True):
            entry = state[param]
            if not entry:
                entry.update(_new_state(param, groups[index]))
            found += (entry["exp_avg"], entry["exp_avg_sq"], entry["step"])
        return found

    def update(self, params: Sequence[Tensor], gradients: Sequence[Tensor], tensors: Sequence[Tensor]) -> None:
        """Move ``params`` in place, and ``tensors``, which are like those of :meth:`tensors`."""
        groups = self._optimizer.param_groups
        moments = iter(tensors[2 * len(groups) :])
        for param, gradient, index in zip(params, gradients, self._group_of, strict=True):
            rate, constants, group = tensors[index], tensors[len(groups) + index], groups[index]
            mean, square, step = next(moments), next(moments), next(moments)
            beta1, beta2 = group["betas"]
            gradient = -gradient if group["maximize"] else gradient
            if group["weight_decay"] and (self._decoupled or group.get("decoupled_weight_decay")):
                param.mul_((1 - rate * group["weight_decay"]).to(param.dtype))
            elif group["weight_decay"]:
                gradient = gradient + group["weight_decay"] * param
            step.add_(1)
            mean.lerp_(gradient, 1 - beta1)
            square.mul_(beta2).addcmul_(gradient, gradient, value=1 - beta2)
            # 1 / (1 − β₁ⁿ) and 1 / √(1 − β₂ⁿ), as exponentials that are used twice: these the compiler keeps in memory,
            # where it would compute powers and roots again for each few elements. Float32 would lose four digits.
            correction = torch.exp(-constants[1] * torch.log1p(-torch.exp(step.double() * constants[0])))
            size, root = (rate * correction[0]).to(param.dtype), correction[1].to(param.dtype)
            param.sub_(size * mean / (square.sqrt() * root + group["eps"]))


def steps_by_itself(optimizer: Optimizer) -> bool:
    """Return whether the optimizer has hooks, or a step of its own, as a scheduler gives it one."""
    hooks = optimizer._optimizer_step_pre_hooks or optimizer._optimizer_step_post_hooks
    return bool(hooks or _global_optimizer_pre_hooks or _global_optimizer_post_hooks or "step" in vars(optimizer))


def _new_state(param: Tensor, group: dict[str, Any]) -> dict[str, Tensor]:
    """Make the state of a parameter as torch's first step does."""
    device = param.device if group["fused"] or group["capturable"] else None
    kind = torch.float64 if torch.get_default_dtype() is torch.float64 and not group["fused"] else torch.float32
    moments = {name: torch.zeros_like(param, memory_format=torch.preserve_format) for name in ("exp_avg", "exp_avg_sq")}
    return {"step": torch.zeros((), dtype=kind, device=device), **moments}
