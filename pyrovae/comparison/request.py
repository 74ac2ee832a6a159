"""What ``pyrovae compare`` was asked, as JSON: read back, it makes the same comparison again."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch.distributions import constraints

from pyrovae.cli.runs import (
    RunFolder,
    absolute,
    build_pair,
    constructor_options,
    file_digest,
    find_pair,
    load_data,
    parse_options,
    resolve_binarize,
)
from pyrovae.comparison.cells import Maker
from pyrovae.comparison.folder import read_record
from pyrovae.data import DataSet
from pyrovae.pair import Pair
from pyrovae.training.pair_checks import observed_support

__all__ = ["Request"]


@dataclass
class Request:
    """Pairs, data and options by name. Plain JSON."""

    pairs: dict[str, str]
    """File or registered name of each pair, by the name that tables show."""
    options: dict[str, dict[str, Any]]
    """What each is built with."""
    data: str
    binarize: str
    """``dynamic``, ``static`` or ``none``."""
    methods: list[str]
    settings: dict[str, Any]
    """Other arguments of :func:`pyrovae.comparison.compare`."""
    digests: dict[str, str | None] = field(default_factory=dict)
    """SHA-256 of the user's files."""
    versions: dict[str, str] = field(default_factory=dict)

    @classmethod
    def of(
        cls, specs: list[str], data: str, set_options: list[str], binarize: str, methods: list[str], **settings: Any
    ) -> tuple[Request, DataSet]:
        """Check what a person asked for.

        Raises:
            ValueError, FileNotFoundError: an unknown pair, data set or option; likelihoods that do not compare.
        """
        classes = {spec: find_pair(spec) for spec in specs}
        pairs = {_short(spec): absolute(spec) for spec in classes}
        if len(pairs) < len(specs):
            raise ValueError(f"PAIR: expected pairs of different names; got {', '.join(specs)}.")
        options = {_short(spec): _options(c, set_options, list(classes.values())) for spec, c in classes.items()}
        dataset = load_data(data, binarize)
        drawn, binary = "none", dict[str, bool]()
        for spec, pair_class in classes.items():
            built = build_pair(pair_class, options[_short(spec)], dataset.data_dim, settings["seed"])
            drawn = resolve_binarize(binarize, built, dataset)
            binary[_short(spec)] = observed_support(built, dataset.train[:2]) is constraints.boolean
        if len(set(binary.values())) > 1:
            each = ", ".join(f"{name} over {'{0, 1}' if is_binary else 'reals'}" for name, is_binary in binary.items())
            raise ValueError(
                f"PAIR: expected likelihoods over the same values; got {each}: a probability and a density do not "
                "compare. Choose one likelihood with --set, or compare these pairs apart."
            )
        # An option that some pair lacks does not reach it: the title says which each was built with.
        built_with = {name: ", ".join(f"{k}={v}" for k, v in given.items()) for name, given in options.items()}
        shown = ", ".join(f"{name} ({text})" if text else name for name, text in built_with.items())
        settings["title"] = f"{shown} on {settings['title']}"
        digests = {absolute(name): file_digest(name) for name in (*specs, data)}
        versions = {name: version(name) for name in ("pyrovae", "torch", "pyro-ppl")}
        request = cls(pairs, options, absolute(data), drawn, methods, settings, digests, versions)
        return request, dataset

    @classmethod
    def read(cls, folder: Path) -> tuple[Request, DataSet]:
        """Of a comparison that was started. A user's files are read only if they are the very ones of then.

        Raises:
            FileNotFoundError: something is missing.
            ValueError: something is damaged, foreign or has changed.
        """
        config = read_record(folder)["config"]
        try:
            request = cls(**config)
        except TypeError as error:
            raise ValueError(f"--resume: {folder} was not started by `pyrovae compare` ({error}).") from error
        for name, digest in request.digests.items():
            RunFolder(folder).check_file(name, digest)
        return request, load_data(request.data, request.binarize)

    def makers(self, dataset: DataSet) -> dict[str, Maker]:
        return {
            name: partial(_make, find_pair(spec), self.options[name], dataset.data_dim)
            for name, spec in self.pairs.items()
        }

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def _make(pair_class: type[Pair], given: dict[str, Any], data_dim: int, **more: Any) -> Pair:
    return build_pair(pair_class, given | more, data_dim, torch.initial_seed())  # the comparison has set the seed


def _short(spec: str) -> str:
    return spec.rpartition(":")[2].lower()


def _options(pair_class: type[Pair], settings: list[str], classes: list[type[Pair]]) -> dict[str, Any]:
    """Those of ``--set`` that this pair has; one that no pair has is an error, and names what there is."""

    def has(other: type[Pair], setting: str) -> bool:
        return setting.partition("=")[0].strip().replace("-", "_") in constructor_options(other)

    return parse_options(
        pair_class, [s for s in settings if has(pair_class, s) or not any(has(other, s) for other in classes)]
    )
