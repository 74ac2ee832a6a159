"""Methods that train a pair: their names, and which of them apply to it."""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import pyro
import torch
from pyro import poutine
from pyro.infer import ELBO
from pyro.poutine.enum_messenger import EnumMessenger
from torch import Tensor

from pyrovae.checks import check_choice
from pyrovae.infer import LOSSES, default_loss
from pyrovae.infer.weights import Structure, same_random_state, sample_sites
from pyrovae.pair import Pair

__all__ = ["CLOSED_FORM", "EM", "Method", "find_latents", "find_methods", "parse_method", "split_methods"]

CLOSED_FORM, EM, OWN = "closed-form", "EM", "default-loss"
EXACT = {CLOSED_FORM: "closed form", EM: "EM"}
SPECS = (*EXACT, OWN, *LOSSES)


@dataclass(frozen=True)
class Method:
    """One way to train a pair."""

    name: str
    """Name in tables: ``SVI, amortized: VIMCO, K=5``."""
    spec: str
    """Name in a request: ``closed-form``, ``EM``, ``default-loss``, or a loss such as ``RenyiELBO:K=5,alpha=0.5``."""
    pair_options: dict[str, Any] = field(default_factory=dict)
    """Options that the pair is built with for this method: ``{"amortized": True}``."""

    @property
    def uses_svi(self) -> bool:
        return self.spec not in EXACT

    def make_loss(self, pair: Pair) -> ELBO:
        """Make a new loss, as a loss remembers the pair that it saw."""
        name, options = _read_spec(self.spec)
        return default_loss(pair) if name == OWN else LOSSES[name](**options)


def parse_method(spec: str) -> str:
    """Check ``spec``, and return its one normal form: ``RenyiELBO:num_particles=5,alpha=0`` is ``RenyiELBO:K=5``."""
    name, options = _read_spec(spec)
    if options:
        try:
            LOSSES[name](**options)
        except ValueError as error:
            raise ValueError(f"methods: {spec!r}: {error}") from None
    return _write_spec(name, options)


def _read_spec(spec: str) -> tuple[str, dict[str, Any]]:
    """Return the name in ``spec``, and the options of its loss."""
    if not isinstance(spec, str):
        raise TypeError(f"methods: expected names such as 'EM' or 'RenyiELBO:K=5'; got {spec!r}.")
    name, _, rest = spec.strip().partition(":")
    check_choice("methods", name, SPECS)
    accepted = inspect.signature(LOSSES[name]).parameters if name in LOSSES else {}
    known = {shown: option for shown, option in (("K", "num_particles"), ("alpha", "alpha")) if option in accepted}
    options: dict[str, Any] = {}
    for setting in rest.split(",") if rest else ():
        shown, equals, text = (part.strip() for part in setting.partition("="))
        option = known.get(shown, shown)
        if not equals or option not in known.values():
            takes = " and ".join(known) or "no options"
            raise ValueError(f"methods: {name} takes {takes}, as in RenyiELBO:K=5,alpha=0.5; got {setting!r}.")
        try:
            options[option] = (int if option == "num_particles" else float)(text)
        except ValueError:
            kind = "a whole number" if option == "num_particles" else "a number"
            raise ValueError(f"methods: expected {kind} in {spec!r}; got {text!r}.") from None
    return name, options


def _write_spec(name: str, options: dict[str, Any]) -> str:
    default = 2 if name == "RenyiELBO" else 1
    particles, alpha = options.get("num_particles", default), options.get("alpha", 0)
    parts = [f"K={particles}"] if particles != default else []
    parts += [f"alpha={alpha:.10g}"] if alpha else []
    return f"{name}:{','.join(parts)}" if parts else name


def split_methods(texts: Iterable[str]) -> list[str]:
    """Split texts into names at commas and spaces: ``"Trace_ELBO,RenyiELBO:K=5,alpha=0.5 EM"`` has three.

    An option such as ``alpha=0.5`` belongs to the name before it.
    """
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
    """Return the methods that train a pair, and why each other of ``specs`` does not train it.

    Args:
        variants: options with the pair that they build: without its amortized guide and with it, where it has both.
        few: some data.
        specs: methods to choose from. Empty: the closed form and EM, where the pair has them, and

            - where the model's latents are summed out: enumeration (``TraceEnum_ELBO``);
            - with a discrete guide: its enumeration, the score function (``Trace_ELBO``), VIMCO (``RenyiELBO:K=5``);
            - with a continuous guide: ``Trace_ELBO``, ``TraceMeanField_ELBO`` (analytic KL), ``RenyiELBO:K=5`` and the
              pair's own loss; beside an exact method, the pair's own loss alone.

    Returns:
        Methods in the order of a table's rows, and reasons by spec.
    """
    plain_options, plain = variants[0]
    exact = [spec for spec in EXACT if _reason_against(spec, plain, few) is None]
    methods = [Method(EXACT[spec], spec, plain_options) for spec in exact if not specs or spec in specs]
    refused = {spec: str(_reason_against(spec, plain, few)) for spec in specs if spec in EXACT and spec not in exact}
    trains: set[str] = set()
    for options, pair in variants:
        latents, own = find_latents(pair, few), _own_loss(pair)
        for wanted in [s for s in specs if s not in EXACT] if specs else latents.losses(exact=bool(exact)):
            spec = own if wanted == OWN else wanted
            method = Method(latents.name_method(spec, amortized=bool(options.get("amortized"))), spec, options)
            if not latents.are_sampled and len(variants) > 1 and not spec.startswith("TraceEnum_ELBO"):
                continue  # the guide has nothing to sample here: the amortized variant is meant
            if (reason := _reason_against(spec, pair, few)) is not None:
                refused[wanted] = reason
                continue
            trains.add(wanted)
            methods += [method] if method not in methods else []
    return methods, {spec: reason for spec, reason in refused.items() if spec not in trains}


def _reason_against(spec: str, pair: Pair, few: Tensor) -> str | None:
    """Return why a method does not train this pair; None where it does."""
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


@dataclass(frozen=True)
class Latents:
    """How a pair's latents are treated, as one run of its model and guide shows."""

    are_enumerated: bool
    """Some are summed out in the model."""
    are_sampled: bool
    """Some are sampled by the guide. If none is, the ELBO is the log evidence."""
    are_discrete: bool
    """Some that the guide samples have no pathwise gradient."""
    are_enumerable: bool
    """All that have no pathwise gradient are marked for enumeration."""

    def losses(self, *, exact: bool) -> list[str]:
        """Return the losses to compare where none are asked for. ``exact``: the pair has an exact method too."""
        if self.are_enumerated:
            return ["TraceEnum_ELBO"]
        if self.are_discrete:
            return [*(["TraceEnum_ELBO"] if self.are_enumerable else []), "Trace_ELBO", "RenyiELBO:K=5"]
        return [OWN] if exact else ["Trace_ELBO", "TraceMeanField_ELBO", "RenyiELBO:K=5", OWN]

    def name_method(self, spec: str, *, amortized: bool) -> str:
        loss, options = _read_spec(spec)
        particles, alpha = options.get("num_particles"), options.get("alpha", 0)
        word = loss
        if loss == OWN:
            word = "own loss"
        elif loss == "TraceEnum_ELBO" and (self.are_enumerated or self.are_enumerable):
            word = "enumeration"
        elif loss == "Trace_ELBO" and self.are_discrete:
            word = "score function"
        elif loss == "RenyiELBO":
            particles = particles or 2
            word = "VIMCO" if self.are_discrete and alpha == 0 else loss
        parts = [f"K={particles}"] if particles else []
        parts += [f"α={alpha:g}"] if alpha else []
        return ", ".join([f"SVI, amortized: {word}" if amortized else f"SVI, {word}", *parts])


def find_latents(pair: Pair, few: Tensor) -> Latents:
    """Run the guide once on some data, and return how the pair's latents are treated."""
    structure = Structure.of(pair.model, pair.guide, (few,), {})
    # Inside this handler a guide marks the sites that it can enumerate; some guides do so only there.
    enumerate_sites = EnumMessenger(first_available_dim=-1 - structure.max_plate_nesting)
    with same_random_state(), torch.no_grad(), pyro.validation_enabled(False), enumerate_sites:
        sites = list(sample_sites(poutine.trace(pair.guide).get_trace(few)).values())
    discrete = [site for site in sites if not site["fn"].has_rsample]
    marked = all(site["infer"].get("enumerate") == "parallel" for site in discrete)
    return Latents(bool(structure.enumerated), bool(sites), bool(discrete), bool(discrete) and marked)


def _own_loss(pair: Pair) -> str:
    """Return the spec of the pair's own loss, where that is one of ``LOSSES``; else ``default-loss``."""
    loss: Any = default_loss(pair)
    if type(loss) not in LOSSES.values():
        return OWN
    options = {"num_particles": loss.num_particles}
    return _write_spec(type(loss).__name__, options | ({"alpha": loss.alpha} if hasattr(loss, "alpha") else {}))
