"""Helpers that the tests of pictures share."""

from __future__ import annotations

import io

import numpy as np
import pytest
import torch
from matplotlib.figure import Figure


@pytest.fixture
def saved():
    """Function that saves a figure as PNG and returns it. What cannot be laid out warns, and warnings are errors."""

    def save(figure):
        assert isinstance(figure, Figure)
        buffer = io.BytesIO()
        figure.savefig(buffer, format="png")
        assert buffer.getvalue().startswith(b"\x89PNG")
        return figure

    return save


@pytest.fixture
def labelled(saved):
    """Function that saves a figure, checks that each panel has a title and names its axes, and returns the figure."""

    def check(figure):
        for axes in saved(figure).axes:
            assert axes.get_title()
            assert axes.images or (axes.get_xlabel() and axes.get_ylabel())
        return figure

    return check


@pytest.fixture
def images_of():
    """Function that cuts the one grid that a figure shows into images, (rows, columns, height, width)."""

    def cut(figure, image_shape):
        (picture,) = figure.axes[0].images
        height, width = image_shape
        grid = np.pad(np.asarray(picture.get_array()), ((0, 1), (0, 1)))  # a line after the last image, too
        rows, columns = grid.shape[0] // (height + 1), grid.shape[1] // (width + 1)
        images = grid.reshape(rows, height + 1, columns, width + 1).transpose(0, 2, 1, 3)[:, :, :-1, :-1]
        return torch.as_tensor(images.copy()).float()

    return cut
