"""Studies of a sweep: how many models, and which of their settings, matter.

```
score_fn = studies.soup_scores(ingredients, test_fn)        # of uniform soups
curves = studies.recipes(ingredients, held_out_fn, score_fn)
grown = studies.growth(curves, len(ingredients), num_orders=5)
studies.contributions(configs, held_out_scores)
```

Calibration against the number of models is a growth too:

```
ece = metrics.expected_calibration_error
curves = {
    'soup': studies.soup_scores(ingredients, lambda p: ece(run(p), label)),
    'ensemble': lambda members: ece(logits[list(members)].mean(0), label),
}
grown = studies.growth(curves, len(ingredients), num_orders=20)
```
"""

from collections.abc import Callable
from collections.abc import Iterable
from collections.abc import Mapping
from collections.abc import Sequence
import itertools
from typing import Any
from typing import NamedTuple
import warnings

import jax
from jax.sharding import NamedSharding
import numpy as np

from jaxsoup import landscape
from jaxsoup._recipes import _average
from jaxsoup._recipes import _greedy
from jaxsoup._recipes import _search
from jaxsoup._soup import AtMost
from jaxsoup._soup import Scores
from jaxsoup._soup import SearchInfo
from jaxsoup.typing import Array
from jaxsoup.typing import ArrayLike
from jaxsoup.typing import Config
from jaxsoup.typing import CountFn
from jaxsoup.typing import EvalFn
from jaxsoup.typing import Members
from jaxsoup.typing import ObjectiveFn
from jaxsoup.typing import Params
from jaxsoup.typing import Scalar
from jaxsoup.typing import ScoreFn

# Up to this many models, all pairs are compared.
_ALL_PAIRS = 12


class Growth(NamedTuple):
  """Scores as the number of models grows.

  Attributes:
    nums: numbers of models, `[M]`.
    scores: by name of the curve, `[num_orders, M]`.
  """

  nums: np.ndarray
  scores: dict[str, np.ndarray]


class Varied(NamedTuple):
  """A soup of runs that differ in one hyper-parameter.

  Attributes:
    name: the hyper-parameter.
    members: the runs.
    values: what they have of it.
    best: score of the best of them alone.
    mean: mean of their scores.
    soup: score of their uniform soup.
  """

  name: str
  members: Members
  values: tuple[Any, ...]
  best: float
  mean: float
  soup: float


class Contribution(NamedTuple):
  """How a hyper-parameter goes with the scores of runs.

  Attributes:
    name: the hyper-parameter.
    correlation: Spearman's, of its values with the scores; NaN of a constant.
    p_value: two-sided, of no correlation. Of many hyper-parameters some are
      small by chance.
    inclusion: Spearman's correlation of its values with how often a run is
      taken into a soup; NaN where that was not given.
  """

  name: str
  correlation: float
  p_value: float
  inclusion: float


class Curve(NamedTuple):
  """Scores on the line from the initialization to a model.

  Attributes:
    t: where, `[T]`: 0 is the initialization.
    scores: by data set, `[T]`.
  """

  t: np.ndarray
  scores: dict[str, np.ndarray]


def soup_scores(
    ingredients: Sequence[Params],
    eval_fn: EvalFn,
    scores: Scores | None = None,
) -> Callable[[Members], float]:
  """Scores of uniform soups of some ingredients, each computed once.

  Args:
    ingredients: K pytrees of one structure, or `checkpoints.Ingredients`.
    eval_fn: score of a model.
    scores: remembered scores by members, read and written. A model of which
      it holds only a bound is scored.

  Returns:
    `score_fn(members) -> float`, always exact. Members that are given more than
    once count more than once.

  Example:
    >>> score_fn = soup_scores([1.0, 2.0, 6.0], lambda params: -params)
    >>> score_fn((0, 2)), score_fn((1,))
    (-3.5, -2.0)
  """

  def params_fn(members: Members) -> Params:
    alpha = _search.alpha_of(members, len(ingredients))
    return _average.average(ingredients, alpha).params

  evaluations = _search.Evaluations(
      params_fn, eval_fn, objective=None, log=scores
  )

  def score_fn(members: Members) -> float:
    members = tuple(sorted(members))
    score = evaluations.score(members, members, f'ingredients {members}')
    assert not isinstance(score, AtMost)  # Without a bar.
    return score

  return score_fn


def recipes(
    ingredients: Sequence[Params],
    eval_fn: EvalFn,
    report_fn: ScoreFn,
    *,
    scores: Scores | None = None,
) -> dict[str, ScoreFn]:
  """What can be made of some ingredients, as curves of `growth`.

  Args:
    ingredients: K pytrees of one structure, or `checkpoints.Ingredients`.
    eval_fn: score on the held-out data, which choose.
    report_fn: score of a uniform soup of some ingredients on data that chose
      nothing, from `soup_scores`.
    scores: remembered held-out scores, such as a `checkpoints.ScoreLog`.

  Returns:
    By name, functions of the available members: the 'best single' on the
    held-out data; the 'uniform' soup; the 'greedy' soup, of recipe 1.
  """
  known: Scores = {} if scores is None else scores
  single_fn = soup_scores(ingredients, eval_fn, known)

  def ranked(members: Members) -> list[int]:
    return sorted(members, key=lambda k: (-single_fn((k,)), k))

  def greedy(members: Members) -> Scalar:
    order = ranked(members)
    soup = _greedy.greedy(ingredients, eval_fn, order=order, scores=known)
    return report_fn(soup.info.accepted)

  return {
      'best single': lambda members: report_fn((ranked(members)[0],)),
      'uniform': report_fn,
      'greedy': greedy,
  }


def growth(
    curves: Mapping[str, ScoreFn],
    num_models: int,
    *,
    nums: Iterable[int] | None = None,
    num_orders: int = 3,
    seed: int = 0,
    on_step: CountFn | None = None,
) -> Growth:
  """Scores of the first 1, 2, ... models, over random orders of them.

  Args:
    curves: by name, the score of a set of ingredients, ascending: from
      `recipes`, or of an ensemble:
      `lambda members: accuracy(logits[list(members)].mean(0), label)`.
    num_models: K.
    nums: numbers of models; by default 1 to K.
    num_orders: how many orders.
    seed: of the orders.
    on_step: is called with the number of sets that are done, and that of all.

  Returns:
    A `Growth`.

  Raises:
    ValueError: numbers of models that are not in 1..K.

  Example:
    >>> grown = growth({'sum': lambda members: sum(members)}, 3, num_orders=2)
    >>> grown.nums.tolist(), grown.scores['sum'].tolist()
    ([1, 2, 3], [[2.0, 2.0, 3.0], [2.0, 3.0, 3.0]])

  Source: Wortsman et al. 2022, appendix B; on calibration: appendix on it.
  """
  nums = list(range(1, num_models + 1) if nums is None else nums)
  if not nums or not all(1 <= num <= num_models for num in nums):
    raise ValueError(
        f'nums are {nums} of {num_models} models: expected numbers in '
        f'1..{num_models}, at least one.'
    )
  rng = np.random.default_rng(seed)
  scores = {name: np.zeros((num_orders, len(nums))) for name in curves}
  for i in range(num_orders):
    order = rng.permutation(num_models).tolist()
    for j, num in enumerate(nums):
      members = tuple(sorted(order[:num]))
      for name, score_fn in curves.items():
        scores[name][i, j] = float(jax.device_get(score_fn(members)))
      if on_step is not None:
        on_step(i * len(nums) + j + 1, num_orders * len(nums))
  return Growth(np.array(nums), scores)


def random_orders(
    ingredients: Sequence[Params],
    eval_fn: EvalFn,
    *,
    num_orders: int = 3,
    seed: int = 0,
    scores: Scores | None = None,
) -> list[SearchInfo]:
  """Greedy soups whose ingredients are tried in random orders.

  Args:
    ingredients: K pytrees of one structure, or `checkpoints.Ingredients`.
    eval_fn: score on the held-out data.
    num_orders: how many orders.
    seed: of the orders.
    scores: remembered scores, read and written.

  Returns:
    The `info` of each; `soup_scores` reports on `info.accepted`.

  Source: Wortsman et al. 2022, table 3.
  """
  known: Scores = {} if scores is None else scores
  rng = np.random.default_rng(seed)
  num = len(ingredients)
  orders = [rng.permutation(num).tolist() for _ in range(num_orders)]
  return [
      _greedy.greedy(ingredients, eval_fn, order=order, scores=known).info
      for order in orders
  ]


def groups(
    configs: Sequence[Config], *, ignore: Iterable[str] = ('seed',)
) -> dict[str, list[Members]]:
  """Runs that differ in one hyper-parameter only.

  Args:
    configs: hyper-parameters of each run, `[K]`: of a checkpoint of an
      experiment, `metadata(k).custom['jaxsoup']['metadata']['config']`.
    ignore: hyper-parameters that may differ as well; none may, in the group
      that varies one of these.

  Returns:
    By hyper-parameter, groups of at least two runs with different values of it.

  Example:
    >>> configs = [dict(lr=1, wd=0), dict(lr=2, wd=0), dict(lr=2, wd=1)]
    >>> groups(configs)
    {'lr': [(0, 1)], 'wd': [(1, 2)]}
  """
  ignore = set(ignore)
  names = sorted({name for config in configs for name in config})
  members_of = {}
  for name in names:
    free = {name} if name in ignore else {name} | ignore
    alike: dict[tuple[tuple[str, str], ...], list[int]] = {}
    for k, config in enumerate(configs):
      rest = sorted((n, repr(v)) for n, v in config.items() if n not in free)
      alike.setdefault(tuple(rest), []).append(k)
    members_of[name] = [
        tuple(members)
        for members in alike.values()
        if len({repr(configs[k].get(name)) for k in members}) > 1
    ]
  return {name: members for name, members in members_of.items() if members}


def connected_pairs(
    scores: Sequence[float] | np.ndarray, members: Iterable[int] | None = None
) -> list[tuple[int, int]]:
  """All pairs of models, or of many models some that connect them.

  Of n > 12: each with the best one, and with its neighbours in the order of
  the scores: 2 n - 3 pairs.

  Args:
    scores: higher is better, `[K]`.
    members: n of the K models; all by default.

  Returns:
    Pairs (i, j) with i < j.

  Example:
    >>> connected_pairs([0.9, 0.7, 0.8])
    [(0, 1), (0, 2), (1, 2)]
    >>> len(connected_pairs([0.1] * 20))
    37
  """
  members = range(len(scores)) if members is None else sorted(members)
  if len(members) <= _ALL_PAIRS:
    return list(itertools.combinations(members, 2))
  best, *others = sorted(members, key=lambda k: -scores[k])
  pairs = [(best, k) for k in others] + list(itertools.pairwise(others))
  return [(min(pair), max(pair)) for pair in pairs]


def one_varied(
    configs: Sequence[Config],
    score_fn: ScoreFn,
    *,
    ignore: Iterable[str] = ('seed',),
) -> list[Varied]:
  """Soups of runs that differ in one hyper-parameter only.

  Args:
    configs: as in `groups`.
    score_fn: score of a uniform soup of some runs, from `soup_scores`.
    ignore: as in `groups`.

  Returns:
    One `Varied` for each group.

  Source: Wortsman et al. 2022, appendix on varying one hyper-parameter.
  """
  soups = []
  for name, sets in groups(configs, ignore=ignore).items():
    for members in sets:
      singles = [float(score_fn((k,))) for k in members]
      soups.append(
          Varied(
              name,
              members,
              values=tuple(configs[k].get(name) for k in members),
              best=max(singles),
              mean=float(np.mean(singles)),
              soup=float(score_fn(members)),
          )
      )
  return soups


def contributions(
    configs: Sequence[Config],
    scores: Array | Sequence[float],
    frequency: Array | Sequence[float] | None = None,
    *,
    ignore: Iterable[str] = ('seed',),
) -> list[Contribution]:
  """Which hyper-parameters go with good runs, and with runs that soups take.

  Spearman's correlation: that of the ranks, so that a learning rate and its
  logarithm are the same.

  Args:
    configs: hyper-parameters of each run, `[K]`; those that are not numbers in
      every run are left out.
    scores: held-out score of each run, `[K]`.
    frequency: how often each run is taken by a search on resampled held-out
      data, `[K]`: `statistics.stability(...).frequency`.
    ignore: hyper-parameters whose numbers have no order.

  Returns:
    One `Contribution` for each hyper-parameter, the strongest first.

  Raises:
    ValueError: numbers of configs, scores and frequencies that differ.

  Example:
    >>> configs = [dict(lr=x, mixup=y) for x, y in [(1, 0), (2, 1), (4, 0)]]
    >>> [c.correlation for c in contributions(configs, [0.7, 0.8, 0.9])]
    [1.0, 0.0]

  Source: Spearman 1904, "The proof and measurement of association between two
  things".
  """
  lengths = {'configs': len(configs), 'scores': len(scores)}
  if frequency is not None:
    lengths['frequency'] = len(frequency)
  if len(set(lengths.values())) > 1:
    raise ValueError(
        f'The numbers of runs are {lengths}: expected equal numbers.'
    )
  rows = []
  names = {name for config in configs for name in config} - set(ignore)
  for name in sorted(names):
    values = [config.get(name) for config in configs]
    if not all(isinstance(x, (bool, int, float, np.number)) for x in values):
      continue
    column = np.array(values, float)
    correlation, p_value = rank_correlation(column, scores)
    inclusion = float('nan')
    if frequency is not None:
      inclusion, _ = rank_correlation(column, frequency)
    rows.append(Contribution(name, correlation, p_value, inclusion))
  strength = lambda c: np.nan_to_num(abs(c.correlation), nan=-1)
  return sorted(rows, key=strength, reverse=True)


def rank_correlation(x: ArrayLike, y: ArrayLike) -> tuple[float, float]:
  """Spearman's correlation: Pearson's, of the ranks.

  Args:
    x: `[N]`, such as the angles of pairs.
    y: `[N]`, such as what each of them gains.

  Returns:
    The correlation, and the two-sided p-value of no correlation. NaN where one
    of the two is constant.

  Example:
    >>> correlation, p_value = rank_correlation([1, 2, 3, 9], [4, 3, 2, 1])
    >>> correlation
    -1.0

  Source: Spearman 1904, "The proof and measurement of association between two
  things".
  """
  from scipy import stats

  with warnings.catch_warnings():
    # A constant, or only two runs: the answer is NaN, which says enough.
    warnings.simplefilter('ignore')
    spearman = stats.spearmanr(x, y)
  return float(spearman.statistic), float(spearman.pvalue)


def wise_ft(
    theta_0: Params,
    models: Mapping[str, Params],
    score_fns: Mapping[str, ObjectiveFn],
    *,
    num: int = 11,
    chunk_size: int = 1,
    is_traced: bool = True,
    sharding: NamedSharding | None = None,
) -> dict[str, Curve]:
  """Robust fine-tuning: scores on the line from the initialization.

  `score((1 - t) theta_0 + t theta)` for t from 0 to 1, of singles and soups.

  Args:
    theta_0: the zero-shot or pre-trained parameters.
    models: fine-tuned models and soups, by name.
    score_fns: by data set, as the loss in `landscape.line`.
    num: number of points, T.
    chunk_size, is_traced, sharding: as in `landscape.line`.

  Returns:
    A `Curve` for each model.

  Raises:
    ValueError: as in `landscape.line`.

  Source: Wortsman et al. 2022, "Robust fine-tuning of zero-shot models"; of
  soups: "Model soups", appendix on robust fine-tuning.
  """
  curves = {}
  for name, params in models.items():
    paths = {
        data: landscape.line(
            score_fn,
            theta_0,
            params,
            num,
            chunk_size=chunk_size,
            is_traced=is_traced,
            sharding=sharding,
        )
        for data, score_fn in score_fns.items()
    }
    t = np.linspace(0, 1, num)
    curves[name] = Curve(t, {data: path.loss for data, path in paths.items()})
  return curves
