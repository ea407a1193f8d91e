"""The report of a score log: all candidates, and the Pareto front."""

import csv
import itertools

import hypothesis
from hypothesis.extra import numpy as arrays
from matplotlib import figure
import numpy as np
import pytest
from typer import testing

import jaxsoup
from jaxsoup import checkpoints
from jaxsoup import cli
from jaxsoup import report

NUMBERS = [{'x': np.float32(x)} for x in (1, 4, -2, 3)]


def several(params):
  x = float(params['x'])
  return {'near': -abs(x - 2), 'low': -x, 'num': 12}


@hypothesis.given(
    arrays.arrays(
        float,
        arrays.array_shapes(min_dims=2, max_dims=2, max_side=5),
        elements={'min_value': 0, 'max_value': 3},
    ).map(np.round)
)
def test_not_dominated(scores):
  """Against the definition, pair by pair."""
  expected = [True] * len(scores)
  for i, j in itertools.permutations(range(len(scores)), 2):
    pairs = list(zip(scores[i], scores[j]))
    if all(a >= b for a, b in pairs) and any(a > b for a, b in pairs):
      expected[j] = False
  assert report.not_dominated(scores).tolist() == expected


@pytest.fixture
def log(tmp_path):
  path = tmp_path / 'scores.jsonl'
  scores = checkpoints.ScoreLog(path, evaluation='mine')
  options = dict(objective='near', scores=scores)
  jaxsoup.greedy(NUMBERS, several, **options)
  jaxsoup.search(NUMBERS, several, num_evaluations=9, **options)
  return path


def test_page(log, tmp_path):
  command = ['report', str(log), '--out', str(tmp_path / 'page.html')]
  result = testing.CliRunner().invoke(cli.app, command)
  assert result.exit_code == 0, result.output
  with (tmp_path / 'page' / 'candidates.csv').open() as file:
    rows = list(csv.DictReader(file))
  known = list(checkpoints.ScoreLog(log).values())
  assert [float(row['near']) for row in rows] == [x['near'] for x in known]
  # The number of examples is the same for all, and no choice.
  front = report.not_dominated([[x['near'], x['low']] for x in known])
  assert [row['not_dominated'] == 'True' for row in rows] == front.tolist()
  assert rows[0]['candidate'] == '0' and ': 0.250' in rows[-9]['candidate']
  text = (tmp_path / 'page.html').read_text()
  assert f'{len(known)} candidates, of which {front.sum()} are not' in text
  pictures = {p.name for p in (tmp_path / 'page').glob('*.svg')}
  assert pictures == {'pareto_0.svg'}


def test_chosen_scores(log, tmp_path):
  out = tmp_path / 'page.html'
  report.write_report(log, out, metrics=['low'])
  with (tmp_path / 'page' / 'candidates.csv').open() as file:
    rows = list(csv.DictReader(file))
  best = max(float(row['low']) for row in rows)
  for row in rows:
    assert (row['not_dominated'] == 'True') == (float(row['low']) == best)
  with pytest.raises(ValueError, match="no scores 'far', it has: near, low"):
    report.write_report(log, metrics=['far'])
  with pytest.raises(ValueError, match='is a score log: '):
    report.write_report(log, held_out='near')
  table = tmp_path / 'table.jsonl'
  table.write_text('{"held_out": 0.5, "test": 0.5}\n')
  with pytest.raises(ValueError, match='is not a score log: '):
    report.write_report(table, metrics=['near'])


def test_a_table_with_a_column_alpha_is_no_log(tmp_path):
  path = tmp_path / 'scores.jsonl'
  path.write_text('{"name": "00", "alpha": 0.2, "held_out": 0.9, "test": 0.9}')
  assert 'alpha' in report.write_report(path)[0].read_text()


def test_a_log_of_numbers_and_bounds(tmp_path):
  log = checkpoints.ScoreLog(tmp_path / 'scores.jsonl')
  log[(0,)], log[(1,)] = 0.5, 0.75
  log[(0, 1)] = jaxsoup.AtMost(0.625)
  files = report.write_report(tmp_path / 'scores.jsonl')
  text = files[0].read_text()
  assert '2 candidates, of which 1 are not dominated' in text
  assert '1 more were rejected early' in text


def test_picture():
  ax = figure.Figure().add_subplot()
  report.pareto(ax, {'a': [0.1, 0.5, 0.3], 'b': [0.9, 0.2, 0.1]})
  dominated, front = (x.get_offsets().tolist() for x in ax.collections)
  assert dominated == [[0.3, 0.1]] and front == [[0.1, 0.9], [0.5, 0.2]]
  assert (ax.get_xlabel(), ax.get_ylabel()) == ('a', 'b')
