"""Products of test parameters: pairs of values by default, triples if slow.

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
  """Combinations that hold every triple of values of three axes.

  Those that are not needed for the pairs are `slow`. Of up to three axes that
  is the whole product.
  """
  combinations = list(itertools.product(*map(list, axes)))
  pairs = covering(combinations, 2)
  triples = covering(combinations, min(3, len(axes)), pairs)
  return [
      pytest.param(
          *combinations[i], marks=() if i in pairs else pytest.mark.slow
      )
      for i in sorted(triples)
  ]


def covering(
    combinations: list[tuple[Any, ...]], num: int, given: Iterable[int] = ()
) -> set[int]:
  """Few indices of combinations that hold each `num` values of as many axes.

  Those that are given are among them.
  """
  tuples = [
      set(itertools.combinations(enumerate(map(repr, c)), num))
      for c in combinations
  ]
  chosen = set(given)
  missing = set().union(*tuples).difference(*(tuples[i] for i in chosen))
  while missing:
    best = max(range(len(tuples)), key=lambda i: len(tuples[i] & missing))
    chosen.add(best)
    missing -= tuples[best]
  return chosen
