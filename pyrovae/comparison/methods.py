"""The methods that train a pair: what it has for them, and how a person names them."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import pyro
import torch
from pyro import poutine
from pyro.infer import ELBO
from pyro.poutine.enum_messenger import EnumMessenger
from torch import Tensor

from pyrovae.checks import check_choice
from pyrovae.infer import LOSSES
from pyrovae.infer.weights import Structure, same_random_state, sample_sites
from pyrovae.pair import Pair

__all__ = [
    "CLOSED_FORM",
    "EM",
    "Method",
    "find_methods",
    "parse_method",
    "samples_latents",
    "split_methods",
    "takes_amortized",
]

CLOSED_FORM, EM, OWN = "closed-form", "EM", "default-loss"
EXACT = {CLOSED_FORM: "closed form", EM: "EM"}
SPECS = (*EXACT, OWN, *LOSSES)


@dataclass(frozen=True)
class Method:
    """One way to train a pair."""

    name: str
    """As tables show it: ``SVI, amortized: VIMCO, K=5``."""

    spec: str
    """As a person asks for it: ``closed-form``, ``EM``, ``default-loss`` or a loss, ``RenyiELBO:K=5,alpha=0.5``."""

    pair_options: dict[str, Any] = field(default_factory=dict)
    """What the pair is built with for this method: ``{"amortized": True}``."""

    @property
    def uses_svi(self) -> bool:
        return self.spec not in EXACT

    def make_loss(self, pair: Pair) -> ELBO:
        """A new one: a loss remembers the pair that it saw."""
        name, options = _parse(self.spec)
        return pair.default_loss() if name == OWN else LOSSES[name](**options)


def parse_method(spec: str, argument: str = "methods") -> str:
    """``spec`` in its one normal form: ``RenyiELBO:num_particles=5,alpha=0`` is ``RenyiELBO:K=5``.

    Raises:
        TypeError, ValueError: no such method or loss, or an option that it does not take.
    """
    if not isinstance(spec, str):
        raise TypeError(f"{argument}: expected names such as 'EM' or 'RenyiELBO:K=5'; got {spec!r}.")
    name, _, rest = spec.strip().partition(":")
    check_choice(argument, name, SPECS)
    if not rest:
        return name
    known = [
        o for o in ("num_particles", "alpha") if name in LOSSES and o in inspect.signature(LOSSES[name]).parameters
    ]
    given: dict[str, Any] = {}
    for setting in rest.split(","):
        option, equals, text = (part.strip() for part in setting.partition("="))
        option = {"K": "num_particles"}.get(option, option)
        if not equals or option not in known:
            takes = " and ".join({"num_particles": "K"}.get(o, o) for o in known) or "no options"
            raise ValueError(f"{argument}: {name} takes {takes}, as in RenyiELBO:K=5,alpha=0.5; got {setting!r}.")
        try:
            given[option] = (int if option == "num_particles" else float)(text)
        except ValueError:
            kind = "a whole number" if option == "num_particles" else "a number"
            raise ValueError(f"{argument}: expected {kind} in {spec!r}; got {text!r}.") from None
    try:
        LOSSES[name](**given)
    except ValueError as error:
        raise ValueError(f"{argument}: {spec!r}: {error}") from None
    return _normal(name, given)


def split_methods(texts: Iterable[str]) -> list[str]:
    """``["Trace_ELBO,RenyiELBO:K=5,alpha=0.5 EM"]`` as three names: ``alpha=0.5`` belongs to the one before it."""
    found: list[str] = []
    for word in ",".join(texts).replace(" ", ",").split(","):
        if found and "=" in word and ":" not in word:
            found[-1] += f"{',' if ':' in found[-1] else ':'}{word}"
        elif word:
            found.append(word)
    return found


def find_methods(
    variants: Sequence[tuple[dict[str, Any], Pair]], few: Tensor, specs: Sequence[str] = ()
) -> tuple[list[Method], dict[str, str]]:
    """The methods of a pair, in the order that a table shows them; and why each of ``specs`` that finds none does not.

    Args:
        variants: options and the pair that they build: with its amortized guide and without, where it has both.
        few: some data.
        specs: those that are wanted. Empty: the closed form and EM, where the pair has them, and

            - enumeration (``TraceEnum_ELBO``), where the model's latents are summed out;
            - with a discrete guide: its enumeration, the score function (``Trace_ELBO``), VIMCO (``RenyiELBO:K=5``);
            - with a continuous guide: ``Trace_ELBO``, ``TraceMeanField_ELBO`` (analytic KL), ``RenyiELBO:K=5`` and the
              pair's own loss; beside an exact method, that alone.
    """
    plain_options, plain = variants[0]
    exact = [spec for spec in EXACT if _reason_against(spec, plain, few) is None]
    methods = [Method(EXACT[spec], spec, plain_options) for spec in exact if not specs or spec in specs]
    refused = {spec: str(_reason_against(spec, plain, few)) for spec in specs if spec in EXACT and spec not in exact}
    trains: set[str] = set()
    for options, pair in variants:
        look, own = _look(pair, few), _own(pair)
        for wanted in [s for s in specs if s not in EXACT] if specs else look.losses(exact=bool(exact)):
            spec = own if wanted == OWN else wanted
            method = Method(look.name(spec, amortized=bool(options.get("amortized"))), spec, options)
            if not look.samples and len(variants) > 1 and not spec.startswith("TraceEnum_ELBO"):
                continue  # nothing to sample: the amortized variant is meant
            if (reason := _reason_against(spec, pair, few)) is not None:
                refused[wanted] = reason
                continue
            trains.add(wanted)
            methods += [method] if method not in methods else []
    return methods, {spec: reason for spec, reason in refused.items() if spec not in trains}


def _reason_against(spec: str, pair: Pair, few: Tensor) -> str | None:
    """Why a method does not train this pair; None where it does."""
    if spec == CLOSED_FORM:
        return None if hasattr(pair, "fit_closed_form") else "it has no fit_closed_form(x)"
    if spec == EM:
        has = pair.expected_statistics is not None and pair.maximize is not None
        return None if has else "it has no expected_statistics(x) and maximize(statistics)"
    try:
        with same_random_state(), torch.no_grad(), pyro.validation_enabled(False):
            loss: Any = Method("", spec).make_loss(pair)
            loss.loss(pair.model, pair.guide, few)
    except (ValueError, NotImplementedError) as error:
        return str(error).rstrip(".")
    return None


def samples_latents(pair: Pair, few: Tensor) -> bool:
    """Whether the guide samples anything; otherwise every latent is summed out, and the ELBO is the log evidence."""
    return _look(pair, few).samples


def takes_amortized(make: Callable[..., Pair], pair: Pair) -> bool:
    """Whether ``make(amortized=...)`` chooses between two guides of ``pair``."""
    parameters = inspect.signature(make).parameters.values()
    passes_on = any(p.kind is p.VAR_KEYWORD for p in parameters)
    return "amortized" in {p.name for p in parameters} or (
        passes_on and "amortized" in inspect.signature(type(pair)).parameters
    )


@dataclass(frozen=True)
class _Look:
    """What a run of a pair shows of the latents that its guide samples."""

    enumerates: bool
    """The model's own latents are summed out."""
    samples: bool
    discrete: bool
    """Some latent of the guide has no pathwise gradient."""
    enumerable: bool
    """All of those are marked for enumeration."""

    def losses(self, *, exact: bool) -> list[str]:
        if self.enumerates:
            return ["TraceEnum_ELBO"]
        if self.discrete:
            return [*(["TraceEnum_ELBO"] if self.enumerable else []), "Trace_ELBO", "RenyiELBO:K=5"]
        return [OWN] if exact else ["Trace_ELBO", "TraceMeanField_ELBO", "RenyiELBO:K=5", OWN]

    def name(self, spec: str, *, amortized: bool) -> str:
        loss, options = _parse(spec)
        particles, alpha = options.get("num_particles"), options.get("alpha", 0)
        word = loss
        if loss == OWN:
            word = "own loss"
        elif loss == "TraceEnum_ELBO" and (self.enumerates or self.enumerable):
            word = "enumeration"
        elif loss == "Trace_ELBO" and self.discrete:
            word = "score function"
        elif loss == "RenyiELBO":
            particles = particles or 2
            word = "VIMCO" if self.discrete and alpha == 0 else loss
        parts = [f"K={particles}"] if particles else []
        parts += [f"α={alpha:g}"] if alpha else []
        return ", ".join([f"SVI, amortized: {word}" if amortized else f"SVI, {word}", *parts])


def _look(pair: Pair, few: Tensor) -> _Look:
    structure = Structure.of(pair.model, pair.guide, (few,), {})
    enumerate_sites = EnumMessenger(first_available_dim=-1 - structure.max_plate_nesting)  # some mark only when asked
    with same_random_state(), torch.no_grad(), pyro.validation_enabled(False), enumerate_sites:
        sites = list(sample_sites(poutine.trace(pair.guide).get_trace(few)).values())
    discrete = [site for site in sites if not site["fn"].has_rsample]
    marked = all(site["infer"].get("enumerate") == "parallel" for site in discrete)
    return _Look(bool(structure.enumerated), bool(sites), bool(discrete), bool(discrete) and marked)


def _own(pair: Pair) -> str:
    """The pair's own loss by its name, where it is one of ours."""
    loss: Any = pair.default_loss()
    if type(loss) not in LOSSES.values():
        return OWN
    options = {"num_particles": loss.num_particles}
    return _normal(type(loss).__name__, options | ({"alpha": loss.alpha} if hasattr(loss, "alpha") else {}))


def _normal(name: str, options: dict[str, Any]) -> str:
    default = 2 if name == "RenyiELBO" else 1
    particles, alpha = options.get("num_particles", default), options.get("alpha", 0)
    parts = [f"K={particles}"] if particles != default else []
    parts += [f"alpha={alpha:.10g}"] if alpha else []
    return f"{name}:{','.join(parts)}" if parts else name


def _parse(spec: str) -> tuple[str, dict[str, Any]]:
    """A spec in its normal form as a name and the loss's options."""
    name, _, rest = spec.partition(":")
    options: dict[str, Any] = {}
    for setting in filter(None, rest.split(",")):
        option, _, text = setting.partition("=")
        options |= {"num_particles": int(text)} if option == "K" else {"alpha": float(text)}
    return name, options
