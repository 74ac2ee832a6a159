"""Comparisons: one data set, one or several pairs, every method that trains them, one start and one budget."""

from pyrovae.comparison.methods import Method
from pyrovae.comparison.result import Cell, Comparison, Row
from pyrovae.comparison.run import compare

__all__ = ["Cell", "Comparison", "Method", "Row", "compare"]
