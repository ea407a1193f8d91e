"""The diagnosis: findings from the weights, then from data, and a verdict."""

from collections.abc import Container
from collections.abc import Iterable
from collections.abc import Iterator
from collections.abc import Sequence
from concurrent import futures
import shlex
from typing import Any

import numpy as np

from jaxsoup.diagnosis import _case
from jaxsoup.diagnosis import _findings
from jaxsoup.diagnosis import _pool
from jaxsoup.diagnosis import _table
from jaxsoup.diagnosis import _trials
from jaxsoup.diagnosis._findings import Finding
from jaxsoup.diagnosis._findings import Verdict
from jaxsoup.typing import EvalFn
from jaxsoup.typing import Json
from jaxsoup.typing import Members
from jaxsoup.typing import OutputsFn
from jaxsoup.typing import Params
from jaxsoup.typing import ParamsFn
from jaxsoup.typing import ProgressFn


def diagnose(
    ingredients: Sequence[Params],
    *,
    theta_0: Params | None = None,
    eval_fn: EvalFn | None = None,
    logits_fn: OutputsFn | None = None,
    recalibrate_fn: ParamsFn | None = None,
    num_examples: int | None = None,
    is_thorough: bool = False,
    executor: futures.Executor | None = None,
    num_ahead: int | None = None,
    names: Sequence[str] | None = None,
    progress_fn: ProgressFn | None = None,
) -> _findings.Diagnosis:
  """Says what is wrong with ingredients, and which of them to soup.

  Each check of the weights is a row of a table: other architectures and files,
  equal models, other starts, parts (heads) that were drawn anew, layers that
  were transposed, swapped, permuted, rotated or rescaled, averages and copies
  of other ingredients, lengths, rounding. With `eval_fn` the soup is compared
  with the best single model. Only where it is worse, the average of each
  ingredient with the best one is scored too, `(s_i + s_j) / 2 - s((theta_i +
  theta_j) / 2)`: the barrier. In all at most 2 K + 4 evaluations.

  Every difference has an interval, 95 % for all comparisons of one kind
  together. It is by the same examples (exact McNemar) if `eval_fn` is
  `evaluation.mean_of` a metric that is right or wrong, and else as wide as if
  each model had other examples.

  Args:
    ingredients: K >= 2 pytrees, or `checkpoints.Ingredients`, of which as many
      are in memory as fit into half of what is free.
    theta_0: what they were fine-tuned from, perhaps in another nesting. Without
      it copies of one run are not told from two runs.
    eval_fn: score on held-out data, higher is better.
    logits_fn: `params -> [N, C]`, logits of the held-out examples (see
      `evaluation.logits_of`): whether classes have another order.
    recalibrate_fn: `params -> params` with new statistics of BatchNorm, which
      every average then gets before it is scored; see
      `models.batch_norm.recalibrated`.
    num_examples: how many `eval_fn` averages a share over; by default the
      smallest number that fits the scores.
    is_thorough: also score all pairs (of more than 12 ingredients, 2 K - 3 of
      them).
    executor: where models and pairs are scored, as in `jaxsoup.greedy`; the
      same report. None: here.
    num_ahead: how many at a time, as in `jaxsoup.greedy`.
    names: of the ingredients, for the text; by default their paths.
    progress_fn: called with a stage, a key of `STAGES`, and the share of it
      that is done.

  Returns:
    A `Diagnosis`. Print its `as_text()`.

  Raises:
    TypeError: `ingredients` is not a sequence.
    ValueError: fewer than two ingredients, or not one name for each.

  Example:
    >>> rng = np.random.default_rng(0)
    >>> start, *steps = rng.normal(size=(4, 50, 50))
    >>> runs = [{'w': start + 0.1 * step} for step in steps]
    >>> diagnose(runs).verdict.action
    'soup all'
    >>> report = diagnose([*runs, {'w': rng.normal(size=(50, 50))}])
    >>> report.findings[0].code, report.verdict.members
    ('initialization', (0, 1, 2))

  Source: Wortsman et al. 2022, "Model soups", sections 3 and 4; Frankle et al.
  2020, "Linear mode connectivity and the lottery ticket hypothesis", for
  barriers; Ainsworth et al. 2023, "Git Re-Basin", for permuted units.
  """
  pool = _pool.Pool(ingredients, theta_0, names)
  if len(pool.names) < 2:
    raise ValueError(
        f'There is {len(pool.names)} ingredient: pass two or more to compare '
        'them.'
    )
  case = _case.Case(pool, progress_fn)
  findings = list(_seen(case, _table.OF_FILES))
  usable = case.members
  findings += _seen(case, _table.OF_WEIGHTS)
  suspects = dict.fromkeys(
      k
      for f in findings
      for k in f.leave_out
      if k in usable and (f.severity == 'error' or k in case.members)
  )
  if eval_fn is None or not usable:
    verdict = _by_weights(case, suspects)
  else:
    evaluation = _trials.Evaluation(ingredients, eval_fn, recalibrate_fn)
    case.trials = _trials.Trials(
        case,
        _trials.Scorer(evaluation, num_examples, executor, num_ahead),
        logits_fn,
        is_thorough,
        progress_fn,
    ).run(usable, list(suspects))
    findings = list(_confirmed(case, findings))
    findings += _seen(case, _table.OF_SCORES)
    verdict = _by_scores(case)
  verdict = verdict._replace(command=_command(case, verdict.members))
  return _findings.Diagnosis(
      pool.names,
      _findings.ranked(findings),
      verdict,
      _figures(case),
      tuple(_untested(case, eval_fn, logits_fn, recalibrate_fn)),
  )


def _seen(case: _case.Case, checks: Iterable[_case.Check]) -> Iterator[Finding]:
  """What a part of the table finds."""
  for check in checks:
    if case.members and (case.has_start or not check.needs_start):
      for seen in list(check.measure(case)):
        finding = check.finding(case, seen)
        if check.is_fact and not hasattr(case, 'trials'):
          case.leave_out(finding.leave_out)
        case.explained |= set(finding.leave_out and finding.ingredients)
        yield finding


def _confirmed(
    case: _case.Case, findings: Iterable[Finding]
) -> Iterator[Finding]:
  """Findings of the weights that the data confirm, with what they cost."""
  trials = case.trials
  case.explained = set()
  for f in findings:
    drops = [trials.drops[k] for k in f.leave_out if k in trials.drops]
    is_confirmed = any(drop.is_above for drop in drops)
    if not is_confirmed and any(k in case.members for k in f.leave_out):
      continue  # Data overrule geometry.
    if drops:
      worst = max(drops)
      base = case.pool.names[trials.base]
      f = f._replace(
          seen=f'{f.seen} Half-way to {base} the score is '
          f'{worst.unsigned} below the '
          'mean of the two.',
          cost=worst.value,
          severity='error' if is_confirmed else f.severity,
      )
    case.explained |= set(f.leave_out and f.ingredients)
    yield f


def _by_weights(case: _case.Case, suspects: Container[int]) -> Verdict:
  num = len(case.pool.names)
  sound = tuple(k for k in case.members if k not in suspects)
  if len(sound) == num:
    return Verdict('soup all', sound, 'the weights show no problem.')
  if len(sound) > 1:
    reason = f'the weights show a problem with {num - len(sound)} of {num}.'
    return Verdict('soup a subset', sound, reason)
  reason = 'no two ingredients can be averaged. The findings say why.'
  return Verdict('do not soup', sound, reason)


def _by_scores(case: _case.Case) -> Verdict:
  trials, names = case.trials, case.pool.names
  best = trials.best
  single = f'the best model, {names[best]}, {trials.answers[best].score:.3g}'
  if not trials.soups:
    reason = f'no two ingredients can be averaged; use {single}.'
    return Verdict('do not soup', (best,), reason)
  members, gain = trials.chosen, trials.gain
  examples = f'{trials.score.num_examples} examples'
  if trials.score.is_guess:
    examples += ', the fewest that fit the scores (num_examples says how many)'
  soup = trials.soups[members].score
  scores = f'The soup of {len(members)} scores {soup:.3g}, {single}: {gain}.'
  if gain.value < 0 and soup > np.mean(trials.scores[list(members)]):
    scores += (
        ' It is above the mean of its models: on data unlike these examples, '
        'where soups gain most, it may still be the better one; score both '
        'there.'
    )
  # The same examples chose the best model, which flatters it.
  flattered = trials.optimism()
  most = gain.high if np.isfinite(gain.high) else gain.value
  if most + flattered < 0:
    return Verdict('do not soup', (best,), f'use {names[best]}. {scores}')
  if not gain.is_above and gain.value + flattered < 0:
    reason = (
        f'with {examples} the soup is neither better nor worse than the best '
        f'model. {scores}'
    )
    return Verdict('cannot tell', members, reason)
  if np.isfinite(gain.low) and not gain.is_above:
    scores += f' With {examples} it is as good, as far as they tell.'
    if gain.value < 0:
      scores += (
          f' (They also chose the best model, which is worth {flattered:.2g}.)'
      )
  if len(members) == len(names):
    return Verdict('soup all', members, scores)
  return Verdict('soup a subset', members, scores)


def _command(case: _case.Case, members: Members) -> str:
  """What to type, with real paths; or the call."""
  ingredients: Any = case.pool.ingredients
  if not members:
    return ''
  source = 'soup.params'
  if hasattr(ingredients, 'given'):
    words = [shlex.quote(ingredients.given[k]) for k in members]
    if ingredients.item is not None:
      words += ['--item', shlex.quote(ingredients.item)]
    if len(members) == 1:
      return ' '.join(['jaxsoup inspect', *words])
    out = f'soup{ingredients.ending()}'
    source = f'jaxsoup.checkpoints.Ingredients(["{out}"])[0]'
    text = ' '.join(['jaxsoup soup uniform', *words, '--out', out])
  elif len(members) == 1:
    return f'params = ingredients[{members[0]}]'
  elif len(members) == len(case.pool.names):
    text = 'soup = jaxsoup.uniform(ingredients)'
  else:
    text = f'soup = jaxsoup.uniform([ingredients[k] for k in {members}])'
  if not case.has_statistics:
    return text
  if any(path[0] == 'batch_stats' for path in case.pool.leaves[0]):  # Of linen.
    return (
        f'{text}\nvariables = {source}\n'
        '# then for batches of training images, with a momentum of its '
        'BatchNorm that\n# forgets what the average had:\n'
        '_, new = model.apply(variables, images, train=True, '
        'mutable=["batch_stats"])\nvariables = variables | new'
    )
  return (
      f'{text}\nparams = jaxsoup.models.batch_norm.recalibrated(\n'
      f'    nnx.graphdef(model), {source}, images)'
  )


def _untested(
    case: _case.Case,
    eval_fn: EvalFn | None,
    logits_fn: OutputsFn | None,
    recalibrate_fn: ParamsFn | None,
) -> Iterator[str]:
  if not case.has_start:
    yield (
        'copies of one run, and models that were not fine-tuned: that needs '
        'what they were fine-tuned from (theta_0, --init).'
    )
  if eval_fn is None:
    yield 'the score of the soup: that needs an eval_fn (--eval).'
  elif logits_fn is None:
    yield (
        'predictions: whether classes have another order needs a logits_fn '
        '(--logits).'
    )
  if case.has_statistics and recalibrate_fn is None:
    yield (
        'new statistics of BatchNorm: that needs training examples '
        '(recalibrate_fn, --recalibrate).'
    )


def _figures(case: _case.Case) -> Json:
  num = len(case.pool.names)
  norms, distances = np.full(num, np.nan), np.full((num, num), np.nan)
  cosines = distances.copy()
  if 'all_geometry' in vars(case):
    g = case.all_geometry
    rows = np.array(g.members)
    norms[rows] = g.lengths()
    distances[np.ix_(rows, rows)] = g.distances()
    cosines[np.ix_(rows, rows)] = g.cosines()
  figures = {'norms': norms, 'distances': distances, 'cosines': cosines}
  if not hasattr(case, 'trials'):
    return figures
  trials = case.trials
  answer = trials.soups.get(trials.chosen)
  return figures | {
      'scores': trials.scores,
      'barriers': trials.barriers,
      'soup': answer.score if answer else np.nan,
      'gain': list(trials.gain),
      'statistics': trials.statistics and list(trials.statistics),
      'disagreement': trials.disagreement,
      'num_examples': trials.score.num_examples,
      'num_evaluations': trials.score.num_calls,
  }
