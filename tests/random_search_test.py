"""Sweeps: what is drawn, against the distributions and a second drawing."""

import numpy as np
import pytest
from scipy import stats

from jaxsoup.experiments import random_search

RANGES = dict(
    draw=0,
    num_runs=400,
    learning_rate=(1e-6, 1e-4),
    label_smoothing=(0.1, 0.25),
    mixup=(0.2, 0.9),
    num_epochs=(4, 16),
    batch_size=(16, 32, 128),
)
NAMES = dict(
    log_uniform=['learning_rate'],
    uniform=['label_smoothing'],
    integer=['num_epochs'],
    sometimes={'mixup': 0.6},
    choice=['batch_size'],
)


def column(name, seed=0, **ranges):
  runs = random_search.runs(RANGES | ranges, seed, **NAMES)
  return np.array([run[name] for run in runs])


def test_distributions():
  logs = np.log10(column('learning_rate'))
  assert stats.kstest(logs, stats.uniform(-6, 2).cdf).pvalue > 0.01
  smoothing = column('label_smoothing')
  assert stats.kstest(smoothing, stats.uniform(0.1, 0.15).cdf).pvalue > 0.01
  epochs = column('num_epochs')
  counts = np.bincount(epochs - 4, minlength=13)
  assert len(counts) == 13 and stats.chisquare(counts).pvalue > 0.01
  sizes, counts = np.unique(column('batch_size'), return_counts=True)
  assert sizes.tolist() == [16, 32, 128]
  assert stats.chisquare(counts).pvalue > 0.01
  mixup = column('mixup')
  is_on = mixup > 0
  assert stats.binomtest(is_on.sum(), 400, 0.6).pvalue > 0.01
  assert stats.kstest(mixup[is_on], stats.uniform(0.2, 0.7).cdf).pvalue > 0.01


def test_fewer_runs_are_the_first_of_more():
  few = random_search.runs(RANGES | {'num_runs': 5}, 0, **NAMES)
  assert few == random_search.runs(RANGES, 0, **NAMES)[:5]
  assert len({run['seed'] for run in few}) == 5


@pytest.mark.parametrize('other', [dict(seed=1), dict(draw=1)])
def test_seeds_and_draws_differ(other):
  assert not np.any(column('learning_rate') == column('learning_rate', **other))


def test_a_draw_is_not_that_of_another_seed():
  first = random_search.runs(RANGES | {'draw': 1}, 0, **NAMES)
  assert first[0] != random_search.runs(RANGES, 1000, **NAMES)[0]


def test_the_order_of_what_is_drawn():
  """It is part of what a seed means: the runs of a workdir are drawn anew."""
  rng = np.random.default_rng([3, *b'sweep'])
  for run in random_search.runs(RANGES | {'num_runs': 3}, 3, **NAMES):
    assert run['seed'] == rng.integers(2**31)
    assert run['learning_rate'] == pytest.approx(
        1e-6 * 100 ** rng.random(), rel=1e-9
    )
    assert run['label_smoothing'] == pytest.approx(0.1 + 0.15 * rng.random())
    is_on = rng.random() < 0.6
    assert run['mixup'] == (
        pytest.approx(0.2 + 0.7 * rng.random()) if is_on else 0
    )
    assert run['num_epochs'] == rng.integers(4, 17)
    assert run['batch_size'] == rng.choice([16, 32, 128])
