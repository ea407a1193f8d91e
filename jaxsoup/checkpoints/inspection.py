"""What checkpoints contain, and what does not match between them.

```
inspected = inspection.inspect(run_dirs)
inspected.problems
```
"""

from collections.abc import Sequence
from collections.abc import Sized
import math
import pathlib
from typing import NamedTuple

import numpy as np

from jaxsoup import _checked
from jaxsoup import _memory
from jaxsoup import _tree
from jaxsoup.checkpoints import _checksum
from jaxsoup.checkpoints import _directories
from jaxsoup.checkpoints import _ingredients
from jaxsoup.checkpoints import _source
from jaxsoup.typing import Json
from jaxsoup.typing import PathLike


class Inspection(NamedTuple):
  """Contents and problems of checkpoints.

  Attributes:
    paths: the checkpoints.
    leaves: (path, shape, dtype, bytes) of every leaf of the first one.
    num_params: numbers in each checkpoint.
    num_bytes: bytes of each checkpoint.
    norms: Euclidean norm of the floats of each; empty unless read.
    problems: what does not match, or is damaged.
    unverified: what was read but has no checksum, so that damage would not be
      seen; empty unless read.
  """

  paths: tuple[str, ...]
  leaves: tuple[tuple[str, tuple[int, ...], str, int], ...]
  num_params: tuple[int, ...]
  num_bytes: tuple[int, ...]
  norms: tuple[float, ...]
  problems: tuple[str, ...]
  unverified: tuple[str, ...]

  def as_json(self) -> Json:
    """A dict for `json.dumps`; JSON has no NaN, so such a norm is None."""
    norms = [x if math.isfinite(x) else None for x in self.norms]
    return {**self._asdict(), 'norms': norms}

  def as_text(self) -> str:
    """Lines for a terminal; repeated blocks of one shape are not folded."""
    width = max((len(name) for name, *_ in self.leaves), default=0)
    lines = [
        f'{name:<{width}}  {_memory.amount(size):>8}  {dtype:<9} {list(shape)}'
        for name, shape, dtype, size in self.leaves
    ]
    lines.append('')
    for k, path in enumerate(self.paths):
      norm = f'  norm {self.norms[k]:.4g}' if self.norms else ''
      lines.append(
          f'{k:>3}  {self.num_params[k]:,} numbers  '
          f'{_memory.amount(self.num_bytes[k])}{norm}  {path}'
      )
    lines.append('')
    lines += [f'Not verified: {part}' for part in self.unverified]
    lines += [f'Problem: {problem}' for problem in self.problems]
    if not self.problems:
      lines.append(
          'The checkpoints match.' if len(self.paths) > 1 else 'No problems.'
      )
    return '\n'.join(lines)


def inspect(
    paths: Sequence[PathLike], *, item: str | None = None, deep: bool = False
) -> Inspection:
  """Compares checkpoints by their metadata, or by their values.

  Args:
    paths: checkpoints or run directories, as for `checkpoints.Ingredients`.
    item: which item of a step that holds several.
    deep: also reads the arrays: NaN and infinite values, duplicates, norms, and
      the checksums that were stored with them.

  Returns:
    An `Inspection`.

  Raises:
    FileNotFoundError: a path without a finished checkpoint.
  """
  ingredients = _ingredients.Ingredients(paths, item=item)
  sources = [ingredients.metadata(k) for k in range(len(ingredients))]
  problems = _mismatches(sources) + _refused(ingredients)
  norms: list[float] = []
  unverified: list[str] = []
  if deep:
    norms, problems_of_values = _read_all(ingredients)
    problems += problems_of_values
    for k, source in enumerate(sources):
      changed, unknown = _verify_others(source, ingredients.stored(k))
      problems += changed
      unverified += unknown
  return Inspection(
      paths=ingredients.paths,
      leaves=tuple(
          (_tree.name_of(p), tuple(x.shape), str(x.dtype), _tree.num_bytes(x))
          for p, x in sources[0].leaves.items()
      ),
      num_params=tuple(
          sum(math.prod(x.shape) for x in s.leaves.values()) for s in sources
      ),
      num_bytes=tuple(
          sum(map(_tree.num_bytes, s.leaves.values())) for s in sources
      ),
      norms=tuple(norms),
      problems=tuple(problems),
      unverified=tuple(unverified),
  )


def _verify_others(
    source: _source.Metadata, read: Sized
) -> tuple[list[str], list[str]]:
  """Problems of what is stored with the arrays, and what has no checksum."""
  names = [_tree.name_of(path) for path in source.leaves]
  known = source.checksums
  bare = [n for n in names if not _checksum.is_current(known.get(n, ''))]
  unknown = []
  if bare:
    more = f' and {len(bare) - 1} more' if len(bare) > 1 else ''
    unknown.append(
        f'{source.path}: no checksums of {bare[0]!r}{more} are stored there'
    )
  if len(read) < len(names):
    unknown.append(
        f'{source.path}: {len(names) - len(read)} arrays outside of the '
        'parameters were not read'
    )
  folder = pathlib.Path(source.path).parent
  changed, others = _directories.verify_others(folder)
  if others:
    unknown.append(f'{folder}: no checksums of {", ".join(others)}')
  return [
      f'{folder / name} was changed after the soup was written.'
      for name in changed
  ], unknown


def _mismatches(sources: Sequence[_source.Metadata]) -> list[str]:
  first = sources[0]
  problems = []
  for source in sources[1:]:
    pair = [
        {
            name: leaf
            for name, leaf in own.items()
            if name in others
            or not _ingredients.is_named(name, _ingredients.OF_FIRST)
        }
        for own, others in (
            (first.leaves, source.leaves),
            (source.leaves, first.leaves),
        )
    ]
    if mismatches := _checked.mismatches(*pair):
      problems.append(
          f'{source.path} does not match {first.path}: '
          f'{_checked.listed(mismatches)}'
      )
  return problems


def _refused(ingredients) -> list[str]:
  """What recipes refuse, although the structure fits."""
  problems = []
  for k in range(len(ingredients)):
    try:
      ingredients.require_averageable(k)
    except ValueError as e:
      problems.append(str(e))
  return problems


def _read_all(ingredients) -> tuple[list[float], list[str]]:
  """Norms, and problems that only the values show."""
  norms, problems = [], []
  seen: dict[str, str] = {}
  for k, path in enumerate(ingredients.paths):
    try:
      flat = _tree.flatten(ingredients[k])
    except ValueError as e:
      norms.append(float('nan'))
      problems.append(str(e))
      continue
    floats = [
        (name, np.abs(np.asarray(x)).astype(np.float64))
        for name, x in zip(flat.paths, flat.leaves)
        if _tree.is_float(x)
    ]
    norms.append(float(np.sqrt(sum(np.sum(x**2) for _, x in floats))))
    bad = [_tree.name_of(n) for n, x in floats if not np.isfinite(x).all()]
    if bad:
      problems.append(
          f'{path} has NaN or infinite values in {", ".join(bad[:5])}: leave '
          'it out.'
      )
    content_hash = ingredients.content_hash(k)
    if content_hash in seen:
      problems.append(
          f'{path} and {seen[content_hash]} have equal parameters: the same '
          'model would count twice.'
      )
    seen.setdefault(content_hash, path)
  return norms, problems
