"""The type of a data set."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

__all__ = ["DataSet"]


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
