"""Checks before numbers are compared: structures, files next to the weights."""

from collections.abc import Callable
from collections.abc import Iterator
from collections.abc import Sequence
import json
import pathlib
from typing import Any

import numpy as np

from jaxsoup import _checked
from jaxsoup import _tree
from jaxsoup.diagnosis import _findings
from jaxsoup.diagnosis._case import Case
from jaxsoup.diagnosis._case import Seen


def _commonest(keys: dict[int, Any]) -> tuple[list[int], list[int]]:
  """Members with the commonest key, and the others."""
  groups: dict[Any, list[int]] = {}
  for k, key in keys.items():
    groups.setdefault(key, []).append(k)
  most = max(groups.values(), key=len, default=[])
  return most, [k for k in keys if k not in most]


def structure(case: Case) -> Iterator[Seen]:
  leaves = case.pool.leaves
  of = lambda k: frozenset((p, tuple(x.shape)) for p, x in leaves[k].items())
  members, others = _commonest({k: of(k) for k in case.members})
  if others:
    first, other = members[0], others[0]
    differences = [
        text
        for text in _checked.mismatches(leaves[first], leaves[other])
        if ' dtype ' not in text
    ]
    names = case.pool.names
    yield Seen(
        others,
        f'Compared with {names[first]}, in {names[other]} '
        f'{_checked.listed(differences)}. {len(members)} of {len(names)} are '
        'alike.',
    )


def dtype(case: Case) -> Iterator[Seen]:
  leaves = case.pool.leaves
  of = lambda k: tuple(sorted((p, str(x.dtype)) for p, x in leaves[k].items()))
  members, others = _commonest({k: of(k) for k in case.members})
  if others:
    path, theirs = next(x for x in of(others[0]) if x not in of(members[0]))
    yield Seen(
        others,
        f'{_tree.name_of(path)} is {theirs} in {case.pool.listed(others)}, and '
        f'{dict(of(members[0]))[path]} in the others.',
    )


def integers(case: Case) -> Iterator[Seen]:
  paths = [
      p
      for p, x in case.pool.leaves[case.members[0]].items()
      if not _tree.is_float(x) and not _tree.is_state(x)
  ]
  of = lambda k: tuple(
      np.asarray(case.pool.read(k)[p]).tobytes() for p in paths
  )
  contents = {k: of(k) for k in case.members} if paths else {}
  _, others = _commonest(contents)
  if others:
    names = [
        _tree.name_of(p)
        for p, *values in zip(paths, *contents.values())
        if len(set(values)) > 1
    ]
    listed = _findings.listed(names)
    yield Seen(others, f'{listed} differ in {case.pool.listed(others)}.', names)


def file(
    *names: str, keys: Sequence[str] = ()
) -> Callable[[Case], Iterator[Seen]]:
  """A check that JSON files next to the weights are the same."""

  def check(case: Case) -> Iterator[Seen]:
    for name in names:
      contents = {
          k: {key: x[key] for key in keys or x if key in x}
          for k, x in _contents(case, name).items()
          if isinstance(x, dict)
      }
      texts = {k: json.dumps(x, sort_keys=True) for k, x in contents.items()}
      members, others = _commonest(texts)
      if others:
        mine, theirs = contents[members[0]], contents[others[0]]
        key = next(x for x in (*mine, *theirs) if mine.get(x) != theirs.get(x))
        yield Seen(
            others,
            f'{key!r} in {name} is {str(theirs.get(key))[:60]} in '
            f'{case.pool.listed(others)}, and {str(mine.get(key))[:60]} in the '
            'others.',
        )
        return

  return check


def _contents(case: Case, name: str) -> dict[int, Any]:
  """Of a JSON file next to the weights, by member; None without one."""
  contents: dict[int, Any] = {}
  paths = getattr(case.pool.ingredients, 'paths', None) or {}
  for k in case.members if paths else ():
    path = pathlib.Path(paths[k])
    path = (path if path.is_dir() else path.parent) / name
    try:
      contents[k] = json.loads(path.read_text()) if path.is_file() else None
    except ValueError:
      contents[k] = None
  return contents


def averageable(case: Case) -> Iterator[Seen]:
  """What the reader refuses: other tokens, LoRA factors, quantized weights."""
  ingredients = case.pool.ingredients
  require = getattr(ingredients, 'require_averageable', lambda k: None)
  for k in case.members:
    try:
      require(k)
    except ValueError as e:
      yield Seen([k], str(e))


def damaged(case: Case) -> Iterator[Seen]:
  if case.measured and case.pool.damaged:  # It reads them.
    bad = sorted(case.pool.damaged)
    yield Seen(bad, case.pool.damaged[bad[0]])


def not_finite(case: Case) -> Iterator[Seen]:
  geometry, finite = case.measured
  bad = geometry.where(~np.all(finite, axis=1))
  bad = [k for k in bad if k in case.members]
  if bad:
    names = sorted(
        _tree.name_of(case.pool.floats(bad[0])[i])
        for i in np.flatnonzero(~np.all(finite, axis=0))
    )
    yield Seen(
        bad,
        f'{case.pool.listed(bad)}: NaN or infinity in '
        f'{_findings.listed(names, 3)}.',
        names,
    )
