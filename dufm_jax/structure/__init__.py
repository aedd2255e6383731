"""The structure of a Gram matrix of class means, whatever the order of the classes.

`recognise` names it and `permuted_distance` measures how far it is from a given one where nothing
is recognised. Combinatorics on small matrices after training, hence NumPy, SciPy and NetworkX.
"""

from dufm_jax.structure.permutations import permuted_distance, srg_distance
from dufm_jax.structure.recognition import TOLERANCE, recognise
from dufm_jax.structure.types import NONE, Block, Kind, Structure

__all__ = [
    "NONE",
    "TOLERANCE",
    "Block",
    "Kind",
    "Structure",
    "permuted_distance",
    "recognise",
    "srg_distance",
]
