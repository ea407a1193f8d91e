"""What each finding of the paper means in numbers, stated before a run.

```
for criterion in criteria.CRITERIA[5]:
  values = [criterion.value_fn(figures) for figures in of_seeds]
  criteria.verdict(statistics.over_repeats(values, share=share))
```

A finding holds if the interval of its number over the seeds is above 0, and
does not hold if it is below 0; else these seeds cannot tell.
"""

from collections.abc import Callable
from collections.abc import Mapping
from typing import NamedTuple

from jaxsoup.statistics import Comparison

Figures = Mapping[str, Mapping[str, float]]


class Criterion(NamedTuple):
  """A finding, and a number that is above 0 where it holds.

  Attributes:
    finding: what the number measures, in points unless it says otherwise.
    value_fn: the number, of the figures of one seed.
    is_ours: whether the paper's own finding is not at hand, so that this is
      what we would call an answer.
  """

  finding: str
  value_fn: Callable[[Figures], float]
  is_ours: bool = False


def verdict(number: Comparison) -> str:
  """'holds', 'does not hold' or 'cannot tell'."""
  if number.is_significant:
    return 'holds' if number.gain > 0 else 'does not hold'
  return 'cannot tell'


def _difference(first: str, second: str, column: str):
  """How far a row is above another."""
  return lambda rows: rows[first][column] - rows[second][column]


def _above(first: str, second: str, where: str) -> Callable[[Figures], float]:
  return _difference(first, second, f'{where}, %')


def _beats(first: str, second: str, where: str, words: str = '') -> Criterion:
  """A finding that says just that."""
  finding = words or f'{first} above {second}'
  return Criterion(f'{finding}, on {where}', _above(first, second, where))


def _both(first: str, second: str, words: str = '') -> list[Criterion]:
  return [_beats(first, second, x, words) for x in ('test', 'shifts')]


def _number(row: str, column: str, at_least: float = 0.0, sign: int = 1):
  """How far a figure is above a number, or below it (sign -1)."""
  return lambda rows: sign * (rows[row][column] - at_least)


def _of_all(rows: Figures, prefix: str) -> list[str]:
  """Rows 'PREFIX of 1', 'PREFIX of 4' and so on."""
  return [name for name in rows if name.startswith(f'{prefix} of ')]


def _grows(prefix: str, column: str, sign: int = 1):
  """From one model to all."""

  def value_fn(rows):
    names = _of_all(rows, prefix)
    return sign * (rows[names[-1]][column] - rows[names[0]][column])

  return value_fn


def _rates(at: int, at_least: float, sign: int):
  """The barrier at the lowest (0) or highest (-1) rate against a number."""
  column = 'barrier, points'
  return lambda rows: sign * ([*rows.values()][at][column] - at_least)


def _gain_differs(rows: Figures) -> float:
  gain = lambda prefix: _above(
      f'{prefix}: uniform soup', f'{prefix}: best single', 'shifts'
  )(rows)
  return gain('broad') - gain('narrow')


def _is_significant(row: str) -> Callable[[Figures], float]:
  return lambda rows: (rows[row]['p, paired bootstrap'] < 0.05) - 0.5


_RATE, _CONSTANT = 'falling rate', 'constant rate'
CRITERIA: dict[int, list[Criterion]] = {
    1: _both(
        'middle of the two',
        'mean of the two',
        'middle of the two best models ' 'above their mean',
    ),
    2: [
        Criterion(
            f'the gain grows with the angle, rank correlation on {where}',
            _number("Spearman's correlation", f'gain on {where}, points'),
        )
        for where in ('test', 'shifts')
    ],
    3: [
        Criterion(
            'ensemble of two above their soup, on test',
            _number('soup less ensemble', 'on test, points', sign=-1),
        ),
        Criterion(
            'soup of two above their ensemble, on shifts',
            _number('soup less ensemble', 'on shifts, points'),
        ),
    ],
    4: [
        Criterion('barrier below 1 at the lowest rate', _rates(0, 1.0, -1)),
        Criterion('barrier above 1 at the highest rate', _rates(-1, 1.0, 1)),
    ],
    5: [
        *_both('greedy', 'best single'),
        *_both('learned', 'best single'),
        _beats('uniform', 'best single', 'shifts'),
    ],
    6: [
        Criterion(
            'greedy in random order at most half a point below greedy by '
            'score, on test',
            lambda rows: 0.5
            + _above('greedy, random order', 'greedy, by score', 'test')(rows),
            is_ours=True,
        )
    ],
    7: [
        Criterion(
            f'{name} of all above one model, on {where}',
            _grows(name, f'{where}, %'),
        )
        for name in ('uniform', 'greedy', 'ensemble')
        for where in ('test', 'shifts')
    ],
    8: [
        _beats(
            f'{name} varies: soup',
            f'{name} varies: mean',
            'shifts',
            f'soup of runs that differ in {name} above their mean',
        )
        for name in ('seed', 'learning_rate', 'mixup', 'affine')
    ],
    9: [
        _beats('greedy ensemble', 'greedy', 'test'),
        _beats('greedy', 'greedy ensemble', 'shifts'),
    ],
    10: [
        Criterion(
            'correlation of approximation and difference above 0.8, at rates '
            'of the sweep',
            _number('rates of the sweep', 'correlation', 0.8),
        )
    ],
    11: [
        criterion
        for words, prefix in (
            ('', ''),
            (', of runs on hard labels', 'hard labels, '),
        )
        for criterion in (
            Criterion(
                f'an ensemble lowers the calibration error{words}',
                _grows(f'{prefix}ensemble', 'ECE of 15 bins, points', -1),
            ),
            Criterion(
                f'a soup does not lower it{words}',
                _grows(f'{prefix}soup', 'ECE of 15 bins, points'),
            ),
        )
    ],
    12: [
        Criterion(
            'the gain over the best single model is larger with broad '
            'pre-training, on shifts',
            _gain_differs,
        )
    ],
    13: [
        Criterion(
            'barrier below 1 from pre-trained weights',
            _number('pre-trained', 'barrier, points', 1.0, -1),
        ),
        *(
            Criterion(
                f'barrier above 10 from {words}',
                _number(words, 'barrier, points', 10.0),
            )
            for words in ('one random start', 'a start for each')
        ),
    ],
    14: [
        _beats(
            f'{rate}, {name}: uniform soup',
            f'{rate}, last: uniform soup',
            where,
            f'soup of {name} copies above that of the last parameters, {rate}',
        )
        for rate in (_RATE, _CONSTANT)
        for name in ('EMA', 'SWA')
        for where in ('test', 'shifts')
    ],
    15: [
        Criterion(
            'soup of runs with SAM above that of runs without, on test',
            _above('SAM: uniform soup', 'plain: uniform soup', 'test'),
            is_ours=True,
        )
    ],
    16: [
        Criterion(
            'runs taught by the ensemble above runs taught by labels, on test',
            _above('taught by the ensemble', 'taught by labels', 'test'),
            is_ours=True,
        )
    ],
    17: [
        _beats(
            'best single, best t',
            'best single, t = 1',
            'shifts',
            'best point between start and best single model above that model',
        ),
        _beats(
            'uniform soup, best t',
            'best single, best t',
            'shifts',
            'best point towards the soup above the best towards one model',
        ),
    ],
    18: [
        Criterion(
            f'soup of three data sets above the start, {column.rstrip(", %")}',
            _difference('soup', 'start', column),
        )
        for column in ('their data sets, %', 'elsewhere, %')
    ],
    19: [
        Criterion(
            'soup after a linear probe above that from a random head, on '
            'shifts',
            _above(
                'linear probe: uniform soup',
                'random head: uniform soup',
                'shifts',
            ),
            is_ours=True,
        )
    ],
    20: [
        Criterion(
            f'{name} significantly above the best single model on shifts in '
            'more than half of the seeds (share minus 0.5)',
            _is_significant(name),
        )
        for name in ('uniform', 'greedy')
    ],
    22: [
        Criterion(
            'mean of the second half at a constant rate at most half a point '
            'below the falling rate, on test',
            lambda rows: 0.5
            + _above('mean of the second half', 'decayed rate', 'test')(rows),
        ),
        _beats('mean of the second half', 'last iterate', 'test'),
    ],
}
