"""The optimizer's update after a recorded gradient, without the optimizer's Python where that is possible."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import chain, repeat
from operator import contains, itemgetter
from typing import Any

import torch
from pyro.optim import PyroOptim
from torch import Tensor
from torch.optim import Adam, AdamW, Optimizer
from torch.optim import optimizer as optimizer_module

from pyrovae.infer.snapshot import same_objects

__all__ = ["Update"]

_ADAM_STATE = itemgetter("exp_avg", "exp_avg_sq", "step")
_KERNELS = ("_fused_adam_", "_fused_adamw_")
_ALL_OPTIMIZERS_HOOKS: list[dict[int, Callable]] = [
    getattr(optimizer_module, name, {0: lambda: None})  # where torch has them elsewhere, there may be some
    for name in ("_global_optimizer_pre_hooks", "_global_optimizer_post_hooks")
]
_HOOKS = itemgetter("_optimizer_step_pre_hooks", "_optimizer_step_post_hooks")
_ATTRIBUTES: Callable[[Any], dict[str, Any]] = vars
_STATE, _GROUPS = itemgetter("state"), itemgetter("param_groups")


class Update:
    """``update(parameters, gradients)`` is one step of ``optim``.

    For fused Adam and AdamW it calls torch's kernel itself: ``Optimizer.step`` spends as long in Python as the kernel
    takes for a small network. State and hyperparameters stay the optimizer's own, read anew at each call; one that has
    hooks, or another ``step`` than torch's, takes its step itself. A ``pyro.optim`` optimizer, one object for each
    parameter, becomes one ``torch.optim`` optimizer that shares their state, for as long as they would do the same.
    """

    def __init__(self, optim: Any, params: Sequence[Tensor]) -> None:
        self._params = list(params)
        self._pyro = optim if isinstance(optim, PyroOptim) else None
        self._many = None if self._pyro is None else _many(self._pyro, self._params)
        self._optimizer: Optimizer | None = optim if self._pyro is None else None
        self._torchs_step: Any = None
        self._tensors: list[Tensor] = []
        self._ones: dict[Any, Tensor] = {}  # kept: a CUDA graph goes on reading them
        self._follow_the_many()

    @property
    def is_capturable(self) -> bool:
        """Whether it can become part of a CUDA graph, learning rate included."""
        groups = [] if self._optimizer is None else self._optimizer.param_groups
        return bool(groups) and all(
            group.get("capturable") and isinstance(group["lr"], Tensor) and group["lr"].is_cuda for group in groups
        )

    def fixed(self) -> list[Any]:
        """The objects that a CUDA graph of it goes on using: state, tensors, Python numbers, hooks, its step. Nothing
        where the objects of ``pyro.optim`` go on as they are."""
        self._follow_the_many()
        optimizer = self._optimizer
        if optimizer is None:
            return []
        state, groups = optimizer.state, optimizer.param_groups
        values = [value for holder in (*groups, *state.values()) for value in holder.values()]
        return [state, *groups, *values, _step(optimizer), *_hooks(optimizer)]

    def __call__(self, params: Sequence[Tensor], gradients: Sequence[Tensor]) -> None:
        self._follow_the_many()
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

    def _follow_the_many(self) -> None:
        if self._many is not None:
            self._optimizer = self._many.as_one()

    def _is_fused_adam(self) -> bool:
        optimizer = self._optimizer
        if type(optimizer) not in (Adam, AdamW) or not all(hasattr(torch, name) for name in _KERNELS):
            return False
        assert optimizer is not None
        groups = optimizer.param_groups
        if len(groups) != 1 or not groups[0].get("fused") or groups[0]["amsgrad"]:
            return False
        hooks = optimizer._optimizer_step_pre_hooks or optimizer._optimizer_step_post_hooks
        if hooks or any(_ALL_OPTIMIZERS_HOOKS):
            return False
        step = _step(optimizer)
        if step is not self._torchs_step and _is_torchs(step):
            self._torchs_step = step
        return step is self._torchs_step

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


def _step(optimizer: Optimizer) -> Any:
    """The function that its steps call: its own, where somebody gave it one, or its class's."""
    return vars(optimizer).get("step") or type(optimizer).step


def _is_torchs(function: Any) -> bool:
    """Whether torch wrote the function, and all that it wraps: every optimizer's step is wrapped, and learning-rate
    schedulers wrap it once more."""
    while function is not None:
        if getattr(function, "__globals__", {}).get("__name__", "").partition(".")[0] != "torch":
            return False
        function = getattr(function, "__wrapped__", None)
    return True


def _hooks(optimizer: Optimizer) -> list[Callable]:
    """What runs before and after its steps."""
    holders = *_HOOKS(vars(optimizer)), *_ALL_OPTIMIZERS_HOOKS
    return [hook for holder in holders for hook in holder.values()]


def _many(optim: PyroOptim, params: list[Tensor]) -> _Many | None:
    """None where its objects are not of ``torch.optim``, or not made with the same options."""
    constructor, options = optim.pt_optim_constructor, optim.pt_optim_args
    plain = type(optim) is PyroOptim and constructor.__module__.startswith("torch.optim")
    return _Many(optim, params) if plain and params and not callable(options) else None


class _Many:
    """The objects of a ``pyro.optim`` optimizer, each of one parameter, and one optimizer that does what they do.

    Anybody may reach the many, so they are looked at in every step, by iterators rather than loops: ``_attributes``,
    ``_entries`` and ``_groups`` are what they had when ``_one`` last took over their options and state.
    """

    def __init__(self, optim: PyroOptim, params: list[Tensor]) -> None:
        self._optim, self._params = optim, params
        constructor: Any = optim.pt_optim_constructor
        arguments: Any = optim.pt_optim_args
        self._one: Optimizer = constructor(params, **arguments)
        self._options = itemgetter(*self._one.defaults)
        self._attributes: list[dict[str, Any]] = []
        self._hooks: list[dict[int, Callable]] = []
        self._entries: list[dict[str, Any]] = []
        self._groups: list[list[dict[str, Any]]] = []
        self._agree = False

    def as_one(self) -> Optimizer | None:
        """None where they differ, or do more than to step: then they go on as they are."""
        attributes: list[dict[str, Any]] = list(map(_ATTRIBUTES, self._optim.optim_objs.values()))
        if not same_objects(attributes, self._attributes):
            self._meet(attributes)
        if not self._attributes or self._do_more():
            self._agree, self._groups = False, []
            return None
        known = same_objects(_entries(attributes), self._entries)
        if not known or self._have_other_options():
            self._agree = self._take_over(with_state=not (known and self._agree))
            self._entries = _entries(attributes)
            self._groups = [list(map(dict, groups)) for groups in map(_GROUPS, attributes)]
        return self._one if self._agree else None

    def _meet(self, attributes: list[dict[str, Any]]) -> None:
        are_plain = set(map(type, self._optim.optim_objs.values())) == {type(self._one)}
        self._attributes = attributes if are_plain else []
        self._hooks = list(chain.from_iterable(map(_HOOKS, self._attributes)))
        self._agree, self._groups = False, []

    def _do_more(self) -> bool:
        """Hooks, a ``step`` that somebody gave one of them, clipping."""
        if any(_ALL_OPTIMIZERS_HOOKS) or any(self._hooks):
            return True
        return any(map(contains, self._attributes, repeat("step"))) or any(self._optim.grad_clip.values())

    def _have_other_options(self) -> bool:
        try:
            return list(map(_GROUPS, self._attributes)) != self._groups
        except RuntimeError:  # tensors of several numbers are neither equal nor not
            return True

    def _take_over(self, *, with_state: bool) -> bool:
        """Their options and state become the one's; False where they are not alike."""
        many: list[Any] = [self._optim.optim_objs.get(param) for param in self._params]
        if None in many:
            return False
        groups = [group for each in many for group in each.param_groups]
        trained = [param for group in groups for param in group["params"]]
        options = list(map(self._options, groups))
        if len(groups) != len(many) or not same_objects(trained, self._params) or not _are_alike(options):
            return False
        group = self._one.param_groups[0]
        was_fused = group.get("fused")
        group.update(zip(self._one.defaults, options[0], strict=True))
        if type(self._one) in (Adam, AdamW) and _may_be_fused(group):
            group["fused"] = True
        with_state = with_state or group.get("fused") != was_fused
        for each, param in zip(many, self._params, strict=True) if with_state else ():
            self._one.state[param] = state = each.state[param]
            if group.get("fused") and "step" in state:  # which fused kernels want beside the parameter
                state["step"] = state["step"].to(param.device, torch.float32)
        return True


def _entries(attributes: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """What the objects with these attributes keep for each parameter."""
    return list(chain.from_iterable(map(dict.values, map(_STATE, attributes))))


def _are_alike(options: list[tuple]) -> bool:
    """Equal, and a tensor the same one: it may be changed in place."""
    tensors = [index for index, value in enumerate(options[0]) if isinstance(value, Tensor)]
    same = all(each[index] is options[0][index] for index in tensors for each in options)
    return same and options.count(options[0]) == len(options)


def _may_be_fused(group: dict[str, Any]) -> bool:
    """Whether Adam with these options, none of which asks for another kernel, has a fused one."""
    asked = any(group[name] is not None for name in ("fused", "foreach"))
    return not asked and not any(group[name] for name in ("amsgrad", "capturable", "differentiable"))
