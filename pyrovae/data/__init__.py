"""Data sets: in the package, in scikit-learn, downloaded with a checked hash, or made on the spot.

>>> from pyrovae import data
>>> data.load("faithful")
DataSet 'faithful': 272 rows of 2 features, no test rows
"""

from pyrovae.data.files import load_file
from pyrovae.data.registry import DataSet, describe, load, names

__all__ = ["DataSet", "describe", "load", "load_file", "names"]
