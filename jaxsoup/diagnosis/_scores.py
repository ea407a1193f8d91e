"""Checks of held-out scores, which come after the trials."""

from collections.abc import Callable
from collections.abc import Iterator
from collections.abc import Sequence

import numpy as np

from jaxsoup.diagnosis import _findings
from jaxsoup.diagnosis._case import Case
from jaxsoup.diagnosis._case import Seen

# Two models that differ on fewer examples are not told apart by an exact
# McNemar test at 95 %: 2 / 2^6 < 0.05 < 2 / 2^5.
_ALIKE = 6


def _gap(case: Case, k: int) -> float:
  answers = case.trials.answers
  return answers[case.trials.base].score - answers[k].score


def labels(case: Case) -> Iterator[Seen]:
  names, base = case.pool.names, case.trials.base
  for k, (same, turned) in case.trials.labels.items():
    text = (
        f'{names[k]} agrees with {names[base]} on {100 * same:.0f} % of the '
        f'examples, and on {100 * turned:.0f} % with its classes in another '
        'order.'
    )
    yield Seen([k], text, cost=_gap(case, k))


def batch_norm(case: Case) -> Iterator[Seen]:
  full, new = case.trials.full, case.trials.statistics
  if new and case.trials.are_stale:
    text = f'Re-estimated statistics change the score of the soup by {new}.'
    yield Seen((), text, cost=new.value)
  elif new is None and full.is_below and case.has_statistics:
    text = f'The soup is {full} from the best model, with averaged statistics.'
    yield Seen((), text, cost=-full.value)


def _bad(case: Case) -> tuple[list[int], bool]:
  """Members with a barrier, which nothing explains, and if they are most."""
  bad = [k for k in case.trials.bad if k not in case.explained]
  num = sum(k in case.trials.answers for k in case.members)
  return bad, 2 * len(bad) >= num - 1


def _seen_in_pairs(case: Case, bad: Sequence[int], text: str = '') -> Seen:
  names, trials = case.pool.names, case.trials
  pairs = '; '.join(
      f'Half-way between {names[k]} and {names[trials.base]} the score is '
      f'{trials.drops[k].unsigned} below the mean of the two'
      for k in bad[:3]
  )
  worst = max(trials.drops[k].value for k in bad)
  return Seen(bad, f'{text}{pairs}.{case.rates(bad)}', cost=worst)


def barrier(case: Case) -> Iterator[Seen]:
  bad, are_most = _bad(case)
  if bad and are_most:
    text = (
        f'In {len(bad)} of {len(case.members) - 1} pairs there is a barrier. '
    )
    yield _seen_in_pairs(case, bad, text)
  elif case.trials.fall.is_above:
    yield from _unexplained(case)


def unknown(case: Case) -> Iterator[Seen]:
  bad, are_most = _bad(case)
  if bad and not are_most:
    yield _seen_in_pairs(case, bad)
  for k in case.trials.weak:
    if case.off(k) and k not in case.explained:
      text = f' It differs most in {_findings.listed(case.off(k), 3)}.'
      yield _seen_alone(case, k, text)


def weak(is_outside: bool) -> Callable[[Case], Iterator[Seen]]:
  """A check for one that is much worse: perhaps it was not fine-tuned."""

  def check(case: Case) -> Iterator[Seen]:
    for k in case.trials.weak:
      if case.off(k) or k in case.explained:
        continue
      if is_outside == (not case.has_start and _is_outside(case, k)):
        yield _seen_alone(case, k)

  return check


def _seen_alone(case: Case, k: int, text: str = '') -> Seen:
  score = lambda k: case.trials.answers[k].score
  seen = (
      f'{case.pool.names[k]} scores {score(k):.3g}, the best '
      f'{score(case.trials.base):.3g}.{case.rates([k])}{text}'
  )
  return Seen([k], seen, cost=_gap(case, k))


def _is_outside(case: Case, k: int) -> bool:
  """Whether it is far from all others, which are near to each other."""
  g = case.geometry
  if k not in g.members or len(g.members) < 4:
    return False
  distances = g.distances()
  i = g.members.index(k)
  others = np.delete(np.arange(len(distances)), i)
  inside = distances[np.ix_(others, others)]
  # By more than distances vary by chance where all are at right angles.
  usual = np.median(inside[inside > 0])
  return np.median(distances[i, others]) > 1.1 * usual


def uneven(case: Case) -> Iterator[Seen]:
  trials = case.trials
  score, ks = lambda k: trials.answers[k].score, trials.uneven
  if ks:
    text = (
        f'{case.pool.listed(ks)}: {max(map(score, ks)):.3g} at most, and '
        f'{case.pool.names[trials.base]} {score(trials.base):.3g}.'
        f'{case.rates(ks)}'
    )
    yield Seen(ks, text, cost=-trials.full.value)
  elif not trials.fall.is_above:
    yield from _unexplained(case)


def _unexplained(case: Case) -> Iterator[Seen]:
  """A soup that is worse than the best model, and no member is to blame."""
  trials = case.trials
  is_explained = case.explained or trials.bad or trials.weak or trials.uneven
  if trials.full.is_below and not is_explained and not trials.are_stale:
    text = (
        f'The soup is {trials.full} from the best model; it is '
        f'{trials.fall.unsigned} '
        'below the mean of its ingredients, and none has a barrier to the best.'
    )
    yield Seen((), text, cost=-trials.full.value)


def alike(case: Case) -> Iterator[Seen]:
  apart = case.trials.disagreement
  apart = apart[~np.isnan(apart)]
  if apart.size and apart.max() * case.trials.num_predicted < _ALIKE:
    text = f'No two differ on more than {apart.max():.2g} of the examples.'
    yield Seen((), text)
