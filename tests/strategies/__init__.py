"""Random networks with planted fibers and near misses, from a seed.

``plant(seed)`` gives a base network, a wider one that computes the same by construction (see
:mod:`planting`), inputs, and whether the rules are expected to find everything that was planted.
"""

from planting import CONSTANT, UNREAD

from strategies.networks import plant
from strategies.values import Planted

__all__ = ["CONSTANT", "UNREAD", "Planted", "plant"]
