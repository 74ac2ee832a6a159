"""Requests of ``pyrovae compare``, kept as JSON in the folder: read back, one makes the same comparison again."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch.distributions import constraints

from pyrovae.cli import names
from pyrovae.cli.runs import check_unchanged
from pyrovae.comparison.cells import Maker
from pyrovae.comparison.folder import read_record
from pyrovae.data import DataSet
from pyrovae.pair import Pair
from pyrovae.training.pair_checks import observed_support

__all__ = ["Request"]


@dataclass
class Request:
    """Pairs, data and options of a comparison by name, as plain JSON."""

    pairs: dict[str, str]
    """Registered name of each pair, or its file and class, by the name that tables show."""
    options: dict[str, dict[str, Any]]
    """Options that each pair is built with."""
    data: str
    binarize: str
    """``dynamic``, ``static`` or ``none``."""
    settings: dict[str, Any]
    """Other arguments of :func:`pyrovae.compare`."""
    digests: dict[str, str | None] = field(default_factory=dict)
    """SHA-256 of the user's files, by their name."""
    versions: dict[str, str] = field(default_factory=dict)

    @classmethod
    def make(
        cls, pairs: list[str], data: str, set_options: list[str], binarize: str, settings: dict[str, Any]
    ) -> tuple[Request, DataSet]:
        """Check the options of a user and that the likelihoods compare. Returns the request and its data."""
        classes = {names.short_name(name): names.find_pair(name) for name in pairs}
        if len(classes) < len(pairs):
            raise ValueError(f"pair: expected pairs of different names; got {', '.join(pairs)}.")
        options = {name: _options_of(c, set_options, list(classes.values())) for name, c in classes.items()}
        dataset = names.load_data(data, binarize)
        resolved, values = "none", {}
        for name, pair_class in classes.items():
            built = names.build_pair(pair_class, options[name], dataset.data_dim, settings["seed"])
            resolved = names.resolve_binarize(binarize, built, dataset)
            is_binary = observed_support(built, dataset.train[:2]) is constraints.boolean
            values[name] = "{0, 1}" if is_binary else "reals"
        if len(set(values.values())) > 1:
            each = ", ".join(f"{name} over {its_values}" for name, its_values in values.items())
            raise ValueError(
                f"pair: expected likelihoods over the same values; got {each}: a probability and a density do not "
                "compare. Choose one likelihood with --set, or compare these pairs apart."
            )
        # An option that some pair lacks does not reach it: the title says which options each pair was built with.
        built_with = {name: ", ".join(f"{k}={v}" for k, v in given.items()) for name, given in options.items()}
        shown = ", ".join(f"{name} ({text})" if text else name for name, text in built_with.items())
        request = cls(
            pairs={names.short_name(name): names.absolute_name(name) for name in pairs},
            options=options,
            data=names.absolute_name(data),
            binarize=resolved,
            settings=settings | {"title": f"{shown} on {Path(data).name}", "binarize": resolved == "dynamic"},
            digests={names.absolute_name(name): names.file_digest(name) for name in (*pairs, data)},
            versions=names.versions(),
        )
        return request, dataset

    @classmethod
    def read(cls, folder: Path) -> tuple[Request, DataSet]:
        """Read the request of a comparison that was started, with its data. No user's file may have changed since."""
        config = read_record(folder)["config"]
        try:
            request = cls(**config)
        except TypeError as error:
            raise ValueError(f"folder: {folder} was not started by `pyrovae compare` ({error}).") from error
        for name, digest in request.digests.items():
            check_unchanged(name, digest, folder)
        return request, names.load_data(request.data, request.binarize)

    def makers(self, dataset: DataSet) -> dict[str, Maker]:
        """Return the functions that make the pairs, for :func:`pyrovae.compare`."""
        return {
            name: partial(_make_pair, names.find_pair(pair), self.options[name], dataset.data_dim)
            for name, pair in self.pairs.items()
        }


def _make_pair(pair_class: type[Pair], given: dict[str, Any], data_dim: int, **more: Any) -> Pair:
    return names.build_pair(pair_class, given | more, data_dim, torch.initial_seed())  # the comparison has set the seed


def _options_of(pair_class: type[Pair], settings: list[str], classes: list[type[Pair]]) -> dict[str, Any]:
    """Read those settings that this pair has. A setting that no pair has raises an error that names this pair's."""
    of_others = {option for other in classes for option in names.constructor_options(other)}
    of_others -= names.constructor_options(pair_class).keys()
    own = [s for s in settings if s.partition("=")[0].strip().replace("-", "_") not in of_others]
    return names.parse_options(pair_class, own)
