"""Differences of two experiments against NumPy and SciPy."""

import json
import re

import numpy as np
import pytest
from scipy import stats
from sklearn import metrics as sk
from typer import testing

from jaxsoup import cli
from jaxsoup.experiments import comparing

NAMES = ('00', '01', 'uniform', 'greedy')
SIZES = {'held_out': 120, 'test': 200, 'blur': 200, 'fog': 150}


def labels():
  rng = np.random.default_rng(0)
  return {name: rng.integers(2, size=n) for name, n in SIZES.items()}


def classes(skill, seed=1):
  """By data set, `[rows, N]`: each row is right with its own probability."""
  rng = np.random.default_rng(seed)
  return {
      name: np.stack(
          [
              np.where(rng.random(y.size) < skill + 0.03 * i, y, 1 - y)
              for i in range(len(NAMES))
          ]
      )
      for name, y in labels().items()
  }


def rows_of(given, metric='accuracy', shares=None):
  score = lambda name, i: float(
      sk.f1_score(labels()[name], given[name][i])
      if metric == 'f1'
      else np.mean(labels()[name] == given[name][i])
  )
  return [
      {
          'name': name,
          'kind': 'single' if name.isdigit() else 'soup',
          'held_out': score('held_out', i),
          'test': score('test', i),
          'shifts': {k: score(k, i) for k in ('blur', 'fog')},
          'nll': 0.5,
          'ece': 0.1,
          'cost': 1,
          'metric': metric,
          'shares': shares or {},
      }
      for i, name in enumerate(NAMES)
  ]


DATA = {name: {'num': n, 'sha256': name} for name, n in SIZES.items()}


def write(folder, rows, given=None, **content):
  folder.mkdir(parents=True, exist_ok=True)
  content = {'config': {'seed': 0}, 'data': DATA, 'rows': rows, **content}
  (folder / 'results.json').write_text(json.dumps(content))
  if given is not None:
    is_right = rows[0]['metric'] == 'accuracy'
    arrays = {f'label/{name}': y for name, y in labels().items()}
    for name, y in labels().items():
      arrays[f'answers/{name}'] = given[name] == y if is_right else given[name]
    np.savez(folder / 'answers.npz', **arrays)
  return folder


@pytest.fixture
def pair(tmp_path):
  a, b = classes(0.6), classes(0.75, seed=2)
  first = write(tmp_path / 'a', rows_of(a), a)
  return first, write(tmp_path / 'b', rows_of(b), b), a, b


def by_name(compared):
  return {(x.row, x.data): x for x in compared.shared}


def test_examples_are_paired(pair):
  first, second, a, b = pair
  found = by_name(comparing.compare(first, second, has_each_shift=True))
  rows = ('best single', 'mean of singles', 'uniform', 'greedy')
  sets = ('held-out', 'test', 'mean of shifts', 'blur', 'fog')
  assert list(found) == [(row, data) for row in rows for data in sets]
  label = labels()
  for name in ('test', 'blur', 'fog'):
    right = [x[name][3] == label[name] for x in (a, b)]
    got = found['greedy', name]
    assert got.a == pytest.approx(right[0].mean())
    assert got.gain.gain == pytest.approx(got.b - got.a)
    only = [(right[1] & ~right[0]).sum(), (right[0] & ~right[1]).sum()]
    expected = stats.binomtest(only[0], sum(only)).pvalue
    assert got.gain.p_value == pytest.approx(expected)
    assert got.gain.low <= got.gain.gain <= got.gain.high and not got.reason
  # Each picks its own best single on held-out data.
  best = [
      int(np.argmax([np.mean(x['held_out'][k] == label['held_out'])
                     for k in (0, 1)]))
      for x in (a, b)
  ]  # fmt: skip
  scores = [
      np.mean(x['test'][k] == label['test']) for x, k in zip((a, b), best)
  ]
  assert found['best single', 'test'].gain.gain == pytest.approx(
      scores[1] - scores[0]
  )
  singles = [np.mean(x['test'][:2] == label['test']) for x in (a, b)]
  got = found['mean of singles', 'test']
  assert got.gain.gain == pytest.approx(singles[1] - singles[0])
  assert got.gain.method == 'paired bootstrap'


def test_mean_of_shifts_is_resampled(pair):
  first, second, a, b = pair
  got = by_name(comparing.compare(first, second))['greedy', 'mean of shifts']
  rng, draws = np.random.default_rng(5), 0
  for name in ('blur', 'fog'):
    right = [(x[name][3] == labels()[name]).astype(float) for x in (a, b)]
    gains = right[1] - right[0]
    rows = rng.integers(gains.size, size=(4000, gains.size))
    draws = draws + gains[rows].mean(1) / 2
  assert got.gain.gain == pytest.approx(got.b - got.a)
  expected = np.quantile(draws, (0.025, 0.975))
  np.testing.assert_allclose(got.gain[1:3], expected, atol=0.006)


def test_metrics_that_are_not_means_are_paired(tmp_path):
  a, b = classes(0.6), classes(0.75, seed=2)
  folders = [
      write(tmp_path / str(i), rows_of(x, 'f1'), x)
      for i, x in enumerate((a, b))
  ]
  found = by_name(comparing.compare(*folders))
  scores = [sk.f1_score(labels()['test'], x['test'][3]) for x in (a, b)]
  got = found['greedy', 'test']
  assert got.gain.gain == pytest.approx(scores[1] - scores[0], abs=1e-6)
  assert got.gain.low < got.gain.gain < got.gain.high
  reason = found['mean of singles', 'test'].reason
  assert reason == 'one seed, and f1 is not a mean of examples'


def seeds_of(folder, skill, shares):
  for seed in range(4):
    rows = rows_of(
        classes(skill, seed=10 * seed + int(100 * skill)), 'accuracy'
    )
    rows = [row | {'shares': shares} for row in rows]
    write(folder / f'seed{seed}', rows)
  return folder


def test_seeds_are_paired(tmp_path):
  shares = {'held_out': 0.0, 'test': 0.4, 'shifts': 1.0}
  a, b = (
      seeds_of(tmp_path / name, skill, shares)
      for name, skill in (('a', 0.6), ('b', 0.65))
  )
  found = by_name(comparing.compare(a, b))
  scores = {
      key: np.array(
          [
              [
                  json.loads((x / f'seed{i}/results.json').read_text())['rows'][
                      3
                  ][key]
                  for i in range(4)
              ]
              for x in (a, b)
          ]
      )
      for key in ('held_out', 'test')
  }
  got = found['greedy', 'held-out'].gain
  expected = stats.ttest_rel(scores['held_out'][1], scores['held_out'][0])
  assert got.num_repeats == 4 and got.gain == pytest.approx(
      np.mean(scores['held_out'][1] - scores['held_out'][0])
  )
  assert got.p_value == pytest.approx(expected.pvalue)
  interval = expected.confidence_interval()
  np.testing.assert_allclose(got[1:3], interval)
  # Test data are drawn from one pool: Nadeau and Bengio's correction.
  gains = scores['test'][1] - scores['test'][0]
  error = gains.std(ddof=1) * np.sqrt(1 / 4 + 0.4 / 0.6)
  expected = 2 * stats.t.sf(abs(gains.mean() / error), 3)
  assert found['greedy', 'test'].gain.p_value == pytest.approx(expected)
  shifts = found['greedy', 'mean of shifts']
  assert np.isnan(shifts.gain.low) and 'the same examples' in shifts.reason
  # One seed in common, and nothing but its scores.
  one = write(tmp_path / 'c/seed2', rows_of(classes(0.7))).parent
  (reason,) = {x.reason for x in comparing.compare(a, one).shared}
  assert reason.startswith('one seed, and there is no ')


def test_splits_are_paired(tmp_path):
  tables = {
      name: [rows_of(classes(skill, seed=7 * i + k)) for i in range(3)]
      for k, (name, skill) in enumerate((('a', 0.6), ('b', 0.66)))
  }
  folders = [
      write(tmp_path / name, x[0], splits=x) for name, x in tables.items()
  ]
  found = by_name(comparing.compare(*folders))
  gains = np.array(
      [b[2]['test'] - a[2]['test'] for a, b in zip(tables['a'], tables['b'])]
  )
  # 120 examples select, 200 report, whichever they are.
  error = gains.std(ddof=1) * np.sqrt(1 / 3 + 200 / 120)
  got = found['uniform', 'test']
  assert got.gain.gain == pytest.approx(gains.mean())
  expected = 2 * stats.t.sf(abs(gains.mean() / error), 2)
  assert got.gain.p_value == pytest.approx(expected)
  assert 'the same examples' in found['uniform', 'mean of shifts'].reason
  write(tmp_path / 'b', tables['b'][0], splits=tables['b'], config={'seed': 1})
  (reason,) = {x.reason for x in comparing.compare(*folders).shared}
  assert reason == 'one seed, and A and B do not have the same splits'


def test_other_examples_are_not_paired(pair):
  first, second, _, b = pair
  data = DATA | {'fog': {'num': 150, 'sha256': 'other'}}
  write(second, rows_of(b), b, data=data)
  found = by_name(comparing.compare(first, second, has_each_shift=True))
  expected = 'one seed, and A and B have different examples in fog'
  assert found['greedy', 'fog'].reason == expected
  assert found['greedy', 'mean of shifts'].reason == expected
  assert np.isnan(found['greedy', 'fog'].gain.low)
  assert not found['greedy', 'blur'].reason


def test_command(pair):
  first, second, a, b = pair
  rows = rows_of(b)[:3]
  rows[0]['shifts'], rows[2]['name'] = {'blur': 0.5, 'ice': 0.4}, 'pruned'
  for row in rows:
    row['shifts'] = {'blur': 0.5, 'ice': 0.4}
  write(second, rows, {k: x[:3] for k, x in b.items()})
  run = testing.CliRunner().invoke
  done = run(cli.app, ['compare', str(first), str(second / 'results.json')])
  assert done.exit_code == 0, done.output
  assert re.search(
      r'best single +held-out +\d\d\.\d +\d\d\.\d +[+-]', done.output
  )
  assert 'test: interval by exact McNemar over 200 examples.' in done.output
  assert 'Only A has: uniform, greedy, fog.' in done.output
  assert 'Only B has: pruned, ice.' in done.output
  # The mean is over the shifts that both have.
  blur = 100 * np.mean([np.mean(x == labels()['blur']) for x in a['blur'][:2]])
  line = next(x for x in done.output.split('\n') if 'mean of singles' in x)
  mean = done.output.split(line)[1].split('\n')[2]
  assert f'{blur:.1f}' in mean and '50.0' in mean
  done = run(cli.app, ['compare', str(first), str(second), '--json'])
  content = json.loads(done.output)
  assert content['only_b'] == ['pruned', 'ice']
  assert content['shared'][0]['gain']['num'] == 120


def flip(path):
  """Some byte of what is compressed."""
  with np.load(path) as stored:
    arrays = dict(stored)
  np.savez_compressed(path, **arrays)
  content = bytearray(path.read_bytes())
  place = content.index(b'label/test.npy') + 80
  content[place] ^= 0xFF
  path.write_bytes(content)


@pytest.mark.parametrize(
    'spoil, words',
    [
        (lambda a, b: (b / 'results.json').unlink(), 'has no results.json'),
        (lambda a, b: (b / 'results.json').write_text('{'), 'is not valid'),
        (lambda a, b: (b / 'results.json').write_text('{"rows": 3}'),
         'is not the results.json of an experiment'),
        (lambda a, b: write(b, [r | {'metric': 'f1'} for r in
                                rows_of(classes(0.7))]),
         'compare results of one metric'),
        (lambda a, b: write(b, [rows_of(classes(0.7))[2] | {'name': 'other'}]),
         'no row is in both'),
        (lambda a, b: (b / 'answers.npz').write_bytes(b'PK'), 'Delete both'),
        (lambda a, b: flip(b / 'answers.npz'), 'Delete both'),
        (lambda a, b: b.rename(b.parent / 'seed0'), 'no seed is in both'),
    ],
)  # fmt: skip
def test_results_that_cannot_be_compared(pair, spoil, words):
  first, second, *_ = pair
  spoil(first, second)
  if not second.exists():
    second = second.parent
  done = testing.CliRunner().invoke(
      cli.app, ['compare', str(first), str(second)]
  )
  assert done.exit_code == 1 and words in done.output, done.output
  assert done.output.count('\n') == 1
