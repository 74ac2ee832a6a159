"""Comparisons of pairs and of the methods that train them: one data set, one start, one budget."""

from pyrovae.comparison.methods import Method
from pyrovae.comparison.result import Cell, Comparison, Row
from pyrovae.comparison.run import compare

__all__ = ["Cell", "Comparison", "Method", "Row", "compare"]
