"""Tables and pictures from rows made by hand."""

import functools
import io
import json
import re

from matplotlib import figure
import numpy as np
import pytest
from rich import console
from scipy import stats
from sklearn import metrics as sk

import jaxsoup
from jaxsoup import metrics
from jaxsoup import report
from jaxsoup import statistics
from jaxsoup.data import sources
from jaxsoup.experiments import configs
from jaxsoup.experiments import results


def row(name, kind, held_out, test, shift, cost=1):
  shifts = {'noise': shift, 'blur': shift + 0.2}
  return report.Row(name, kind, held_out, test, shifts, 1 - test, 0.05, cost)


ROWS = [
    row('00', 'single', 0.90, 0.80, 0.30),
    row('01', 'single', 0.92, 0.78, 0.50),
    row('02', 'single', 0.85, 0.70, 0.10),
    row('uniform', 'soup', 0.93, 0.82, 0.40),
    row('greedy', 'soup', 0.94, 0.82, 0.45),
    row('ensemble', 'ensemble', 0.91, 0.84, 0.35, cost=3),
]


def test_summary():
  best, mean, *others = report.summary(ROWS)
  # Best on held-out, which is not the best on test.
  assert best == ROWS[1]._replace(name='best single')
  assert mean.name == 'mean of singles'
  assert mean.test == pytest.approx(np.mean([0.80, 0.78, 0.70]))
  assert ROWS[0].mean_shift == pytest.approx(0.4)
  assert mean.shifts['blur'] == pytest.approx(np.mean([0.5, 0.7, 0.3]))
  assert others == ROWS[3:]
  assert report.summary(ROWS[3:]) == ROWS[3:]


def cells_of(line):
  return [cell.strip() for cell in line.strip('|').split('|')]


def table_of(lines):
  return {cells_of(line)[0]: cells_of(line)[1:] for line in lines}


def test_markdown():
  lines = report.markdown(report.summary(ROWS)).split('\n')
  assert cells_of(lines[0])[:4] == ['', 'held-out', 'test', 'mean of shifts']
  assert set(lines[1]) <= set('|-:')
  assert len(lines) == 2 + 5  # No gains are known: no legend.
  table = table_of(lines[2:])
  assert table['best single'] == ['92.0', '78.0', '60.0', '0.220', '5.0', 'x1']
  assert table['ensemble'] == ['91.0', '84.0', '45.0', '0.160', '5.0', 'x3']
  assert not any('*' in line for line in lines)


SIZES = {'held_out': 300, 'test': 500, 'noise': 500, 'blur': 500}
SKILLS = {'00': 2.0, '01': 1.9, 'worse': 1.2, 'equal': 1.95, 'better': 3.5}


@functools.cache
def outputs():
  """Logits by model and data set, and labels; three of the sets are related."""
  rng = np.random.default_rng(0)
  label = {k: rng.integers(4, size=n) for k, n in SIZES.items()}
  label['noise'] = label['blur'] = label['test']
  shared = {k: rng.normal(size=(n, 4)) for k, n in SIZES.items()}
  logits = {
      name: {
          k: shared[k]
          + 0.6 * rng.normal(size=(n, 4))
          + (skill - (k in ('noise', 'blur'))) * np.eye(4)[label[k]]
          for k, n in SIZES.items()
      }
      for name, skill in SKILLS.items()
  }
  return logits, label


def score(logits, label, name):
  return float(np.mean(logits[name].argmax(-1) == label[name]))


@functools.cache
def compared(**options):
  logits, label = outputs()
  rows = []
  for name, x in logits.items():
    scores = {k: score(x, label, k) for k in SIZES}
    kind = 'single' if name.isdigit() else 'soup'
    shifts = {k: scores[k] for k in ('noise', 'blur')}
    rows.append(
        report.Row(
            name, kind, scores['held_out'], scores['test'], shifts, 0.3, 0.1, 1
        )
    )
  return report.with_gains(rows, list(logits.values()), label, **options)


def test_gains_are_comparisons_with_the_best_single():
  logits, label = outputs()
  rows = {row.name: row for row in compared()}
  assert not rows['00'].gains and not rows['01'].gains
  assert rows['00'].held_out > rows['01'].held_out
  gains = rows['better'].gains
  assert list(gains) == ['held_out', 'test', 'shifts', 'optimism']
  for name in ('held_out', 'test'):
    right = [
        logits[k][name].argmax(-1) == label[name] for k in ('better', '00')
    ]
    only = (right[0] & ~right[1]).sum(), (right[1] & ~right[0]).sum()
    expected = stats.binomtest(int(only[0]), int(sum(only))).pvalue
    assert gains[name].p_value == pytest.approx(expected)
    assert gains[name].gain == pytest.approx(
        np.mean(right[0]) - np.mean(right[1])
    )
    assert gains[name].num == SIZES[name]
  assert gains['shifts'].gain == pytest.approx(
      rows['better'].mean_shift - rows['00'].mean_shift
  )
  assert gains['optimism'].gain == pytest.approx(
      gains['held_out'].gain - gains['test'].gain
  )
  # Both shifts are of the same examples: 500 count, not 1,000.
  differences = sum(
      (logits['better'][k].argmax(-1) == label[k]) * 0.5
      - (logits['00'][k].argmax(-1) == label[k]) * 0.5
      for k in ('noise', 'blur')
  )
  width = 2 * 1.96 * differences.std() / np.sqrt(500)
  assert gains['shifts'].high - gains['shifts'].low == pytest.approx(
      width, rel=0.06
  )


def test_gains_of_answers_are_those_of_logits():
  logits, label = outputs()
  answers = [
      {k: y.argmax(-1) == label[k] for k, y in x.items()}
      for x in logits.values()
  ]
  plain = [row._replace(gains={}) for row in compared()]
  assert report.with_gains(plain, answers, label, metric=None) == compared()


def test_gains_by_another_metric_and_without_shifts():
  logits, label = outputs()
  part = [{k: x[k] for k in ('held_out', 'test')} for x in logits.values()]
  rows = [
      row._replace(shifts={}, gains={}, metric='matthews') for row in compared()
  ]
  gained = report.with_gains(
      rows, part, label, metric=metrics.matthews, num_resamples=50
  )
  gain = gained[-1].gains['test']
  expected = [
      sk.matthews_corrcoef(label['test'], logits[k]['test'].argmax(-1))
      for k in ('better', '00')
  ]
  assert gain.gain == pytest.approx(expected[0] - expected[1], abs=1e-5)
  text = report.markdown(report.summary(gained))
  assert 'Scores: matthews' in text and 'test: paired bootstrap)' in text
  # GLUE has no shifts: no column of nothing.
  assert 'shifts' not in text and 'nan' not in text


def test_bold_means_significant():
  rows = {row.name: row for row in compared()}
  # Else there is nothing to tell apart.
  assert rows['better'].gains['test'].p_value < 0.05
  assert rows['worse'].gains['test'].p_value < 0.05
  assert rows['equal'].gains['test'].p_value > 0.05
  lines = report.markdown(report.summary(compared())).split('\n')
  headers = cells_of(lines[0])
  assert headers[:6] == [
      '', 'held-out', 'test', 'gain', 'mean of shifts', 'gain'
  ]  # fmt: skip
  table = table_of(lines[2:7])
  assert table['best single'][2] == '' and table['mean of singles'][4] == ''
  for name, is_bold in (('better', True), ('equal', False), ('worse', False)):
    for cell, key in ((table[name][2], 'test'), (table[name][4], 'shifts')):
      gain = rows[name].gains[key]
      assert cell.startswith('**') == cell.endswith('**') == is_bold
      numbers = [float(x) for x in re.findall(r'[-+]?[\d.]+', cell)]
      np.testing.assert_allclose(
          numbers, np.multiply(gain[:3], 100), atol=0.051
      )
    others = [c for i, c in enumerate(table[name]) if i not in (2, 4)]
    assert not any('*' in c for c in others)


def test_legend():
  text = report.markdown(report.summary(compared()))
  what, on_what, optimism = text.split('\n\n')[1:]
  assert '**bold**: significantly better, p < 0.05' in what
  assert 'accuracy' in what and '95% interval' in what
  assert 'test: exact McNemar; mean of shifts: paired bootstrap' in what
  assert on_what == (
      'Examples: selected on held-out (300); reported on test (500), noise, '
      'blur (1,000).'
  )
  gain = compared()[-1].gains['optimism'].gain
  assert f'better {gain * 100:+.1f} [' in optimism
  sets = {
      'selected': {'held-out': 300},
      'tuned': {'other': 20},
      'reported': {'test': 500},
  }
  text = report.markdown(compared(), sets=sets)
  assert 'on held-out (300); tuned on other (20); reported on test (' in text


def test_with_gains_names_what_is_wrong():
  logits, label = outputs()
  rows, all_logits = compared(), list(logits.values())
  with pytest.raises(ValueError, match='5 rows, and logits of 4'):
    report.with_gains(rows, all_logits[1:], label)
  twice = [{**x, 'test': x['held_out']} for x in all_logits]
  with pytest.raises(ValueError, match='held_out and test are the same data'):
    report.with_gains(rows, twice, label)
  soups = rows[2:]
  assert report.with_gains(soups, all_logits[2:], label) == soups


def test_mean_and_deviation_over_repetitions():
  tables = [[row('a', 'soup', 0.9, test, 0.3)] for test in (0.7, 0.8, 0.9)]
  (mean,), (deviation,) = report.mean_rows(tables)
  assert mean.name == 'a' and mean.test == pytest.approx(0.8)
  assert deviation.test == pytest.approx(0.1)
  assert deviation.held_out == pytest.approx(0, abs=1e-12)
  assert '| 80.0 ± 10.0 |' in report.markdown([mean], [deviation])


def repetitions(tests):
  return [
      report.summary(
          [
              row('00', 'single', 0.9, single, 0.3),
              row('soup', 'soup', 0.95, soup, 0.3),
          ]
      )
      for single, soup in tests
  ]


def test_gains_over_repetitions():
  tests = [(0.70, 0.72), (0.80, 0.83), (0.75, 0.76)]
  means, deviations = report.mean_rows(repetitions(tests))
  best, _, soup = means
  assert not best.gains
  expected = stats.ttest_rel(*np.transpose(tests)[::-1])
  gain = soup.gains['test']
  assert gain.gain == pytest.approx(0.02)
  np.testing.assert_allclose(gain[1:3], expected.confidence_interval())
  assert gain.p_value == pytest.approx(expected.pvalue)
  assert gain.num_repeats == 3
  # Held-out gains of 0.05, less those.
  assert soup.gains['optimism'].gain == pytest.approx(0.03)
  text = report.markdown(means, deviations)
  assert '| 77.0 ± 5.6 | +2.0 [-0.5,4.5] |' in text
  assert '(test, mean of shifts: paired t over 3 repeats)' in text


def answers_of(tables, rng, num=60):
  """Answers that the tables could be of, to parts of 100 examples."""
  made = []
  for table in tables:
    names = ('held_out', 'test', *table[0].shifts)
    rows = {
        row.name: {name: rng.random(num) < 0.7 for name in names}
        for row in table
    }
    ids = {name: rng.permutation(100)[:num] for name in names}
    made.append([report.Answers(rows, dict.fromkeys(names), ids)])
  return made


def test_gains_over_repetitions_with_examples_in_common(rng):
  tables = repetitions([(0.70, 0.72), (0.80, 0.83), (0.75, 0.76)])
  given = answers_of(tables, rng)
  means, deviations = report.mean_rows(tables, given)
  gains, name = means[-1].gains, tables[0][-1].name
  of = lambda name, key: [x.rows[name][key] for (x,) in given]
  shift, *others = tables[0][-1].shifts
  for key in ('test', shift):
    ids = [x.ids[key] for (x,) in given]
    answers = of(name, key), of('best single', key)
    expected = statistics.crossed(None, *answers, ids)
    assert gains[key] == expected._replace(num=0)
  table = report.gains_by_shift(means)
  assert table.startswith(f'| gain on | {" | ".join([shift, *others])} |')
  assert report.with_interval(expected) in table
  assert report.gains_by_shift(tables[0]) == ''
  # The held-out gain minus the test gain, by repetition.
  mean = lambda name, key: np.mean(of(name, key), axis=1)
  by_key = [
      mean(name, key) - mean('best single', key) for key in ('held_out', 'test')
  ]
  optimism = by_key[0] - by_key[1]
  assert gains['optimism'].gain == pytest.approx(optimism.mean())
  assert gains['optimism'].high > optimism.mean() > gains['optimism'].low
  text = report.markdown(means, deviations)
  assert '(test, mean of shifts: crossed t over 3 repeats)' in text


def test_splits_of_several_seeds_count_by_their_examples(rng):
  """A seed's gain is the mean over its splits."""
  tables = repetitions([(0.70, 0.72), (0.80, 0.83), (0.75, 0.76)])
  of_splits = [answers_of(tables, rng) for _ in range(2)]
  given = [[a, b] for (a,), (b,) in zip(*of_splits)]
  means, _ = report.mean_rows(tables, given)
  name = tables[0][-1].name
  gains = [
      np.mean(x.rows[name]['test']) - np.mean(x.rows['best single']['test'])
      for seed in given
      for x in seed
  ]
  got = means[-1].gains['test']
  assert got.gain == pytest.approx(np.mean(gains)) and got.num_repeats == 3


def test_gains_over_repetitions_know_the_sizes():
  means, _ = report.mean_rows([report.summary(compared())] * 2)
  assert means[-1].gains['test'].num == 500
  assert 'selected on held-out (300)' in report.markdown(means)


def test_corruptions_of_one_image_are_one_example():
  config = configs.load('configs/digits.py')
  splits = config.data_fn(config.config)
  ids = results.ids(splits, seed=0)
  assert len(np.unique(ids['test'])) == pytest.approx(897, abs=3)
  for name in ('noise', 'blur'):
    np.testing.assert_array_equal(ids[name], ids['test'])
  assert not set(ids['held_out'].tolist()) & set(ids['test'].tolist())


def test_streams_have_the_same_examples_in_all_seeds():
  stream = range(3)
  splits = sources.Splits(
      stream, stream, stream, {'sketch': stream}, rules={'held_out': {}}
  )
  first, second = (results.ids(splits, seed) for seed in (0, 1))
  for name in ('test', 'sketch'):
    np.testing.assert_array_equal(first[name], second[name])
  known = [first[k] for k in ('test', 'sketch', 'held_out')]
  known.append(second['held_out'])
  assert len(np.unique(np.concatenate(known))) == 12


def test_one_repetition_keeps_its_gains_and_has_no_deviation():
  table = report.summary(compared())
  means, deviations = report.mean_rows([table])
  assert [row.gains for row in means] == [row.gains for row in table]
  assert np.isnan([row.test for row in deviations]).all()


def test_deviation_of_the_mean_of_shifts():
  # The two shifts move against each other, so their mean stands still.
  first = row('a', 'soup', 0.9, 0.8, 0.3)
  tables = [[first._replace(shifts={'x': x, 'y': 1 - x})] for x in (0.2, 0.6)]
  (mean,), (deviation,) = report.mean_rows(tables)
  assert mean.mean_shift == pytest.approx(0.5)
  assert deviation.mean_shift == pytest.approx(0, abs=1e-12)


def printed(table, width):
  out = console.Console(file=io.StringIO(), width=width)
  out.print(table)
  return out.file.getvalue()


def test_rich_table():
  text = printed(report.rich_table(report.summary(ROWS)), 120)
  for part in ('cost', 'mean of singles', '84.0', 'x3'):
    assert part in text
  assert '[bold]' not in text and '**' not in text


@pytest.mark.parametrize('width', (80, 90, 100, 120))
@pytest.mark.parametrize('repeats', (1, 3))
def test_rich_table_shows_what_markdown_does(width, repeats):
  means, many = report.mean_rows([report.summary(compared())] * repeats)
  many = many if repeats > 1 else None
  text = printed(report.rich_table(means, many, width=width), width)
  assert '…' not in text and max(map(len, text.split('\n'))) <= width
  words = report.markdown(means, many).replace('**', '').replace('± ', '±')
  missing = set(re.findall(r'[^\s|:-]+', words)) - set(
      re.findall(r'[^\s|:-]+', text)
  )
  assert missing == {'at', 'inference'}


def test_rich_table_is_bold_where_markdown_is():
  rows = report.summary(compared())
  out = console.Console(
      file=io.StringIO(),
      width=120,
      force_terminal=True,
      color_system='standard',
  )
  out.print(report.rich_table(rows, width=120))
  in_rich = re.findall(r'\x1b\[1m([-+]\d[^\x1b]*)\x1b', out.file.getvalue())
  in_markdown = re.findall(r'\*\*([-+]\d[^*]*)\*\*', report.markdown(rows))
  assert in_rich == in_markdown and len(in_rich) == 2


def test_rows_come_back(tmp_path):
  path = tmp_path / 'results.json'
  as_json = lambda rows: [row._asdict() for row in rows]
  old = [
      {k: v for k, v in row.items() if k not in ('gains', 'metric')}
      for row in as_json(ROWS)
  ]
  for content, expected in (
      (as_json(ROWS), ROWS),
      ({'rows': as_json(ROWS)}, ROWS),
      (old, ROWS),  # Of an older version.
      (as_json(compared()), compared()),
  ):
    path.write_text(json.dumps(content))
    rows = report.read_rows(path)
    assert rows == expected
    assert report.markdown(rows) == report.markdown(expected)
  assert rows[-1].gains['test'].is_significant


def axes():
  return figure.Figure().add_subplot()


def points(collections):
  return np.concatenate([c.get_offsets() for c in collections])


def legend(ax):
  return [text.get_text() for text in ax.get_legend().get_texts()]


def test_scatter():
  ax = axes()
  report.scatter(ax, ROWS)
  singles, best, *others = ax.collections
  np.testing.assert_allclose(
      singles.get_offsets(), [(80, 40), (78, 60), (70, 20)]
  )
  np.testing.assert_allclose(best.get_offsets(), [(78, 60)])
  np.testing.assert_allclose(points(others), [(82, 50), (82, 55), (84, 45)])
  assert legend(ax)[2:] == ['uniform', 'greedy', 'ensemble (x3)']


def test_scatter_draws_no_two_soups_alike():
  ax = axes()
  soup = next(row for row in ROWS if row.kind == 'soup')
  report.scatter(ax, [soup._replace(name=str(i)) for i in range(20)])
  looks = {
      (x.get_paths()[0].vertices.tobytes(), x.get_facecolor().tobytes())
      for x in ax.collections
      if x.get_label().isdigit()
  }
  assert len(looks) == 20


def test_scatter_without_singles_says_what_the_scores_are():
  ax = axes()
  report.scatter(ax, [row._replace(metric='F1') for row in ROWS[3:]])
  assert legend(ax)[-1] == 'ensemble (x3)'
  assert ax.get_xlabel() == 'test F1 (%)'


def search():
  score = lambda params: -abs(float(params['w'][0]) - 1.2)
  ingredients = [{'w': np.full(1, k, np.float32)} for k in range(5)]
  return jaxsoup.greedy(ingredients, score).info


def test_trials():
  info, ax = search(), axes()
  report.trials(ax, {'greedy': info}, scale=1)
  accepted, rejected = ax.collections[:2]
  expected = {True: [], False: []}
  for number, trial in enumerate(info.trials, 1):
    expected[trial.accepted].append((number, trial.score))
  assert expected[True] and expected[False]
  np.testing.assert_allclose(accepted.get_offsets(), expected[True])
  np.testing.assert_allclose(rejected.get_offsets(), expected[False])
  (line,) = ax.lines
  bars = np.asarray(line.get_ydata())
  # The bar is the best so far: it rises, and ends at the soup's score.
  assert (np.diff(bars) >= 0).all() and bars[-1] == pytest.approx(info.score)
  assert legend(ax) == ['greedy soup', 'accepted', 'rejected']


def test_trials_are_per_cent_by_default():
  info, ax = search(), axes()
  report.trials(ax, {'a': info, 'b': info})
  assert len(ax.lines) == 2
  assert ax.lines[0].get_ydata()[-1] == pytest.approx(info.score * 100)


def test_pictures_need_no_display(tmp_path, monkeypatch):
  for name in ('DISPLAY', 'MPLBACKEND', 'WAYLAND_DISPLAY'):
    monkeypatch.delenv(name, raising=False)
  path = tmp_path / 'new' / 'figure.png'
  report.save(lambda ax: report.scatter(ax, ROWS), path, size=(4, 3))
  content = path.read_bytes()
  assert content.startswith(b'\x89PNG')
  size = [int.from_bytes(content[i : i + 4], 'big') for i in (16, 20)]
  assert size == [640, 480]
