"""The diagnosis: findings from the weights, then from data, and a verdict."""

from collections.abc import Iterator
from collections.abc import Sequence
import shlex

import numpy as np

from jaxsoup import _tree
from jaxsoup.diagnosis import _checks
from jaxsoup.diagnosis import _findings
from jaxsoup.diagnosis import _pool
from jaxsoup.diagnosis import _trials
from jaxsoup.typing import EvalFn
from jaxsoup.typing import Json
from jaxsoup.typing import OutputsFn
from jaxsoup.typing import Params
from jaxsoup.typing import ParamsFn
from jaxsoup.typing import ProgressFn

Finding = _findings.Finding
Verdict = _findings.Verdict

# Two models that differ on fewer examples are not told apart by an exact
# McNemar test at 95 %: 2 / 2^6 < 0.05 < 2 / 2^5.
_ALIKE = 6


def diagnose(
    ingredients: Sequence[Params],
    *,
    theta_0: Params | None = None,
    eval_fn: EvalFn | None = None,
    logits_fn: OutputsFn | None = None,
    recalibrate_fn: ParamsFn | None = None,
    num_examples: int | None = None,
    is_thorough: bool = False,
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
      them), and the parts of the worst one.
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
  if len(pool) < 2:
    raise ValueError(
        f'There is {len(pool)} ingredient: pass two or more to compare them.'
    )
  case = _checks.Case(pool, progress_fn)
  findings, suspects = _of_weights(case, theta_0 is not None)
  trials, untested = None, []
  if theta_0 is None:
    untested.append(
        'copies of one run, and models that were not fine-tuned: that needs '
        'what they were fine-tuned from (theta_0, --init).'
    )
  if eval_fn is None:
    untested.append('the score of the soup: that needs an eval_fn (--eval).')
    verdict = _by_weights(case, suspects)
  else:
    trials = _trials.Trials(
        case,
        _trials.Scorer(eval_fn, num_examples),
        recalibrate_fn=recalibrate_fn,
        logits_fn=logits_fn,
        is_thorough=is_thorough,
        progress_fn=progress_fn,
    ).run(suspects)
    findings = list(_with_data(case, findings, trials, theta_0 is not None))
    if logits_fn is None:
      untested.append(
          'predictions: whether classes have another order needs a logits_fn '
          '(--logits).'
      )
    verdict = _by_scores(case, trials)
  has_statistics = _tree.statistics_of(list(pool.leaves[0])).any()
  if has_statistics and recalibrate_fn is None:
    untested.append(
        'new statistics of BatchNorm: that needs training examples '
        '(recalibrate_fn, --recalibrate).'
    )
  verdict = verdict._replace(command=_command(pool, verdict, has_statistics))
  return _findings.Diagnosis(
      pool.names,
      _findings.ranked(findings),
      verdict,
      _figures(case, trials),
      tuple(untested),
  )


def _of_weights(
    case: _checks.Case, has_start: bool
) -> tuple[list[Finding], list[int]]:
  """Findings of the table, and members that only data can convict."""
  findings: list[Finding] = []
  suspects: list[int] = []
  for check in _checks.CHECKS:
    if check.code == 'duplicate':
      case.usable = list(case.members)
    if not case.members or (check.needs == 'start' and not has_start):
      continue
    for seen in list(check.measure(case)):
      members = tuple(sorted(seen.members))
      out = tuple(k for k in members if k not in seen.keep and check.leaves_out)
      findings.append(_finding(case.pool, check, seen, members, out))
      if check.is_fact:
        case.leave_out(out)
      else:
        suspects += out
  return findings, suspects


def _finding(pool, check, seen, members, out=(), **fields) -> Finding:
  them = pool.listed(out or members) or 'some'
  return Finding(
      severity=check.severity,
      code=check.code,
      title=check.title,
      seen=seen.text,
      meaning=check.meaning,
      remedy=check.remedy.replace('{them}', them),
      ingredients=members,
      leaves=tuple(seen.leaves),
      leave_out=out,
      **fields,
  )


def _check(code, severity, title, meaning, remedy) -> _checks.Check:
  return _checks.Check(
      code, lambda _: iter(()), severity, title, meaning, remedy
  )


_OF_DATA = {
    check.code: check
    for check in (
        _check(
            'labels', 'error', 'Another order of labels',
            'The outputs mean different classes.',
            'Train with one order of labels, or reorder the outputs of the '
            'head; or leave out {them}.',
        ),
        _check(
            'batch_norm', 'error',
            'The running statistics of the average are wrong',
            'The statistics of a soup are not the mean of those of its '
            'ingredients: activations have other means and smaller variances.',
            'Re-estimate them on training examples.',
        ),
        _check(
            'barrier', 'error', 'There are barriers between ingredients',
            'They lie in different basins: models between them, such as their '
            'average, are bad.',
            'Let a greedy soup choose some of them. For the next sweep: '
            'smaller learning rates, fewer epochs, or a better initialization.',
        ),
        _check(
            'unknown', 'error',
            'Cause unknown: these models do not fit the others',
            'None of the known causes explains it.',
            'Leave out {them}, and compare how it was trained and converted.',
        ),
        _check(
            'weak', 'warning', 'Much worse than the others',
            'A uniform soup averages all, and these lower its score.',
            'Leave out {them}, or let a greedy soup choose.',
        ),
        _check(
            'uneven', 'note', 'The best model is ahead',
            'A uniform soup averages all, and the others lower its score.',
            'Let a greedy soup choose, or use the best one.',
        ),
        _check(
            'unmoved', 'warning', 'Not fine-tuned, or hardly',
            'It is the worst, and the others lie in one direction from it: as '
            'the initialization does, which pulls the soup back to it.',
            'Leave out {them}. Pass theta_0 (--init) to be sure.',
        ),
        _check(
            'alike', 'note', 'All ingredients predict almost the same',
            'There is little to gain: soups need models that make different '
            'errors.',
            'Vary more between runs: learning rate, augmentation, seed.',
        ),
    )
}  # fmt: skip


def _with_data(case, findings, trials, has_start) -> Iterator[Finding]:
  """Findings that the data confirm, with what they cost, and new ones."""
  pool, explained = case.pool, set()
  base = pool.names[trials.base]
  of_facts = {c.code for c in _checks.CHECKS if c.is_fact}
  for f in findings:
    drops = [trials.drops[k] for k in f.leave_out if k in trials.drops]
    is_confirmed = any(drop.is_above for drop in drops)
    if f.code not in of_facts and not is_confirmed:
      continue  # Data overrule geometry.
    if drops:
      worst = max(drops)
      text = (
          f'{f.seen} Half-way to {pool.names[trials.base]} the score is '
          f'{worst} below the mean of the two.'
      )
      severity = 'error' if is_confirmed else f.severity
      f = f._replace(seen=text, cost=worst.value, severity=severity)
    if f.leave_out:
      explained |= set(f.ingredients)
    yield f

  def made(code, members, text, cost, out=None):
    explained.update(members)
    members = tuple(sorted(members))
    out = members if out is None else out
    return _finding(
        pool, _OF_DATA[code], _checks.Seen((), text), members, out, cost=cost
    )

  score = lambda k: trials.answers[k].score
  for k, (same, turned) in trials.labels.items():
    text = (
        f'{pool.names[k]} agrees with {pool.names[trials.base]} on '
        f'{100 * same:.0f} % of the examples, and on {100 * turned:.0f} % with '
        'its classes in another order.'
    )
    yield made('labels', [k], text, score(trials.base) - score(k))
  new = trials.statistics
  falls = trials.full.is_below
  if new and new.is_above:
    text = (
        f'With re-estimated statistics the score of the soup changes by {new}.'
    )
    yield made('batch_norm', (), text, new.value)
  elif (
      new is None and falls and _tree.statistics_of(list(pool.leaves[0])).any()
  ):
    text = (
        f'The soup is {trials.full} from the best model, with averaged '
        'statistics.'
    )
    yield made('batch_norm', (), text, -trials.full.value)
  bad = [k for k in trials.bad if k not in explained]
  sound = [k for k in case.members if k in trials.answers]
  rates = lambda ks: _checks.rates_text(
      pool, ks, [k for k in sound if k not in ks]
  )
  of_pairs = lambda ks: '; '.join(
      f'Half-way between {pool.names[k]} and {base} the score is '
      f'{trials.drops[k]} below the mean of the two'
      for k in ks[:3]
  )
  if 2 * len(bad) >= len(sound) - 1 and bad:
    worst = max(trials.drops[k].value for k in bad)
    yield made(
        'barrier', bad, f'In {len(bad)} of {len(sound) - 1} pairs there is a '
        f'barrier. {of_pairs(bad)}.{rates(bad)}', worst,
    )  # fmt: skip
  elif bad:
    worst = max(trials.drops[k].value for k in bad)
    yield made('unknown', bad, f'{of_pairs(bad)}.{rates(bad)}', worst)
  weak = [k for k in trials.weak if k not in explained]
  for k in weak:
    gap = score(trials.base) - score(k)
    off = case.off(k)
    code = 'unmoved' if not has_start and _is_outside(case, k) else 'weak'
    seen = (
        f'{pool.names[k]} scores {score(k):.3g}, the best '
        f'{score(trials.base):.3g}.{rates([k])}'
    )
    if off:
      code = 'unknown'
      seen += (
          f' It differs most in {_findings.listed(off, range(len(off)), 3)}.'
      )
    yield made(code, [k], seen, gap)
  if trials.uneven:
    ks = trials.uneven
    seen = (
        f'{pool.listed(ks)}: {max(map(score, ks)):.3g} at most, and {base} '
        f'{score(trials.base):.3g}.{rates(ks)}'
    )
    yield made('uneven', ks, seen, -trials.full.value)
  if falls and not explained and not (new and new.is_above):
    seen = (
        f'The soup is {trials.full} from the best model; it is {trials.fall} '
        'below the mean of its ingredients, and none has a barrier to the best.'
    )
    code = 'barrier' if trials.fall.is_above else 'uneven'
    yield made(code, (), seen, -trials.full.value)
  apart = trials.disagreement[~np.isnan(trials.disagreement)]
  if apart.size and apart.max() * trials.num_predicted < _ALIKE:
    seen = f'No two differ on more than {apart.max():.2g} of the examples.'
    yield made('alike', (), seen, np.nan)


def _is_outside(case, k) -> bool:
  """Whether it is far from all others, which are near to each other."""
  g = case.geometry
  if k not in g.members or len(g.members) < 4:
    return False
  i = g.members.index(k)
  distances = g.distances()
  others = np.delete(np.arange(len(distances)), i)
  inside = distances[np.ix_(others, others)]
  # By more than distances vary by chance where all are at right angles.
  usual = np.median(inside[inside > 0])
  return np.median(distances[i, others]) > 1.1 * usual


def _by_weights(case, suspects) -> Verdict:
  num = len(case.pool)
  sound = tuple(k for k in case.members if k not in suspects)
  if len(sound) == num:
    return Verdict('soup all', sound, 'the weights show no problem.')
  if len(sound) > 1:
    reason = f'the weights show a problem with {num - len(sound)} of {num}.'
    return Verdict('soup a subset', sound, reason)
  reason = 'no two ingredients can be averaged. The findings say why.'
  return Verdict('do not soup', sound, reason)


def _by_scores(case, trials) -> Verdict:
  names, best = case.pool.names, trials.best
  single = f'the best model, {names[best]}, {trials.answers[best].score:.3g}'
  if not trials.soups:
    reason = f'no two ingredients can be averaged; use {single}.'
    return Verdict('do not soup', (best,), reason)
  members, gain = tuple(trials.chosen), trials.gain
  soup = trials.soups[members].score
  scores = f'The soup of {len(members)} scores {soup:.3g}, {single}: {gain}.'
  if gain.is_below:
    return Verdict('do not soup', (best,), f'use {names[best]}. {scores}')
  num = trials.num_examples
  flattered = trials.optimism()
  if not gain.is_above and gain.value + flattered < 0:
    reason = (
        f'with {num} examples the soup is neither better nor worse than the '
        f'best model. {scores}'
    )
    return Verdict('cannot tell', members, reason)
  if np.isfinite(gain.low) and not gain.is_above:
    scores += f' With {num} examples it is as good, as far as they tell.'
    if gain.value < 0:
      scores += (
          f' (They also chose the best model, which is worth {flattered:.2g}.)'
      )
  if len(members) == len(case.pool):
    return Verdict('soup all', members, scores)
  return Verdict('soup a subset', members, scores)


def _command(pool, verdict, has_statistics) -> str:
  """What to type, with real paths; or the call."""
  members = verdict.members
  if not members:
    return ''
  paths = getattr(pool.ingredients, 'paths', None)
  if paths is not None:
    given = [shlex.quote(str(paths[k])) for k in members]
    if len(members) == 1:
      return f'jaxsoup inspect {given[0]}'
    text = f'jaxsoup soup uniform {" ".join(given)} --out soup'
  elif len(members) == 1:
    return f'params = ingredients[{members[0]}]'
  elif len(members) == len(pool):
    text = 'soup = jaxsoup.uniform(ingredients)'
  else:
    text = f'soup = jaxsoup.uniform([ingredients[k] for k in {members}])'
  if not has_statistics:
    return text
  source = 'soup.params'
  if paths is not None:
    source = 'jaxsoup.checkpoints.Ingredients(["soup"])[0]'
  if any(path[0] == 'batch_stats' for path in pool.leaves[0]):  # Of linen.
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


def _figures(case, trials) -> Json:
  num = len(case.pool)
  figures = {
      'norms': np.full(num, np.nan),
      'distances': np.full((num, num), np.nan),
      'cosines': np.full((num, num), np.nan),
  }
  if 'all_geometry' in vars(case):
    g = case.all_geometry
    rows = list(g.members)
    figures['norms'][rows] = g.lengths()
    figures['distances'][np.ix_(rows, rows)] = g.distances()
    figures['cosines'][np.ix_(rows, rows)] = g.cosines()
  if trials is None:
    return figures
  answer = trials.soups.get(tuple(trials.chosen))
  return figures | {
      'scores': trials.scores,
      'barriers': trials.barriers,
      'soup': answer.score if answer else np.nan,
      'gain': list(trials.gain),
      'statistics': trials.statistics and list(trials.statistics),
      'parts': trials.parts,
      'disagreement': trials.disagreement,
      'num_examples': trials.num_examples,
      'num_evaluations': trials.num_calls,
  }
