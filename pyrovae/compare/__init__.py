"""Comparisons: one data set, one or several pairs, every method that trains them, one start and one budget."""

from pyrovae.compare.methods import Method
from pyrovae.compare.result import Cell, Comparison, Row
from pyrovae.compare.run import compare

__all__ = ["Cell", "Comparison", "Method", "Row", "compare"]
