"""Differences of two experiments against NumPy and SciPy."""

import json
import re

import numpy as np
import pytest
from scipy import stats
from sklearn import metrics as sk
from typer import testing

from jaxsoup import cli
from jaxsoup.experiments import answers
from jaxsoup.experiments import comparing

NAMES = ('00', '01', 'uniform', 'greedy')
SIZES = {'held_out': 120, 'test': 200, 'blur': 200, 'fog': 150}


def labels():
  rng = np.random.default_rng(0)
  return {name: rng.integers(2, size=n) for name, n in SIZES.items()}


def drawn_classes(rng, truth, skill):
  """By data set, `[rows, N]`: each row is right with its own probability."""
  right = lambda y, i: rng.random(y.size) < skill + 0.03 * i
  return {
      name: np.stack(
          [np.where(right(y, i), y, 1 - y) for i in range(len(NAMES))]
      )
      for name, y in truth.items()
  }


def classes(skill, seed=1):
  return drawn_classes(np.random.default_rng(seed), labels(), skill)


def rows_of(given, metric='accuracy', truth=None):
  truth = truth or labels()
  score = lambda name, i: float(
      sk.f1_score(truth[name], given[name][i])
      if metric == 'f1'
      else np.mean(truth[name] == given[name][i])
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
      }
      for i, name in enumerate(NAMES)
  ]


def write_answers(folder, given, is_right=True, truth=None, ids=None):
  folder.mkdir(parents=True, exist_ok=True)
  truth = truth or labels()
  ids = ids or {name: np.arange(len(y)) for name, y in truth.items()}
  right = {k: given[k] == y if is_right else given[k] for k, y in truth.items()}
  answers.write(folder, answers.Given(right, truth, ids))


def write(folder, rows, given=None, **content):
  folder.mkdir(parents=True, exist_ok=True)
  (folder / 'results.json').write_text(json.dumps({'rows': rows, **content}))
  if given is not None:
    write_answers(folder, given, rows[0]['metric'] == 'accuracy')
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
  assert reason == 'one seed, and mean of singles has no answers of its own'


def drawn(seed, skills):
  """A seed's parts of one pool, and answers of both experiments to them."""
  rng = np.random.default_rng([seed, 7])
  pool = np.random.default_rng(0).integers(2, size=400)
  ids = {name: rng.permutation(400)[:n] for name, n in SIZES.items()}
  truth = {name: pool[x] for name, x in ids.items()}
  return ids, truth, [drawn_classes(rng, truth, skill) for skill in skills]


def by_hand(repeats, names, row):
  """`mean`, its standard error and degrees of freedom, example by example."""
  gains, influence = [], []
  for ids, truth, (a, b) in repeats:
    each = {
        k: (b[k][row] == truth[k]) * 1.0 - (a[k][row] == truth[k])
        for k in names
    }
    gains.append(np.mean([x.mean() for x in each.values()]))
    own = dict.fromkeys(range(400), 0.0)
    for k, x in each.items():
      for i, value in zip(ids[k], (x - x.mean()) / len(x) / len(names)):
        own[i] += value
    influence.append(np.array([own[i] for i in range(400)]))
  n = len(repeats)
  shared = np.mean(
      [influence[i] @ influence[j] for i in range(n) for j in range(i)]
  )
  alone = np.var(gains, ddof=1) / n
  total = max(alone + max(shared, 0), (sum(influence) ** 2).sum() / n**2)
  free = (n - 1) * (total / alone) ** 2
  return np.mean(gains), np.sqrt(total), free


@pytest.mark.parametrize('has_splits', (False, True))
def test_repeats_are_paired(tmp_path, has_splits):
  """Over seeds, or over splits of one seed."""
  repeats = [drawn(i, (0.6, 0.66)) for i in range(4)]
  for k, name in enumerate('ab'):
    tables = []
    for i, (ids, truth, both) in enumerate(repeats):
      tables.append(rows_of(both[k], truth=truth))
      part = 'splits' if has_splits else ''
      folder = tmp_path / name / part / (str(i) if part else f'seed{i}')
      write_answers(folder, both[k], truth=truth, ids=ids)
      if not has_splits:
        write(folder, tables[-1])
    if has_splits:
      write(tmp_path / name, tables[0], splits=tables)
  compared = by_name(comparing.compare(tmp_path / 'a', tmp_path / 'b'))
  for data, names in (('test', ['test']), ('mean of shifts', ['blur', 'fog'])):
    mean, error, free = by_hand(repeats, names, 3)
    got = compared['greedy', data].gain
    assert got.gain == pytest.approx(mean) and got.num_repeats == 4
    interval = stats.t(free, mean, error).interval(0.95)
    np.testing.assert_allclose(got[1:3], interval)
  # Other seeds, or splits: other examples.
  if has_splits:
    ids, truth, both = drawn(9, (0.6, 0.66))
    write_answers(tmp_path / 'b/splits/2', both[1], truth=truth, ids=ids)
    first, *_ = comparing.compare(tmp_path / 'a', tmp_path / 'b').shared
    assert first.reason == 'A and B have different examples in held-out'
  else:
    one = write(tmp_path / 'c/seed2', rows_of(classes(0.7))).parent
    compared = comparing.compare(tmp_path / 'a', one)
    (reason,) = {x.reason for x in compared.shared}
    assert re.fullmatch('one seed, and .* is missing: run .*', reason)


def test_other_examples_are_not_paired(pair):
  first, second, _, b = pair
  ids = {name: np.arange(n) for name, n in SIZES.items()}
  write_answers(second, b, ids=ids | {'fog': ids['fog'] + 1})
  compared = by_name(comparing.compare(first, second, has_each_shift=True))
  expected = 'one seed, and A and B have different examples in fog'
  assert compared['greedy', 'fog'].reason == expected
  assert compared['greedy', 'mean of shifts'].reason == expected
  assert np.isnan(compared['greedy', 'fog'].gain.low)
  assert not compared['greedy', 'blur'].reason
  write_answers(second, b, ids={name: x + 1 for name, x in ids.items()})
  compared = by_name(comparing.compare(first, second, has_each_shift=True))
  expected = expected.replace('fog', 'blur')  # The first of them.
  assert compared['greedy', 'mean of shifts'].reason == expected


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
  assert (
      'mean of shifts: interval by exact McNemar over 200 examples.'
      in done.output
  )
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
        (lambda a, b: (b / 'answers.npz').write_bytes(b'PK'), 'Delete it'),
        (lambda a, b: flip(b / 'answers.npz'), 'Delete it'),
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


def test_a_path_that_is_not_there(pair):
  nothing = str(pair[0].parent / 'nothing')
  done = testing.CliRunner().invoke(cli.app, ['compare', nothing, str(pair[1])])
  assert done.exit_code == 1 and 'nothing does not exist: ' in done.output
