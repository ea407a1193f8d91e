"""Products of test parameters, of which every pair of values runs by default.

```
@pytest.mark.parametrize('recipe, dtype, placement', _pairwise.product(
    RECIPES, DTYPES, PLACEMENTS), indirect=['placement'])
```
"""

from collections.abc import Iterable
import itertools
from typing import Any

import pytest


def product(*axes: Iterable[Any]) -> list[Any]:
  """All combinations; those that are not needed for the pairs are `slow`."""
  combinations = list(itertools.product(*map(list, axes)))
  chosen = covering(combinations)
  return [
      pytest.param(*c, marks=() if i in chosen else pytest.mark.slow)
      for i, c in enumerate(combinations)
  ]


def covering(combinations: list[tuple[Any, ...]]) -> set[int]:
  """Few indices of combinations that hold every pair of values of two axes."""
  pairs = [
      {(a, b, repr(c[a]), repr(c[b])) for a in range(len(c)) for b in range(a)}
      for c in combinations
  ]
  missing = set().union(*pairs)
  chosen = set()
  while missing:
    best = max(range(len(pairs)), key=lambda i: len(pairs[i] & missing))
    chosen.add(best)
    missing -= pairs[best]
  return chosen
