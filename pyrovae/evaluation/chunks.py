"""Chunks: how many data and particles a measurement runs at a time."""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from pyro.poutine import Trace

from pyrovae.infer.weights import sample_sites
from pyrovae.pair import Pair

__all__ = ["FLOATS_PER_CHUNK", "chunk_sizes", "runs_at_a_time", "width"]

FLOATS_PER_CHUNK = {"cpu": 2**20, "cuda": 2**25}
"""Numbers in the widest tensor of a chunk, by device. Fewer fit into caches and memory; more make dispatch vanish."""
DATA_PER_CHUNK = 100  # keeps small whatever has a number for each sample of each datum


def width(pair: Pair, trace: Trace, count: int, *, enumerated: Iterable[str] = ()) -> int:
    """Return how many numbers the widest tensor has for one datum and particle.

    The widest tensor is that of a layer, or holds the values of all sites together.

    Args:
        pair: the pair, for the sizes of its layers.
        trace: a run of the model with ``count`` data times particles.
        count: data times particles of that run.
        enumerated: sites that are summed out; all their values count at once.
    """
    sites = sample_sites(trace)
    values = sum(site["value"].numel() for site in sites.values()) // count
    layers = [p.shape[0] for p in pair.parameters() if p.dim() == 2]
    return max(1, values, *layers) * math.prod(len(sites[n]["fn"].enumerate_support(expand=False)) for n in enumerated)


def runs_at_a_time(device: torch.device, width: int) -> int:
    """Return how many data times particles fill a chunk of ``FLOATS_PER_CHUNK`` numbers."""
    return max(1, FLOATS_PER_CHUNK[device.type] // width)


def chunk_sizes(
    device: torch.device,
    width: int,
    num_data: int,
    num_particles: int,
    *,
    joint: bool = False,
    most_data: int = DATA_PER_CHUNK,
) -> tuple[int, int]:
    """Return how many data and particles run at a time; ``joint`` keeps all data together, as a global latent needs."""
    fitting = runs_at_a_time(device, width)
    rows = num_data if joint else min(num_data, fitting, most_data)
    return rows, max(1, min(num_particles, fitting // rows))
