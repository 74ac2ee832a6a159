"""Pairs: a generative model and its guide, with the parameters of both."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from functools import wraps
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import pyro
import torch
from pyro import poutine
from pyro.nn import PyroModule
from pyro.params.param_store import _MODULE_NAMESPACE_DIVIDER
from pyro.poutine.messenger import Messenger
from pyro.poutine.runtime import _PYRO_STACK, effectful
from pyro.poutine.trace_messenger import TraceMessenger
from torch import Tensor, nn
from torch.distributions import transform_to

if TYPE_CHECKING:
    from pyro.infer import ELBO
    from torch.distributions import Distribution

__all__ = ["FunctionPair", "Pair", "local_params"]


def local_params() -> AbstractContextManager[None]:
    """Keep module parameters in their modules, out of Pyro's process-wide parameter store."""
    return pyro.settings.context(module_local_params=True)


def _pyro_effects(method: Callable) -> Callable:
    """Wrap a model or guide so that Pyro sees its parameters and its ``PyroSample`` attributes.

    Stock ``pyro.infer.SVI`` collects parameters from their ``param`` messages. Without such a collector, attributes are
    read as in any ``nn.Module``.
    """

    @wraps(method)
    def wrapper(self: Pair, *args: Any, **kwargs: Any) -> Any:
        if any(isinstance(handler, TraceMessenger) and handler.param_only for handler in _PYRO_STACK):
            self._announce_parameters()
        if not self._has_pyro_attributes():
            return method(self, *args, **kwargs)
        # PyroModules would also announce their parameters, in a form that stock SVI cannot read with local_params.
        with poutine.block(hide_types=["param"]), local_params(), self._pyro_context:
            return method(self, *args, **kwargs)

    return wrapper


class Pair(PyroModule):
    """Generative model p(x, z) and guide q(z | x), written as ordinary Pyro functions.

    Subclasses write two methods of a batch ``x`` of shape (batch, data_dim):

    - ``model(x)`` opens one plate named ``data`` over the batch, samples the latents and observes ``x``;
    - ``guide(x)`` opens the same plate and samples every latent of the model, except those that the model
      marks ``infer={"enumerate": "parallel"}`` for exact enumeration.

    Per-datum sites live inside the plate, global latents outside it. There is no mini-batch scale in a pair:
    the objective scales. Parameters are ``nn.Parameter``, ``PyroParam`` or submodules, so ``state_dict()``
    is the whole state and two instances share nothing.

    Optional, used when a subclass defines them:

    - ``initialize(x)``: sets a start that depends on the data; :func:`pyrovae.fit` calls it once, before training;
    - ``log_prob(x)``: the exact log evidence log p(x), shape (batch,), nats;
    - ``posterior(x)``: the exact posterior p(z | x), a distribution with batch shape (batch,);
    - ``expected_statistics(x)`` and ``maximize(statistics)``: one EM iteration, see :func:`pyrovae.fit_em`;
    - ``num_parameters``: the number of the model's free parameters, which BIC and AIC count;
    - ``default_loss()``: the objective that :func:`pyrovae.fit` uses when none is named, in place of ``Trace_ELBO``.
    """

    data_dim: int
    """Number of features of a datum. Where a pair sets it, data are checked against it."""

    default_lr: ClassVar[float] = 3e-3
    """Learning rate with which :func:`pyrovae.fit` starts where it is given none."""

    initialize: ClassVar[Callable[..., None] | None] = None
    log_prob: ClassVar[Callable[..., Tensor] | None] = None
    posterior: ClassVar[Callable[..., Distribution] | None] = None
    expected_statistics: ClassVar[Callable[..., dict[str, Tensor]] | None] = None
    maximize: ClassVar[Callable[..., None] | None] = None
    default_loss: ClassVar[Callable[..., ELBO] | None] = None

    def __init__(self) -> None:
        with local_params():
            super().__init__()

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        for name in ("model", "guide"):
            if name in cls.__dict__:
                setattr(cls, name, _pyro_effects(cls.__dict__[name]))

    def model(self, x: Tensor) -> Any:
        """Sample the latents and observe ``x``: the joint density p(x, z)."""
        raise NotImplementedError(f"{type(self).__name__} has no model: write `def model(self, x)`.")

    def guide(self, x: Tensor) -> Any:
        """Sample the latents from q(z | x). The default samples none, for models whose latents are all enumerated."""

    def save(self, path: str | Path) -> None:
        """Write every parameter and buffer to a ``.safetensors`` file."""
        from safetensors.torch import save_file

        save_file({k: v.detach().cpu().contiguous().clone() for k, v in self.state_dict().items()}, path)

    def load(self, path: str | Path) -> None:
        """Read the file that :meth:`save` wrote. Nothing is unpickled.

        Raises:
            FileNotFoundError: there is no such file.
            ValueError: the file is damaged, is a checkpoint of training, or holds another pair's weights.
        """
        from safetensors import SafetensorError, safe_open
        from safetensors.torch import load_file

        if not Path(path).is_file():
            raise FileNotFoundError(f"path: expected a .safetensors file, found none at {path}")
        before = {name: value.clone() for name, value in self.state_dict().items()}
        try:
            with safe_open(path, framework="pt") as file:
                is_checkpoint = "pyrovae_state" in (file.metadata() or {})
            if is_checkpoint:
                raise ValueError(
                    f"path: expected weights that Pair.save wrote; {path} is a training checkpoint. Pass it to fit, "
                    "with the pair and the data of its run: "
                    f"pyrovae.fit(pair, x, checkpoint={str(path)!r}, resume=True)."
                )
            self.load_state_dict(load_file(path))
        except SafetensorError as error:
            raise ValueError(f"path: {path} is not a readable .safetensors file ({error}).") from error
        except RuntimeError as error:
            self.load_state_dict(before, strict=False)  # torch has copied the tensors that fit
            raise ValueError(
                f"path: {path} does not hold the weights of this {type(self).__name__}. Build the pair with the "
                f"options it was saved with. Details: {error}"
            ) from error

    def _announce_parameters(self) -> None:
        for name, parameter in self.named_parameters():
            value = parameter.view_as(parameter)
            value.unconstrained = lambda parameter=parameter: parameter  # type: ignore[attr-defined]
            effectful(type="param")(lambda *_, value=value, **__: value)(
                name, value, constraint=torch.distributions.constraints.real, name=name
            )

    def _has_pyro_attributes(self) -> bool:
        """Return whether there are random attributes, or submodules that would use Pyro's parameter store."""
        return bool(self._pyro_samples) or any(isinstance(m, PyroModule) for m in self.modules() if m is not self)


class FunctionPair(Pair):
    """Pair of two plain Pyro functions that name their parameters with ``pyro.param`` or ``pyro.module``.

    The parameters live in this object and not in Pyro's global store, so two ``FunctionPair`` of the same functions are
    independent. Only modules that the functions register with ``pyro.module`` are shared: they belong to the caller.
    A parameter appears when the functions first run.
    """

    def __init__(self, model_function: Callable, guide_function: Callable) -> None:
        super().__init__()
        for name, function in (("model_function", model_function), ("guide_function", guide_function)):
            if isinstance(function, PyroModule):
                raise TypeError(
                    f"{name}: expected a plain function; got the module {type(function).__name__}, whose parameters "
                    "FunctionPair cannot own. Make it an attribute of a Pair, and call it in the pair's model or guide."
                )
        self._functions = (model_function, guide_function)
        self._own_params = _OwnParams(self)
        self.params = nn.ParameterDict()

    def model(self, *args: Any, **kwargs: Any) -> Any:
        with self._own_params:
            return self._functions[0](*args, **kwargs)

    def guide(self, *args: Any, **kwargs: Any) -> Any:
        with self._own_params:
            return self._functions[1](*args, **kwargs)

    def _load_from_state_dict(self, state_dict: dict[str, Tensor], prefix: str, *args: Any) -> None:
        if not self.params:  # they appear in the first run, and none was yet
            for key, value in state_dict.items():
                if key.startswith(f"{prefix}params."):
                    self.params[key.removeprefix(f"{prefix}params.")] = nn.Parameter(torch.empty_like(value))
        super()._load_from_state_dict(state_dict, prefix, *args)


class _OwnParams(Messenger):
    """Handler that answers ``param`` messages with the parameters of one :class:`FunctionPair`."""

    def __init__(self, owner: FunctionPair) -> None:
        super().__init__()
        self._owner = owner

    def _pyro_param(self, msg: Any) -> None:
        owner = self._owner
        name = msg["name"].replace(".", "/")  # a dot would nest modules
        transform = transform_to(msg["kwargs"].get("constraint", torch.distributions.constraints.real))
        start: Any = msg["args"][1] if len(msg["args"]) > 1 else None
        if _MODULE_NAMESPACE_DIVIDER in name:  # of pyro.module, whose module keeps using its own parameter
            if name in owner.params and owner.params[name] is not start:  # loaded before the first run
                start.data.copy_(owner.params[name].data)
            owner.params[name] = start
        elif name not in owner.params:
            if start is None:
                raise ValueError(f"pyro.param({msg['name']!r}) has no initial value: pass one at its first use.")
            start = start() if callable(start) else start
            owner.params[name] = nn.Parameter(transform.inv(start.detach()).clone())
        unconstrained = owner.params[name]
        value = transform(unconstrained)
        value.unconstrained = lambda: unconstrained
        msg["value"] = value
        msg["done"] = True
