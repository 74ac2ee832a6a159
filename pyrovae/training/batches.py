"""The batches of a training run: rows in memory or from a DataLoader, and the rows held out."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset

from pyrovae.checks import check_data
from pyrovae.pair import Pair
from pyrovae.training.pair_checks import check_pair

__all__ = ["Batches", "make_batches"]

SAMPLE_ROWS = 10_000  # as many rows of a DataLoader are shown to ``initialize``


@dataclass
class Batches:
    """Arguments of the steps of an epoch, the function that makes a batch of each, and facts on the data."""

    arguments: Callable[[], Iterator[Tensor]]
    """Starts an epoch: yields the argument of each step, rows' numbers or the rows themselves."""
    batch: Callable[[Tensor], Tensor]
    """Turns a step's argument into its batch: gathers rows, draws pixels. It is part of the compiled step."""
    size: int
    steps_per_epoch: int
    sample: Tensor  # rows for ``initialize``
    validation: list[Tensor] = field(default_factory=list)  # batches held out
    generator: torch.Generator | None = None  # the DataLoader's own


def make_batches(
    pair: Pair, x: Any, validation: Any, batch_size: int, binarize: bool, device: torch.device, seed: int
) -> Batches:
    """Check the data of :func:`pyrovae.fit`, hold rows out, and place them on ``device`` in the pair's precision."""
    dtype = next((p.dtype for p in pair.parameters()), torch.get_default_dtype())

    def place(rows: Tensor) -> Tensor:
        return rows.to(device, dtype, non_blocking=True)

    def draw(rows: Tensor) -> Tensor:
        return torch.bernoulli(rows) if binarize else rows

    data_dim = getattr(pair, "data_dim", None)
    held_out: Tensor | None = None
    if isinstance(validation, Tensor):
        held_out, validation = check_data(validation, "validation", data_dim=data_dim), 0
    if isinstance(x, DataLoader):
        if validation:
            raise ValueError("validation: with a DataLoader, pass the held-out data themselves, as a tensor.")
        data = _read_loader(x, place, draw)
        check_data(data.sample, data_dim=data_dim)
    else:
        rows = check_data(x, data_dim=data_dim, at_least=2)
        if validation:
            wanted = validation * len(rows) if isinstance(validation, float) else validation
            count = round(max(0, min(len(rows), wanted)))  # infinite and NaN are refused like all that is out of range
            if not 0 < count < len(rows):
                raise ValueError(
                    f"validation: expected a share between 0 and 1, or a count below the {len(rows)} data; got "
                    f"{validation!r}."
                )
            order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(seed)).to(rows.device)
            rows, held_out = rows[order[count:]], rows[order[:count]]
        rows = place(rows)
        data = Batches(
            arguments=lambda: iter(torch.randperm(len(rows), device=device).split(batch_size)),
            batch=lambda index: draw(rows[index]),
            size=len(rows),
            steps_per_epoch=math.ceil(len(rows) / batch_size),
            sample=rows,
        )
    check_pair(pair, data.sample, binarize=binarize)
    data.sample = draw(data.sample)
    if held_out is not None:
        held_out = place(held_out)
        check_pair(pair, held_out, "validation", binarize=binarize)
        data.validation = list(draw(held_out).split(batch_size))
    return data


def _read_loader(loader: DataLoader, place: Callable[[Tensor], Tensor], draw: Callable[[Tensor], Tensor]) -> Batches:
    def read_rows() -> Iterator[Tensor]:
        for batch in loader:
            rows = batch[0] if isinstance(batch, list | tuple) else batch
            if not isinstance(rows, Tensor):
                raise TypeError(
                    f"x: expected the DataLoader to yield tensors of shape (batch, D); got {type(rows).__name__}."
                )
            yield rows

    try:
        steps, size = len(loader), None
        if loader.batch_size is not None:  # an epoch is what the sampler names, which may be less than the data set
            size = len(loader.dataset if isinstance(loader.dataset, IterableDataset) else loader.sampler)  # type: ignore[arg-type]
            size = steps * loader.batch_size if loader.drop_last else size
    except TypeError as error:
        if "no len" not in str(error):
            raise
        raise ValueError(
            "x: expected a DataLoader over a data set with a length; its objective needs the number of data."
        ) from error
    sample: list[Tensor] = []
    seen = 0
    for rows in read_rows():
        if seen < SAMPLE_ROWS:
            sample.append(check_data(rows))
        seen += len(rows)
        if size is not None and seen >= SAMPLE_ROWS:  # else the size is unknown: count all rows
            break
    if not sample:
        raise ValueError("x: expected at least one batch; the DataLoader is empty.")
    return Batches(
        arguments=lambda: map(place, read_rows()),
        batch=draw,
        size=seen if size is None else size,
        steps_per_epoch=steps,
        sample=torch.cat(sample).to(place(sample[0])),
        generator=loader.generator or getattr(loader.sampler, "generator", None),
    )
