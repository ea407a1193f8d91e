"""The score log: what a search remembers after it was stopped."""

import json
import shutil

import numpy as np
import pytest

from jaxsoup import checkpoints


@pytest.fixture
def runs(tmp_path):
  paths = [tmp_path / f'run{k}' for k in range(3)]
  for k, path in enumerate(paths):
    checkpoints.save(path, {'w': np.full(2, k, np.float32)})
  return paths


@pytest.fixture
def path(tmp_path):
  return tmp_path / 'logs' / 'scores.jsonl'


def test_remembers(path):
  log = checkpoints.ScoreLog(path)
  assert not log and not path.exists()
  log[(1,)], log[(0, 1)] = 0.1 + 0.2, -np.float64(3)
  again = checkpoints.ScoreLog(path)
  assert dict(again) == {(1,): 0.1 + 0.2, (0, 1): -3.0}
  assert len(again) == 2 and (0,) not in again
  with pytest.raises(KeyError):
    again[(0,)]


def test_later_lines_win(path):
  for score in (0.1, 0.7):
    checkpoints.ScoreLog(path)[(0,)] = score
  assert checkpoints.ScoreLog(path)[(0,)] == 0.7


def test_only_grows(path):
  log = checkpoints.ScoreLog(path)
  log[(0,)] = 0.5
  with pytest.raises(TypeError, match='cannot be deleted'):
    del log[(0,)]


def test_every_truncation_is_survived(path, runs):
  ingredients = checkpoints.Ingredients(runs)
  log = checkpoints.ScoreLog(path, ingredients)
  scores = {(0,): 0.5, (1,): 0.25, (0, 1): 0.75}
  log.update(scores)
  content = path.read_bytes()
  for length in range(0, len(content), 7):
    path.write_bytes(content[:length])
    log = checkpoints.ScoreLog(path, ingredients)
    assert len(log) == max(content[:length].count(b'\n') - 1, 0)
    log.update({k: v for k, v in scores.items() if k not in log})
    # As good as new: with the identities at its head.
    assert path.read_bytes() == content


@pytest.mark.parametrize(
    'line',
    [
        '{"members": [0], "sco',
        '[1, 2]',
        '{"members": [1]}',
        '{"members": 3, "score": 0.5}',
        '{"members": [0], "score": "high"}',
        '{"members": ["a"], "score": 0.5}',
        '\udcff',
        '\0',
        'null',
        '"x"',
        '{}',
        '',
    ],
)
def test_unreadable_line_is_named(path, line):
  log = checkpoints.ScoreLog(path)
  log[(0,)] = 0.5
  with path.open('ab') as file:
    file.write(line.encode(errors='surrogateescape') + b'\n')
  log[(1,)] = 0.5
  before = path.read_bytes()
  words = 'scores.jsonl, line 2 is unreadable.* Delete that line'
  with pytest.raises(ValueError, match=words):
    checkpoints.ScoreLog(path)
  assert path.read_bytes() == before


def test_other_ingredients_are_refused(path, runs):
  checkpoints.ScoreLog(path, checkpoints.Ingredients(runs))[(0,)] = 0.5
  for others in (runs[:2], runs[::-1]):
    with pytest.raises(ValueError, match='scores of other ingredients'):
      checkpoints.ScoreLog(path, checkpoints.Ingredients(others))
  same = checkpoints.ScoreLog(path, checkpoints.Ingredients(runs))
  assert dict(same) == {(0,): 0.5}


def test_ingredient_trained_anew_is_refused(path, runs):
  checkpoints.ScoreLog(path, checkpoints.Ingredients(runs))[(0,)] = 0.5
  shutil.rmtree(runs[1])
  checkpoints.save(runs[1], {'w': np.full(2, 9, np.float32)})
  with pytest.raises(ValueError, match='files changed since'):
    checkpoints.ScoreLog(path, checkpoints.Ingredients(runs))


def test_another_evaluation_is_refused(path, runs):
  ingredients = checkpoints.Ingredients(runs)
  first = {'metric': 'accuracy', 'batches': (1, 2)}
  log = checkpoints.ScoreLog(path, ingredients, evaluation=first)
  log[(0,)] = 0.5
  head = {'ingredients': [ingredients.identity(k) for k in range(3)]}
  head |= {'evaluation': {'metric': 'accuracy', 'batches': [1, 2]}}
  written = json.loads(path.read_text().splitlines()[0])
  assert written | head == written
  again = checkpoints.ScoreLog(path, ingredients, evaluation=first)
  assert dict(again) == dict(checkpoints.ScoreLog(path)) == {(0,): 0.5}
  with pytest.raises(ValueError, match=r"'accuracy'.* then, 'f1' now. Delete"):
    checkpoints.ScoreLog(path, ingredients, evaluation='f1')
  with pytest.raises(TypeError, match='not JSON serializable'):
    checkpoints.ScoreLog(path, evaluation=lambda params: 0.0)


def test_a_head_without_scores_is_compared_too(path):
  path.parent.mkdir()
  path.write_text('{"evaluation": "accuracy"}\n')
  assert not checkpoints.ScoreLog(path, evaluation='accuracy')
  with pytest.raises(ValueError, match='scores of another evaluation'):
    checkpoints.ScoreLog(path, evaluation='f1')


def test_scores_of_unknown_origin_are_refused(path, runs):
  checkpoints.ScoreLog(path)[(0,)] = 0.5
  with pytest.raises(ValueError, match=r'other ingredients \(unknown then, 3'):
    checkpoints.ScoreLog(path, checkpoints.Ingredients(runs))
  with pytest.raises(ValueError, match="evaluation: None then, 'f1' now"):
    checkpoints.ScoreLog(path, evaluation='f1')
