"""Tables and pictures from rows made by hand."""

import io
import json

from matplotlib import figure
import numpy as np
import pytest
from rich import console

import jaxsoup
from jaxsoup import report


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


def test_mean_shift():
  assert ROWS[0].mean_shift == pytest.approx(0.4)


def test_summary():
  best, mean, *others = report.summary(ROWS)
  # Best on held-out, which is not the best on test.
  assert best == ROWS[1]._replace(name='best single')
  assert mean.name == 'mean of singles'
  assert mean.test == pytest.approx(np.mean([0.80, 0.78, 0.70]))
  assert mean.shifts['blur'] == pytest.approx(np.mean([0.5, 0.7, 0.3]))
  assert others == ROWS[3:]
  assert report.summary(ROWS[3:]) == ROWS[3:]


def cells_of(line):
  return [cell.strip() for cell in line.strip('|').split('|')]


def test_markdown():
  lines = report.markdown(report.summary(ROWS)).split('\n')
  assert cells_of(lines[0])[:4] == ['', 'held-out', 'test', 'mean of shifts']
  assert set(lines[1]) <= set('|-:')
  assert len(lines) == 2 + 5
  table = {cells_of(line)[0]: cells_of(line)[1:] for line in lines[2:]}
  assert table['best single'] == [
      '92.0', '78.0', '**60.0**', '0.220', '**5.0**', 'x1'
  ]  # fmt: skip
  assert table['greedy'][0] == '**94.0**'
  assert table['ensemble'] == [
      '91.0', '**84.0**', '45.0', '**0.160**', '**5.0**', 'x3'
  ]  # fmt: skip
  bold = [c for cells in table.values() for c in cells if c.startswith('**')]
  assert len(bold) == 4 + 5  # One a column, and all five equal ECEs.


def test_equal_at_the_printed_precision_are_all_bold():
  rows = [
      row('a', 'soup', 0.9, 0.80001, 0.3),
      row('b', 'soup', 0.9, 0.80002, 0.3),
  ]
  assert report.markdown(rows).count('**80.0**') == 2


def test_mean_and_deviation_over_repetitions():
  tables = [[row('a', 'soup', 0.9, test, 0.3)] for test in (0.7, 0.8, 0.9)]
  (mean,), (deviation,) = report.mean_rows(tables)
  assert mean.name == 'a' and mean.test == pytest.approx(0.8)
  assert deviation.test == pytest.approx(0.1)
  assert deviation.held_out == pytest.approx(0, abs=1e-12)
  assert '**80.0** ± 10.0' in report.markdown([mean], [deviation])


def test_deviation_of_the_mean_of_shifts():
  # The two shifts move against each other, so their mean stands still.
  first = row('a', 'soup', 0.9, 0.8, 0.3)
  tables = [[first._replace(shifts={'x': x, 'y': 1 - x})] for x in (0.2, 0.6)]
  (mean,), (deviation,) = report.mean_rows(tables)
  assert mean.mean_shift == pytest.approx(0.5)
  assert deviation.mean_shift == pytest.approx(0, abs=1e-12)


def test_one_repetition_has_no_deviation():
  _, (deviation,) = report.mean_rows([[ROWS[0]]])
  assert np.isnan(deviation.test)


def test_rich_table():
  out = console.Console(file=io.StringIO(), width=120)
  out.print(report.rich_table(report.summary(ROWS)))
  text = out.file.getvalue()
  for part in ('inference', 'mean of singles', '84.0', 'x3'):
    assert part in text
  assert '[bold]' not in text and '**' not in text


def test_rows_come_back(tmp_path):
  for content in (
      [r._asdict() for r in ROWS],
      {'rows': [r._asdict() for r in ROWS]},
  ):
    (tmp_path / 'results.json').write_text(json.dumps(content))
    assert report.read_rows(tmp_path / 'results.json') == ROWS


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


def test_scatter_without_singles():
  ax = axes()
  report.scatter(ax, ROWS[3:])
  assert legend(ax)[-1] == 'ensemble (x3)'


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
