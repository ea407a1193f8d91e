"""What each finding of the paper means in numbers, stated before a run.

```
for finding, value_fn in criteria.CRITERIA[5].items():
  values = [value_fn(figures) for figures in of_seeds]
  criteria.verdict(statistics.over_repeats(values, share=share))
```

A finding holds if the interval of its number over the seeds is above 0, and
does not hold if it is below 0; else these seeds cannot tell. Numbers are in
points unless the finding says otherwise.
"""

from collections.abc import Callable
from collections.abc import Mapping

from jaxsoup.statistics import Comparison

Figures = Mapping[str, Mapping[str, float]]
# The number of a finding, of the figures of one seed.
ValueFn = Callable[[Figures], float]


def verdict(number: Comparison) -> str:
  """'holds', 'does not hold' or 'cannot tell'."""
  if number.is_significant:
    return 'holds' if number.gain > 0 else 'does not hold'
  return 'cannot tell'


def _above(first: str, second: str, where: str, slack: float = 0.0) -> ValueFn:
  """How far a row is above another, or above less than `slack` below it."""
  column = f'{where}, %'
  return lambda rows: slack + (rows[first][column] - rows[second][column])


def _beats(first: str, second: str, *where: str) -> dict[str, ValueFn]:
  """Findings that say just that."""
  return {
      f'{first} above {second}, on {x}': _above(first, second, x) for x in where
  }


def _number(row: str | int, column: str, at_least=0.0, sign=1) -> ValueFn:
  """A figure above a number, or below it (sign -1); rows by name or place."""
  name_in = lambda rows: row if isinstance(row, str) else [*rows][row]
  return lambda rows: sign * (rows[name_in(rows)][column] - at_least)


def _grows(prefix: str, column: str, sign: int = 1) -> ValueFn:
  """From one model to all: from 'PREFIX of 1' to the last 'PREFIX of K'."""

  def value_fn(rows):
    names = [name for name in rows if name.startswith(f'{prefix} of ')]
    return sign * (rows[names[-1]][column] - rows[names[0]][column])

  return value_fn


def _gain(prefix: str) -> ValueFn:
  first, second = f'{prefix}: uniform soup', f'{prefix}: best single'
  return _above(first, second, 'shifts')


def _is_significant(row: str) -> ValueFn:
  return lambda rows: (rows[row]['p, paired bootstrap'] < 0.05) - 0.5


_WHERE = ('test', 'shifts')
_BARRIER, _ECE = 'barrier, points', 'ECE of 15 bins, points'
# Of these the paper's own finding is not at hand: what we would call an answer.
OURS = (6, 15, 16, 19)
CRITERIA: dict[int, dict[str, ValueFn]] = {
    1: {
        f'middle of the two best models above their mean, on {where}': _above(
            'middle of the two', 'mean of the two', where
        )
        for where in _WHERE
    },
    2: {
        f'the gain grows with the angle, rank correlation on {where}': _number(
            "Spearman's correlation", f'gain on {where}, points'
        )
        for where in _WHERE
    },
    3: {
        'ensemble of two above their soup, on test': _number(
            'soup less ensemble', 'on test, points', sign=-1
        ),
        'soup of two above their ensemble, on shifts': _number(
            'soup less ensemble', 'on shifts, points'
        ),
    },
    4: {
        'barrier below 1 at the lowest rate': _number(0, _BARRIER, 1.0, -1),
        'barrier above 1 at the highest rate': _number(-1, _BARRIER, 1.0),
    },
    5: _beats('greedy', 'best single', *_WHERE)
    | _beats('learned', 'best single', *_WHERE)
    | _beats('uniform', 'best single', 'shifts'),
    6: {
        'greedy in random order at most half a point below greedy by score, on '
        'test': _above('greedy, random order', 'greedy, by score', 'test', 0.5)
    },
    7: {
        f'{name} of all above one model, on {where}': _grows(
            name, f'{where}, %'
        )
        for name in ('uniform', 'greedy', 'ensemble')
        for where in _WHERE
    },
    8: {
        f'soup of runs that differ in {name} above their mean, on shifts': (
            _above(f'{name} varies: soup', f'{name} varies: mean', 'shifts')
        )
        for name in ('seed', 'learning_rate', 'mixup', 'affine')
    },
    9: _beats('greedy ensemble', 'greedy', 'test')
    | _beats('greedy', 'greedy ensemble', 'shifts'),
    10: {
        'correlation of approximation and difference above 0.8, at rates of '
        'the sweep': _number('rates of the sweep', 'correlation', 0.8)
    },
    11: {
        f'{finding}{words}': _grows(f'{prefix}{name}', _ECE, sign)
        for words, prefix in {
            '': '',
            ', of runs on hard labels': 'hard labels, ',
        }.items()
        for finding, name, sign in (
            ('an ensemble lowers the calibration error', 'ensemble', -1),
            ('a soup does not lower it', 'soup', 1),
        )
    },
    12: {
        'the gain over the best single model is larger with broad '
        'pre-training, on shifts': lambda rows: (
            _gain('broad')(rows) - _gain('narrow')(rows)
        )
    },
    13: {
        'barrier below 1 from pre-trained weights': _number(
            'pre-trained', _BARRIER, 1.0, -1
        ),
        **{
            f'barrier above 10 from {words}': _number(words, _BARRIER, 10.0)
            for words in ('one random start', 'a start for each')
        },
    },
    14: {
        f'soup of {name} copies above that of the last parameters, {rate}, on '
        f'{where}': _above(
            f'{rate}, {name}: uniform soup',
            f'{rate}, last: uniform soup',
            where,
        )
        for rate in ('falling rate', 'constant rate')
        for name in ('EMA', 'SWA')
        for where in _WHERE
    },
    15: {
        'soup of runs with SAM above that of runs without, on test': _above(
            'SAM: uniform soup', 'plain: uniform soup', 'test'
        )
    },
    16: {
        'runs taught by the ensemble above runs taught by labels, on test': (
            _above('taught by the ensemble', 'taught by labels', 'test')
        )
    },
    17: {
        'best point between start and best single model above that model, on '
        'shifts': _above('best single, best t', 'best single, t = 1', 'shifts'),
        'best point towards the soup above the best towards one model, on '
        'shifts': _above(
            'uniform soup, best t', 'best single, best t', 'shifts'
        ),
    },
    18: {
        f'soup of three data sets above the start, {where}': _above(
            'soup', 'start', where
        )
        for where in ('their data sets', 'elsewhere')
    },
    19: {
        'soup after a linear probe above that from a random head, on shifts': (
            _above(
                'linear probe: uniform soup',
                'random head: uniform soup',
                'shifts',
            )
        )
    },
    20: {
        f'{name} significantly above the best single model on shifts in more '
        'than half of the seeds (share minus 0.5)': _is_significant(name)
        for name in ('uniform', 'greedy')
    },
    22: {
        'mean of the second half at a constant rate at most half a point below '
        'the falling rate, on test': _above(
            'mean of the second half', 'decayed rate', 'test', 0.5
        ),
        **_beats('mean of the second half', 'last iterate', 'test'),
    },
}
