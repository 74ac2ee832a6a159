"""What :func:`pyrovae.data.load` returns."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

__all__ = ["DataSet"]


@dataclass(frozen=True, repr=False, eq=False)  # == of tensors is elementwise, so equality is identity
class DataSet:
    """Rows to train on, rows to test on, and where they come from."""

    name: str
    train: Tensor
    """float32, shape (N, D), one datum a row."""
    test: Tensor | None
    """float32, shape (M, D). None where no split is customary: ``train`` then holds every row."""
    labels_train: Tensor | None
    """int64, shape (N,), aligned with ``train``. None where the data have no classes."""
    labels_test: Tensor | None
    """int64, shape (M,), aligned with ``test``."""
    feature_names: tuple[str, ...]
    """D names, with the unit where there is one."""
    image_shape: tuple[int, int] | None
    """(height, width) of the image that a row holds in row-major order. None for data that are no images."""
    convention: str
    """One sentence: which split, and what was done to the values."""
    source: str
    """Whom to cite."""

    @property
    def data_dim(self) -> int:
        """D, the features of a datum: what a pair takes as ``data_dim``."""
        return self.train.shape[1]

    @property
    def scored(self) -> tuple[str, Tensor, Tensor | None]:
        """Which rows a fit is scored on, ``test`` or, where there are none, ``train``; these rows; their labels."""
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
