"""The diagnosis: findings from the weights, then from data, and a verdict."""

from collections.abc import Sequence

import numpy as np

from jaxsoup.diagnosis import _evidence
from jaxsoup.diagnosis import _findings
from jaxsoup.diagnosis import _pool
from jaxsoup.diagnosis import _trials
from jaxsoup.diagnosis import _weights
from jaxsoup.typing import EvalFn
from jaxsoup.typing import Json
from jaxsoup.typing import OutputsFn
from jaxsoup.typing import Params
from jaxsoup.typing import ParamsFn
from jaxsoup.typing import ProgressFn

Verdict = _findings.Verdict


def diagnose(
    ingredients: Sequence[Params],
    *,
    theta_0: Params | None = None,
    eval_fn: EvalFn | None = None,
    logits_fn: OutputsFn | None = None,
    recalibrate_fn: ParamsFn | None = None,
    tolerance: float = 0.02,
    names: Sequence[str] | None = None,
    progress_fn: ProgressFn | None = None,
) -> _findings.Diagnosis:
  """Says what is wrong with ingredients, and which of them to soup.

  Without data one walk over the ingredients: structure, dtypes, values that are
  not finite, equal models, models that were not fine-tuned, other
  initializations, parts (heads) that were initialized apart, permuted units,
  outliers in length, copies of one run, parts that never moved, rounding,
  BatchNorm. With `eval_fn` barriers, the drop of the score half-way below the
  mean of the two ends, `(s_i + s_j) / 2 - s((theta_i + theta_j) / 2)`: of all
  pairs (of more than 12 ingredients, 2 K - 3 of them), and of each with the
  mean of the others; then, for the worst pair, which part is to blame.

  Args:
    ingredients: K >= 2 pytrees, or `checkpoints.Ingredients`, of which pieces
      are read side by side; with data at most two and one average are held.
    theta_0: what they were fine-tuned from. Without it lengths and angles of
      task vectors are estimated from distances between ingredients, and a model
      that was not fine-tuned is not always recognized.
    eval_fn: score on held-out data, higher is better.
    logits_fn: `params -> [N, C]`, logits of the held-out examples (see
      `evaluation.logits_of`): how far the predictions differ.
    recalibrate_fn: `params -> params` with new statistics of BatchNorm, which
      every average then gets before it is scored; see
      `models.batch_norm.recalibrated`.
    tolerance: the largest drop that is no barrier, in the units of the score.
      The default is that of Frankle et al., for accuracies; the largest of many
      drops on few examples is noise: of N, take 3 sqrt(a (1 - a) / N).
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
  2020, "Linear mode connectivity and the lottery ticket hypothesis", for the
  tolerance; Ainsworth et al. 2023, "Git Re-Basin", for permuted units.
  """
  pool = _pool.Pool(ingredients, theta_0, names)
  if len(pool) < 2:
    raise ValueError(
        f'There is {len(pool)} ingredient: pass two or more to compare them.'
    )
  examined = _weights.examine(pool, progress_fn)
  findings, measured = examined.findings, examined.measured
  if eval_fn is None:
    verdict = _by_weights(pool, examined)
  else:
    trials = _trials.Trials(
        pool,
        examined.paths,
        eval_fn,
        tolerance=tolerance,
        recalibrate_fn=recalibrate_fn,
        logits_fn=logits_fn,
        progress_fn=progress_fn,
    ).run(examined.usable, examined.sound)
    findings = _evidence.with_data(
        pool, findings, examined.sound, trials, tolerance
    )
    measured |= _figures(pool, trials)
    verdict = _by_scores(pool, trials, tolerance)
  return _findings.Diagnosis(
      pool.names, _findings.ranked(findings), verdict, measured
  )


def _by_weights(pool, examined) -> Verdict:
  sound = tuple(examined.sound)
  unknown = 'Barriers were not measured: that needs an eval_fn (--eval).'
  if len(sound) == len(pool):
    return Verdict('soup all', sound, f'the weights show no problem. {unknown}')
  if len(sound) > 1:
    reason = (
        f'the weights show a problem with {len(pool) - len(sound)} of '
        f'{len(pool)}. {unknown}'
    )
    return Verdict('soup a subset', sound, reason)
  return Verdict(
      'do not soup',
      sound,
      'no two ingredients can be averaged. The findings say why.',
  )


def _by_scores(pool, trials, tolerance) -> Verdict:
  subset = tuple(trials.subset)
  if not np.isfinite(trials.scores).any():
    return Verdict('do not soup', (), 'no ingredient has a finite score.')
  best = int(np.nanargmax(trials.scores))
  top = trials.scores[best]
  single = f'the best one ({pool.names[best]}) {top:.3g}'
  if len(subset) < 2:
    reason = (
        'no two ingredients can be averaged without a loss. Use the best one '
        f'({pool.names[best]}, score {top:.3g}).'
    )
    return Verdict('do not soup', (best,), reason)
  mean = float(np.mean(trials.scores[list(subset)]))
  bar = max(mean - tolerance, top - _trials.WEAK * tolerance)
  if not trials.soup >= bar:
    reason = (
        f'their soup scores {trials.soup:.3g}, the ingredients {mean:.3g} on '
        f'average, {single}. Use that one.'
    )
    return Verdict('do not soup', (best,), reason)
  reason = (
      f'Their uniform soup scores {trials.soup:.3g}, the ingredients '
      f'{mean:.3g} on average, {single}.'
  )
  if len(subset) == len(pool):
    return Verdict('soup all', subset, f'there are no barriers. {reason}')
  reason = f'{len(subset)} of {len(pool)} have no barriers. {reason}'
  return Verdict('soup a subset', subset, reason)


def _figures(pool: _pool.Pool, trials: _trials.Measured) -> Json:
  return {
      'scores': trials.scores,
      'barriers': trials.drops,
      'barriers_to_mean': trials.to_mean,
      'soup': trials.soup,
      'batch_norm': trials.statistics,
      'parts': trials.parts,
      'disagreement': trials.disagreement,
      'learning_rates': [c.get('learning_rate') for c in pool.configs],
      'learning_rate_correlation': _evidence.rate_correlation(
          pool, trials.drops
      ),
  }
