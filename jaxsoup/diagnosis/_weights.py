"""What the weights alone tell: findings that need no data.

```
examined = examine(pool)
examined.findings, examined.sound
```
"""

from collections.abc import Iterator
from collections.abc import Sequence
from typing import Any
from typing import NamedTuple

import numpy as np

from jaxsoup import _checked
from jaxsoup import _tree
from jaxsoup.diagnosis import _findings
from jaxsoup.diagnosis import _geometry
from jaxsoup.diagnosis import _kinship
from jaxsoup.diagnosis import _motion
from jaxsoup.diagnosis import _pool
from jaxsoup.typing import Json
from jaxsoup.typing import ProgressFn

Finding = _findings.Finding


class Examined(NamedTuple):
  """Findings from the weights, and what can be averaged.

  Attributes:
    findings: not yet ranked.
    usable: ingredients that can be evaluated: of one structure, finite, each
      model once.
    sound: those of them without a problem.
    paths: leaves that are floats.
    measured: figures for `Diagnosis.measured`.
  """

  findings: list[Finding]
  usable: list[int]
  sound: list[int]
  paths: list[_tree.Path]
  measured: Json


def examine(
    pool: _pool.Pool, progress_fn: ProgressFn | None = None
) -> Examined:
  """Walks once over all ingredients, and says what is wrong with them."""
  members, findings = _structure(pool)
  leaves = pool.leaves[members[0]]
  paths = [p for p, x in leaves.items() if _tree.is_float(x)]
  _checked.require_floats(paths)
  findings += _dtypes(pool, members)
  findings += _integers(pool, members, leaves)
  geometry = _geometry.measure(pool, paths, members, progress_fn)
  members, geometry, more = _readable(pool, geometry, members)
  findings += more
  usable, geometry, more = _distinct(pool, geometry, members)
  findings += more
  num = len(pool)
  measured = {
      'norms': np.full(num, np.nan),
      'distances': np.full((num, num), np.nan),
      'cosines': np.full((num, num), np.nan),
  }
  sound = usable
  if len(usable) > 1:
    geometry, more = _start(pool, geometry)
    findings += more
    more, sound = _kin(pool, geometry, usable)
    findings += more
    inside = geometry.take([usable.index(k) for k in sound])
    findings += _motion.examine(pool, inside, sound)
    _motion.fill(measured, geometry, usable)
  out = {k for f in findings for k in f.leave_out}
  mixed = {k for f in findings if f.code == 'dtype' for k in f.ingredients}
  return Examined(
      findings=[*findings, *_batch_norm(geometry)],
      usable=[k for k in usable if k not in mixed],
      sound=[k for k in usable if k not in out],
      paths=paths,
      measured=measured,
  )


def _structure(pool) -> tuple[list[int], list[Finding]]:
  """Ingredients of the commonest structure, and which others there are."""
  groups: dict[Any, list[int]] = {}
  for k, leaves in enumerate(pool.leaves):
    shapes = frozenset((p, tuple(x.shape)) for p, x in leaves.items())
    groups.setdefault(shapes, []).append(k)
  members = max(groups.values(), key=len)
  others = tuple(k for k in range(len(pool)) if k not in members)
  if not others:
    return members, []
  first, other = pool.leaves[members[0]], pool.leaves[others[0]]
  mismatches = [
      text
      for text in _checked.mismatches(first, other)
      if ' dtype ' not in text
  ]
  more = f' (and {len(mismatches) - 3} more)' if len(mismatches) > 3 else ''
  is_head = len(mismatches) <= 4
  return members, [
      Finding(
          severity='error',
          code='structure',
          title='Not all have the same architecture'
          + (', or their heads differ' if is_head else ''),
          seen=f'Compared with {pool.names[members[0]]}, in '
          f'{pool.names[others[0]]} {"; ".join(mismatches[:3])}{more}. '
          f'{len(members)} of {len(pool)} are alike; {pool.listed(others)} '
          f'{_are(others)} not.',
          meaning='Only leaves of one shape can be averaged. The other '
          'findings leave out ingredients that differ.',
          remedy='If only the heads differ, soup the subtrees that agree, such '
          "as [p['backbone'] for p in ingredients]. Otherwise leave them out.",
          ingredients=others,
          leave_out=others,
      )
  ]


def _dtypes(pool, members) -> Iterator[Finding]:
  def dtypes(k):
    return tuple(sorted((p, str(x.dtype)) for p, x in pool.leaves[k].items()))

  kinds: dict[Any, list[int]] = {}
  for k in members:
    kinds.setdefault(dtypes(k), []).append(k)
  if len(kinds) == 1:
    return
  common = max(kinds, key=lambda kind: len(kinds[kind]))
  others = tuple(k for k in members if k not in kinds[common])
  path, theirs = next(x for x in dtypes(others[0]) if x not in common)
  ours = dict(common)[path]
  yield Finding(
      severity='warning',
      code='dtype',
      title='Ingredients are stored in different dtypes',
      seen=f'{_tree.name_of(path)} is {theirs} in {pool.listed(others)}, '
      f'and {ours} in the others.',
      meaning='Recipes do not mix dtypes: it is not clear which one the '
      'soup should have.',
      remedy='Cast all to the wider dtype, '
      'jax.tree.map(lambda x: x.astype(jnp.float32), params), or leave out '
      f'{pool.listed(others)}.',
      ingredients=others,
      leave_out=others,
  )


def _integers(pool, members, leaves) -> Iterator[Finding]:
  paths = [
      p
      for p, x in leaves.items()
      if not _tree.is_float(x) and not _tree.is_state(x)
  ]
  differ: set[str] = set()
  others: set[int] = set()
  for path, rows in pool.chunks(paths, members):
    unequal = [k for k, row in zip(members, rows) if (row != rows[0]).any()]
    if unequal:
      differ.add(_tree.name_of(path))
      others.update(unequal)
  if not differ:
    return
  yield Finding(
      severity='error',
      code='integers',
      title='Integers or booleans differ',
      seen='The ingredients have different values of '
      f'{_findings.listed(sorted(differ), range(len(differ)))}.',
      meaning='Only floats are averaged, so a recipe refuses these models. '
      'Integers that differ may be quantized weights, or masks.',
      remedy='Convert quantized weights to floats, or pass parameters '
      'without these leaves.',
      ingredients=tuple(sorted(others)),
      leaves=tuple(sorted(differ)),
      leave_out=tuple(sorted(others)),
  )


def _readable(pool, geometry, members):
  """Those whose values are numbers, and as they were stored."""
  findings = []
  damaged = tuple(sorted(pool.damaged))
  if damaged:
    findings.append(
        Finding(
            severity='error',
            code='damaged',
            title='Files are damaged',
            seen=pool.damaged[damaged[0]],
            meaning=f'The values in {pool.listed(damaged)} are not those that '
            'were saved, and would go into the soup.',
            remedy='Restore the files from a copy, or leave them out.',
            ingredients=damaged,
            leave_out=damaged,
        )
    )
  bad = [i for i, ok in enumerate(geometry.finite.all(0)) if not ok]
  bad = [i for i in bad if members[i] not in damaged]
  if bad:
    ks = tuple(members[i] for i in bad)
    leaves = [
        _tree.name_of(p)
        for p, ok in zip(geometry.paths, geometry.finite[:, bad].all(1))
        if not ok
    ]
    findings.append(
        Finding(
            severity='error',
            code='not_finite',
            title='Weights that are NaN or infinite',
            seen=f'{pool.listed(ks)} {_have(ks)} NaN or infinity in '
            f'{_findings.listed(leaves, range(len(leaves)), 3)}.',
            meaning='One NaN makes the soup NaN. The training diverged, or the '
            'file is damaged.',
            remedy=f'Leave {_them(ks)} out; check the loss of that training.',
            ingredients=ks,
            leaves=tuple(leaves),
            leave_out=ks,
        )
    )
  keep = [
      i for i, k in enumerate(members) if i not in bad and k not in pool.damaged
  ]
  return [members[i] for i in keep], geometry.take(keep), findings


def _distinct(pool, geometry, members):
  """Each model once, and none that is theta_0."""
  groups: dict[tuple[Any, ...], list[int]] = {}
  for i in range(len(members)):
    groups.setdefault(tuple(geometry.same[:, i]), []).append(i)
  findings = []
  many = [[members[i] for i in g] for g in groups.values() if len(g) > 1]
  if many:
    again = tuple(k for group in many for k in group[1:])
    findings.append(
        Finding(
            severity='warning',
            code='duplicate',
            title='The same model appears more than once',
            seen='; '.join(map(pool.listed, many)) + ' have equal weights.',
            meaning='It would count several times. Perhaps a run was not saved '
            'where you expect it.',
            remedy=f'Leave out {pool.listed(again)}.',
            ingredients=tuple(k for group in many for k in group),
            leave_out=again,
        )
    )
  keep = [group[0] for group in groups.values()]
  still = [i for i in keep if _is_start(geometry)[i]]
  if still:
    ks = tuple(members[i] for i in still)
    findings.append(
        _motion.unmoved(pool, ks, f'{pool.listed(ks)} and theta_0 are equal.')
    )
  keep = [i for i in keep if i not in still]
  return [members[i] for i in keep], geometry.take(keep), findings


def _is_start(geometry) -> np.ndarray:
  """Whether an ingredient has all leaves of theta_0, [K]."""
  rows = geometry.has_start
  return geometry.is_start[rows].all(0) & rows.any()


def _start(pool, geometry):
  """Whether theta_0 is what they came from; forgotten if it is not."""
  if not pool.start:
    return geometry, []
  related = _kinship.relatives(geometry, _kinship.unrelated(geometry))
  if related[-1, :-1].any():
    return geometry, []
  gram = geometry.gram.copy()
  gram[:, -1] = gram[:, :, -1] = np.nan
  return geometry._replace(gram=gram), [
      Finding(
          severity='warning',
          code='start',
          title='theta_0 is not what they were fine-tuned from',
          seen='The matrices of theta_0 are unrelated to those of all '
          'ingredients, or have other names or shapes.',
          meaning='Task vectors, and recipes that need theta_0 (Model Stock, '
          'WiSE-FT), would be wrong. The other findings do not use it.',
          remedy='Pass the checkpoint that fine-tuning started from.',
      )
  ]


def _kin(pool, geometry, members) -> tuple[list[Finding], list[int]]:
  """Families of ingredients, and those with parts of another family."""
  unrelated = _kinship.unrelated(geometry)
  families = _families(_kinship.relatives(geometry, unrelated))
  main, others = families[0], families[1:]
  findings, permuted = [], []
  leaves = lambda i: _largest(geometry, unrelated[:, i, main[0]])
  for i in [i for family in others for i in family]:
    moved_leaves = _kinship.permuted_leaves(
        pool, geometry, leaves(i), members[i], members[main[0]]
    )
    if moved_leaves:
      permuted.append((i, moved_leaves))
  moved = {i for i, _ in permuted}
  rest = [[i for i in family if i not in moved] for family in others]
  if any(rest):
    families = [[members[i] for i in f] for f in [main, *filter(None, rest)]]
    findings.append(_initializations(pool, geometry, families, members))
  part_findings, outside, more = _parts(
      pool, geometry, unrelated, main, members
  )
  permuted += more
  if permuted:
    findings.append(_permuted(pool, geometry, permuted, members))
  outside |= {i for i, _ in permuted}
  sound = [members[i] for i in main if i not in outside]
  return findings + part_findings, sound


def _families(related: np.ndarray) -> list[list[int]]:
  """Groups of ingredients; theta_0 joins those that come from it."""
  num = len(related) - 1
  groups = [[i for i in g if i < num] for g in _geometry.groups_of(related)]
  return sorted(filter(None, groups), key=lambda g: -len(g))


def _largest(geometry, among: np.ndarray, most: int = 12) -> list[int]:
  """The largest of some leaves: reading more would tell no more."""
  rows = np.flatnonzero(among)
  return rows[np.argsort(-geometry.sizes[rows], kind='stable')][:most].tolist()


def _initializations(pool, geometry, families, members) -> Finding:
  others = tuple(k for family in families[1:] for k in family)
  total = geometry.gram[geometry.trained].sum(0)[:-1, :-1]
  norms = np.sqrt(np.diag(total))
  cosines = total / norms[:, None] / norms
  place = {k: i for i, k in enumerate(members)}
  cosine = lambda a, b: cosines[place[a], place[b]]
  if len(families[0]) > 1:
    inside = f'{cosine(*families[0][:2]):.2f} within the largest group, '
  else:
    inside = ''
  shown = '; '.join(map(pool.listed, families[:4]))
  return Finding(
      severity='error',
      code='initialization',
      title='Not fine-tuned from the same initialization',
      seen=f'{len(families)} groups with unrelated matrices '
      f'(cosine of the weights {inside}'
      f'{cosine(families[0][0], families[1][0]):.2f} between groups): {shown}.',
      meaning='Models from different initializations lie in different basins: '
      'their units do not correspond, and the average is noise.',
      remedy='Soup only models from one initialization'
      + (f': here {pool.listed(families[0])}' if len(families[0]) > 1 else '')
      + '. In a sweep, fix the seed of the initialization (and of a new head) '
      'and vary the other hyper-parameters. Otherwise use an ensemble.',
      ingredients=others,
      leave_out=others,
  )


def _permuted(pool, geometry, permuted, members) -> Finding:
  ks = tuple(sorted(members[i] for i, _ in permuted))
  leaf, share = permuted[0][1][0]
  leaves = sorted(
      {
          _tree.name_of(geometry.paths[x])
          for _, moved in permuted
          for x, _ in moved
      }
  )
  return Finding(
      severity='error',
      code='permuted',
      title='The hidden units are in a different order',
      seen=f'{pool.listed(ks)}: the weights are far from the others, but '
      f'{100 * share:.0f} % of the compared units of '
      f'{_tree.name_of(geometry.paths[leaf])} are the same at another '
      'position.',
      meaning='The same function with its units (or attention heads) in a '
      'different order: an average adds units that do not correspond.',
      remedy='Find what reordered them (a conversion, pruning, another layout '
      'of attention heads), or permute them back before souping.',
      ingredients=ks,
      leaves=tuple(leaves),
      leave_out=ks,
  )


def _parts(pool, geometry, unrelated, main, members):
  """Members of one family with leaves unrelated to those of the others."""
  apart: dict[tuple[int, ...], list[int]] = {}
  for leaf in np.flatnonzero(unrelated.any((1, 2))).tolist():
    rows = [*main, len(members)]
    # A theta_0 that is not there is related to none.
    related = ~unrelated[leaf] & np.isfinite(geometry.gram[leaf])
    related[:, -1] &= _kinship.contain_start(geometry, leaf)
    related[-1] &= related[:, -1]
    families = _families(related[np.ix_(rows, rows)])
    outside = tuple(main[i] for family in families[1:] for i in family)
    if outside:
      apart.setdefault(outside, []).append(leaf)
  findings, permuted, apart_members = [], [], set()
  for outside, leaves in apart.items():
    largest = _largest(geometry, np.isin(range(len(unrelated)), leaves))
    inside = [i for i in main if i not in outside]
    moved = _kinship.permuted_leaves(
        pool, geometry, largest, members[outside[0]], members[inside[0]]
    )
    if moved:
      permuted += [(i, moved) for i in outside]
    else:
      apart_members |= set(outside)
      findings.append(_part(pool, geometry, outside, leaves, main, members))
  return findings, apart_members, permuted


def _part(pool, geometry, outside, leaves, main, members) -> Finding:
  ks = tuple(members[i] for i in outside)
  names = tuple(_tree.name_of(geometry.paths[x]) for x in leaves)
  shown = _findings.listed(names, range(len(names)), 3)
  is_all = len(main) - len(outside) < 2
  share = 100 * geometry.sizes[leaves].sum() / geometry.sizes.sum()
  whose = 'every ingredient' if is_all else pool.listed(ks)
  return Finding(
      severity='error',
      code='part',
      title='A part, perhaps the head, was initialized separately',
      seen=f'In {whose}, the values of {shown} ({share:.2g} % of the '
      'parameters) are unrelated to those of the others, although the rest '
      'comes from one initialization.',
      meaning='Heads that each run initialized at random (or that were never '
      'trained) do not correspond: in an average they cancel.',
      remedy='Initialize the head once, or train it first (linear probe), and '
      'start all runs from it. For these runs: leave these ingredients out, '
      'or soup the rest and train one head on it.',
      ingredients=ks,
      leaves=names,
      leave_out=ks,
  )


def _batch_norm(geometry) -> Iterator[Finding]:
  names = [
      _tree.name_of(p)
      for p, is_statistic in zip(geometry.paths, geometry.statistics)
      if is_statistic
  ]
  if not names:
    return
  yield Finding(
      severity='note',
      code='batch_norm',
      title='The model has BatchNorm',
      seen=f'{len(names)} leaves are running statistics, as {names[0]}.',
      meaning='The statistics of a soup are not the mean of those of its '
      'ingredients: its activations have different means, and smaller '
      'variances.',
      remedy='Re-estimate them on some training images: '
      'jaxsoup.models.batch_norm.recalibrated.',
      leaves=tuple(names),
  )


def _are(ks: Sequence[int]) -> str:
  return 'is' if len(ks) == 1 else 'are'


def _have(ks: Sequence[int]) -> str:
  return 'has' if len(ks) == 1 else 'have'


def _them(ks: Sequence[int]) -> str:
  return 'it' if len(ks) == 1 else 'them'
