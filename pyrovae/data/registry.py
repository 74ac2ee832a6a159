"""The type of a data set, and the data sets by name."""

from __future__ import annotations

import gzip
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from importlib.resources import files
from numbers import Integral
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from pyrovae.checks import check_choice
from pyrovae.data import mnist, synthetic

__all__ = ["DataSet", "describe", "load", "names"]


@dataclass(frozen=True, repr=False, eq=False)  # == of tensors is elementwise, so equality is identity
class DataSet:
    """Rows to train on and rows to test on, with labels, names and origin."""

    name: str
    train: Tensor
    """Training rows, float32, shape (N, D)."""
    test: Tensor | None
    """Test rows, float32, shape (M, D). None where no split is customary: ``train`` then holds every row."""
    labels_train: Tensor | None
    """Classes of the rows of ``train``, int64, shape (N,). None where the data have no classes."""
    labels_test: Tensor | None
    """Classes of the rows of ``test``, int64, shape (M,)."""
    feature_names: tuple[str, ...]
    """Names of the D features, with the unit where there is one."""
    image_shape: tuple[int, int] | None
    """Height and width of the image that a row holds, row by row. None for data that are no images."""
    convention: str
    """Split of the rows and treatment of the values, in one sentence."""
    source: str
    """Work to cite."""

    @property
    def data_dim(self) -> int:
        """Number D of features, which a pair takes as ``data_dim``."""
        return self.train.shape[1]

    @property
    def scored(self) -> tuple[str, Tensor, Tensor | None]:
        """Rows that a fit is scored on, with their name and labels: ``test`` or, where there are none, ``train``."""
        if self.test is None:
            return "train", self.train, self.labels_train
        return "test", self.test, self.labels_test

    def __repr__(self) -> str:
        if self.test is None:
            rows, rest = f"{len(self.train):,} rows", ", no test rows"
        else:
            rows, rest = f"{len(self.train):,} train and {len(self.test):,} test rows", ""
        images = f" ({self.image_shape[0]}×{self.image_shape[1]} images)" if self.image_shape else ""
        classes = f", {len(self.labels_train.unique())} classes" if self.labels_train is not None else ""
        return f"DataSet {self.name!r}: {rows} of {self.data_dim} features{images}{classes}{rest}"


def load(name: str, *, binarize: bool | None = None, seed: int = 0, root: str | Path | None = None) -> DataSet:
    """Return a data set, on the CPU. Its ``convention`` says how it was split and treated. Files: :func:`load_file`.

    Args:
        name: one of :func:`names`.
        binarize: how to treat the pixels of an image set. True or None: every pixel is drawn *once* from
            Bernoulli(grey level), so that a Bernoulli likelihood is a likelihood of the data (Salakhutdinov and Murray
            2008, On the quantitative analysis of deep belief networks). False: the pixels are the grey levels in
            [0, 1], for other likelihoods or for pixels binarised anew at every use.
        seed: seed of the binarisation and of the ``synthetic-*`` sets. The same seed gives the same numbers. It changes
            neither the splits nor the parameters of the synthetic distributions.
        root: folder to look for ``mnist`` in before downloading, see :mod:`pyrovae.data.mnist`. None: the folder that
            the environment variable ``PYROVAE_DATA`` names.

    Raises:
        TypeError: ``binarize`` is no bool, or ``seed`` no integer.
        ValueError: the name is unknown, the seed is negative, ``binarize`` is True for data that are no images, or an
            MNIST file is damaged.
        FileNotFoundError: ``root`` or ``PYROVAE_DATA`` names no folder.
        ConnectionError: MNIST is not on this machine and no mirror answers.
    """
    if isinstance(name, str | Path) and name not in _ENTRIES and (Path(name).suffix or Path(name).is_file()):
        raise ValueError(
            f"name: expected one of {', '.join(names())}; got {str(name)!r}. For a .csv or .npy file: "
            f"pyrovae.data.load_file({str(name)!r})."
        )
    check_choice("name", name, names())
    entry = _ENTRIES[name]
    _check_binarize(binarize, name)
    _check_seed(seed)
    raw = entry.read(int(seed), root)
    train, test, treatment = raw.train, raw.test, raw.treatment
    if entry.image_shape and binarize is not False:
        rng = np.random.default_rng(int(seed))
        train, test = _binarize(train, rng), None if test is None else _binarize(test, rng)
        treatment = f"each pixel binarised once, a draw from Bernoulli(grey level) with seed {seed}"
    return DataSet(
        name=name,
        train=torch.from_numpy(train),
        test=None if test is None else torch.from_numpy(test),
        labels_train=_labels(raw.labels_train),
        labels_test=_labels(raw.labels_test),
        feature_names=tuple(raw.feature_names),
        image_shape=entry.image_shape,
        convention=f"{raw.split}; {treatment}.",
        source=entry.source,
    )


def names() -> tuple[str, ...]:
    """Names that :func:`load` takes."""
    return tuple(_ENTRIES)


def describe() -> dict[str, str]:
    """Return one line of text for each name. Reads no data."""
    return {name: entry.description for name, entry in _ENTRIES.items()}


class _Raw(NamedTuple):
    """Arrays that a reader returns; the pixels of an image set are grey levels in [0, 1]."""

    train: np.ndarray
    feature_names: Iterable[str]
    split: str
    treatment: str
    test: np.ndarray | None = None
    labels_train: np.ndarray | None = None
    labels_test: np.ndarray | None = None


_Reader = Callable[[int, str | Path | None], _Raw]
"""A function of ``seed`` and ``root``, see :func:`load`."""


def _read_faithful(seed: int, root: str | Path | None) -> _Raw:
    with files("pyrovae.data").joinpath("faithful.csv").open(encoding="utf-8") as file:
        rows = np.loadtxt(file, delimiter=",", skiprows=1, dtype=np.float32)
    return _Raw(
        train=rows,
        feature_names=("eruption (min)", "waiting (min)"),
        split="No customary split, so all 272 rows are in train",
        treatment="values in minutes, not standardised",
    )


def _scikit_learn_reader(name: str, treatment: str) -> _Reader:
    """Make the reader of a table that scikit-learn holds as ``load_<name>``."""

    def read(seed: int, root: str | Path | None) -> _Raw:
        from sklearn import datasets  # slow to import, so only where it is needed

        bunch = getattr(datasets, f"load_{name}")()
        return _Raw(
            train=bunch.data.astype(np.float32),
            labels_train=bunch.target,
            feature_names=bunch.feature_names,
            split=f"No customary split, so all {len(bunch.data)} rows are in train",
            treatment=treatment,
        )

    return read


def _read_digits(seed: int, root: str | Path | None) -> _Raw:
    # The package has its own copy: most people start with digits, and scikit-learn takes most of a second to import.
    with files("pyrovae.data").joinpath("digits.csv.gz").open("rb") as file, gzip.open(file) as lines:
        rows = np.loadtxt(lines, delimiter=",", skiprows=1, dtype=np.int64)
    grey, labels = (rows[:, :-1] / 16).astype(np.float32), rows[:, -1]
    # Every fifth row of the rows sorted by class: the split is stratified to within one row, and it uses no random
    # generator, whose numbers another version could change.
    test = np.zeros(len(grey), dtype=bool)
    test[np.argsort(labels, kind="stable")[::5]] = True
    return _Raw(
        train=grey[~test],
        test=grey[test],
        labels_train=labels[~test],
        labels_test=labels[test],
        feature_names=_pixel_names(8, 8),
        split="No customary split, so of the rows sorted by class every fifth is in test (360 of 1,797)",
        treatment="grey levels in [0, 1] (raw / 16)",
    )


def _read_mnist(seed: int, root: str | Path | None) -> _Raw:
    arrays = mnist.read(root)
    return _Raw(
        train=_grey(arrays["train images"]),
        test=_grey(arrays["test images"]),
        labels_train=arrays["train labels"],
        labels_test=arrays["test labels"],
        feature_names=_pixel_names(28, 28),
        split="The standard split, 60,000 train and 10,000 test images",
        treatment="grey levels in [0, 1] (raw / 255)",
    )


def _synthetic_reader(draw: Callable[..., tuple[np.ndarray, np.ndarray | None]]) -> _Reader:
    """Make the reader of a synthetic data set from the function that draws its rows."""

    def read(seed: int, root: str | Path | None) -> _Raw:
        rng = np.random.default_rng(seed)
        x, labels = draw(rng, synthetic.NUM_TRAIN + synthetic.NUM_TEST)
        cut = synthetic.NUM_TRAIN
        return _Raw(
            train=x[:cut].astype(np.float32),
            test=x[cut:].astype(np.float32),
            labels_train=None if labels is None else labels[:cut],
            labels_test=None if labels is None else labels[cut:],
            feature_names=[f"x{d}" for d in range(x.shape[1])],
            split=f"Independent draws, {cut:,} train and {synthetic.NUM_TEST:,} test, with seed {seed}",
            treatment="values as drawn",
        )

    return read


@dataclass(frozen=True)
class _Entry:
    description: str
    source: str
    read: _Reader
    image_shape: tuple[int, int] | None = None


_SYNTHETIC = "Made by pyrovae.data.synthetic"

_ENTRIES = {
    "digits": _Entry(
        "handwritten digits, 1,797 images of 8×8, 10 classes",
        "Alpaydin and Kaynak 1998, Optical Recognition of Handwritten Digits, UCI, CC BY 4.0; the test set, as in "
        "scikit-learn",
        _read_digits,
        (8, 8),
    ),
    "mnist": _Entry(
        "handwritten digits, 70,000 images of 28×28, 10 classes; downloaded at first use (11 MB)",
        "LeCun, Bottou, Bengio and Haffner 1998, Gradient-based learning applied to document recognition; "
        "LeCun, Cortes and Burges, CC BY-SA 3.0",
        _read_mnist,
        (28, 28),
    ),
    "faithful": _Entry(
        "Old Faithful, 272 eruptions: duration and waiting time in minutes",
        "Azzalini and Bowman 1990, A look at some data on the Old Faithful geyser",
        _read_faithful,
    ),
    "iris": _Entry(
        "150 irises of 3 species, 4 measurements in centimetres",
        "Fisher 1936, The use of multiple measurements in taxonomic problems; the copy in scikit-learn",
        _scikit_learn_reader("iris", "values in centimetres, not standardised"),
    ),
    "wine": _Entry(
        "178 Italian wines of 3 cultivars, 13 chemical measurements",
        "Forina et al. 1991, Wine, UCI; the copy in scikit-learn",
        _scikit_learn_reader("wine", "values as published, on very different scales and not standardised"),
    ),
    "synthetic-mixture": _Entry(
        "a mixture of 3 well-separated Gaussians in 2-D, with labels", _SYNTHETIC, _synthetic_reader(synthetic.mixture)
    ),
    "synthetic-pinwheel": _Entry(
        "5 bent arms in 2-D, with labels",
        f"{_SYNTHETIC}, after Johnson et al. 2016, Composing graphical models with neural networks",
        _synthetic_reader(synthetic.pinwheel),
    ),
    "synthetic-moons": _Entry(
        "2 interleaved half circles in 2-D, with labels", _SYNTHETIC, _synthetic_reader(synthetic.moons)
    ),
    "synthetic-ppca": _Entry(
        "linear-Gaussian data in 10-D from 3 latent dimensions", _SYNTHETIC, _synthetic_reader(synthetic.ppca)
    ),
}


def _check_binarize(binarize: Any, name: str) -> None:
    if binarize is not None and not isinstance(binarize, bool):
        raise TypeError(f"binarize: expected True, False or None; got {binarize!r}.")
    if binarize and not _ENTRIES[name].image_shape:
        images = ", ".join(other for other, entry in _ENTRIES.items() if entry.image_shape)
        raise ValueError(
            f"binarize: expected None or False, as {name!r} holds no images; got True. Only pixels are "
            f"binarised ({images}): leave binarize out."
        )


def _check_seed(seed: Any) -> None:
    if isinstance(seed, bool) or not isinstance(seed, Integral):
        raise TypeError(f"seed: expected a whole number, 0 or more; got {seed!r}.")
    if seed < 0:  # type: ignore[operator]
        raise ValueError(f"seed: expected a whole number, 0 or more; got {seed}.")


def _binarize(grey: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    uniform = rng.random(grey.shape, dtype=np.float32)  # in [0, 1): grey 0 is never drawn, grey 1 always
    return np.less(uniform, grey, out=uniform)  # 0. or 1., without another array of MNIST's size


def _grey(images: np.ndarray) -> np.ndarray:
    return images.reshape(len(images), -1).astype(np.float32) / np.float32(255)


def _pixel_names(height: int, width: int) -> list[str]:
    return [f"pixel ({row}, {column})" for row in range(height) for column in range(width)]


def _labels(labels: np.ndarray | None) -> Tensor | None:
    return None if labels is None else torch.from_numpy(labels.astype(np.int64))
