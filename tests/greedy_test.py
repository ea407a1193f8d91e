"""The searches over subsets, against a transcription of the paper's recipe."""

from collections.abc import Sequence

import _reference
import jax
import numpy as np
import pytest

import jaxsoup

NUM_MOST = 8


def one_hots(num):
  """Models whose mean tells which of them are in it."""
  return list(np.eye(NUM_MOST, dtype=np.float32)[:num])


def table_score(seed):
  """Any function of the set of members, in few values: ties are common."""
  table = np.random.default_rng(seed).integers(0, 5, 2**NUM_MOST)

  def score(params):
    params = np.asarray(params[0] if isinstance(params, list) else params)
    members = params > 0
    np.testing.assert_allclose(params, members / members.sum(), rtol=1e-6)
    return float(table[members @ (1 << np.arange(NUM_MOST))])

  return score


def distance_score(target, levels=np.inf):
  """Nearer to the target is better; with `levels` in so many steps."""

  def score(params):
    params = np.asarray(params[0] if isinstance(params, list) else params)
    value = -np.sum((np.float64(params) - target) ** 2)
    return value if levels == np.inf else float(np.round(value * levels))

  return score


def alpha_of(members, num):
  return np.float32(np.bincount(members, minlength=num) / len(members))


def assert_same_soup(actual, expected):
  np.testing.assert_array_equal(actual.params, expected.params)
  np.testing.assert_array_equal(actual.alpha, expected.alpha)
  assert actual.info == expected.info


def assert_consistent(soup, score, num):
  """What a soup says of itself: scores, trials, alpha."""
  info = soup.info
  for members, value in info.scores.items():
    models = [np.eye(NUM_MOST)[k] for k in members]
    assert value == score(np.mean(models, axis=0)), members
  for trial in info.trials:
    assert info.scores[trial.members] == trial.score
  assert info.scores[tuple(sorted(info.accepted))] == info.score
  np.testing.assert_array_equal(soup.alpha, alpha_of(info.accepted, num))
  np.testing.assert_allclose(soup.params[:num], soup.alpha, rtol=1e-6)


@pytest.mark.parametrize('strict', [False, True])
@pytest.mark.parametrize('order', ['sorted', 'given', 'key'])
def test_greedy_is_recipe_1(order, strict):
  num_ties = 0
  for seed in range(20):
    rng = np.random.default_rng(seed)
    num = rng.integers(1, NUM_MOST + 1)
    models, score = one_hots(num), table_score(seed)
    subset = rng.permutation(num)[: rng.integers(1, num + 1)].tolist()
    given = {
        'sorted': {},
        'given': {'order': subset},
        'key': {'key': jax.random.key(seed)},
    }[order]
    soup = jaxsoup.greedy(models, score, **given, strict=strict)
    tried = None if order == 'sorted' else soup.info.order
    assert order != 'given' or list(tried) == subset
    expected = _reference.greedy(
        [[m] for m in models], score, order=tried, strict=strict
    )
    assert soup.info.accepted == tuple(expected)
    assert tuple(t.ingredient for t in soup.info.trials) == soup.info.order
    assert soup.info.strict is strict
    assert_consistent(soup, score, num)
    scores = [t.score for t in soup.info.trials]
    num_ties += len(set(scores)) < len(scores)
  assert num_ties > 6  # Or the problems would not tell >= from >.


def test_key_is_a_random_order():
  run = lambda key: jaxsoup.greedy(one_hots(8), table_score(0), key=key)
  orders = [run(jax.random.key(seed)).info.order for seed in range(6)]
  assert all(sorted(order) == list(range(8)) for order in orders)
  assert len(set(orders)) == 6
  # Of the old kind, too: an array that looks like the indices 0 and 3.
  assert run(jax.random.PRNGKey(3)).info.order == orders[3]


@pytest.mark.parametrize('key', [jax.random.key, jax.random.PRNGKey])
def test_a_key_is_no_order(key):
  with pytest.raises(TypeError, match='order is a jax.Array.* pass key='):
    jaxsoup.greedy(one_hots(3), lambda params: 0.0, order=key(1))
  with pytest.raises(ValueError, match='order and key'):
    jaxsoup.greedy(one_hots(3), lambda params: 0.0, order=[0], key=key(1))


@pytest.mark.parametrize('order', [(2, 0), range(2), np.array([2, 0, 1])])
def test_an_order_of_any_kind(order):
  soup = jaxsoup.greedy(one_hots(3), lambda params: 0.0, order=order)
  assert soup.info.order == tuple(order)


def test_ties_try_the_lower_index_first():
  soup = jaxsoup.greedy(one_hots(3), lambda params: 1.0)
  assert soup.info.order == (0, 1, 2)
  assert soup.info.accepted == (0, 1, 2)
  strict = jaxsoup.greedy(one_hots(3), lambda params: 1.0, strict=True)
  assert strict.info.accepted == (0,)


@pytest.mark.parametrize('again', [False, True])
@pytest.mark.parametrize('most', [None, 1, 3])
def test_passes(again, most):
  num_longer = 0
  for seed in range(25):
    rng = np.random.default_rng(seed)
    num = rng.integers(1, 6)
    models = list(rng.integers(-4, 5, (num, 3)) + rng.random((num, 3)))
    models = [np.float32(m) for m in models]
    score = distance_score(rng.integers(-1, 2, 3), levels=2)
    order = rng.permutation(num).tolist()
    soup = jaxsoup.greedy(
        models,
        score,
        order=order,
        num_passes=4,
        with_replacement=again,
        max_ingredients=most,
    )
    expected = _reference.greedy_passes(
        [[m] for m in models], score, order, 4, again=again, most=most
    )
    assert soup.info.accepted == tuple(expected)
    np.testing.assert_array_equal(soup.alpha, alpha_of(expected, num))
    np.testing.assert_allclose(
        soup.params, soup.alpha @ np.array(models), atol=1e-5
    )
    num_longer += len(soup.info.trials) > num
  assert num_longer > 5 or (most == 1)


def test_with_replacement_counts_twice():
  models = [np.float32(0), np.float32(3)]
  soup = jaxsoup.greedy(
      models,
      distance_score(1.0),
      num_passes=2,
      with_replacement=True,
      strict=True,
  )
  assert soup.info.accepted == (0, 1, 0)
  np.testing.assert_allclose(soup.alpha, [2 / 3, 1 / 3], rtol=1e-6)
  assert soup.info.trials[-2].members == (0, 0, 1)


@pytest.mark.parametrize('recipe', [jaxsoup.greedy, jaxsoup.pruned])
def test_on_trial_sees_every_trial(recipe):
  seen = []
  soup = recipe(one_hots(6), table_score(1), on_trial=seen.append)
  assert tuple(seen) == soup.info.trials
  assert seen


class Counted(Sequence):
  """A list that remembers what was read."""

  def __init__(self, models):
    self.models = models
    self.read = []

  def __len__(self):
    return len(self.models)

  def __getitem__(self, k):
    self.read.append(k)
    return self.models[k]


def forbidden(params):
  raise AssertionError('a known score was asked for')


@pytest.mark.parametrize('seed', range(8))
def test_known_trials_are_neither_read_nor_evaluated(seed):
  log = {}
  first = jaxsoup.greedy(one_hots(8), table_score(seed), scores=log)
  models = Counted(one_hots(8))
  second = jaxsoup.greedy(models, forbidden, scores=log)
  assert_same_soup(second, first)
  assert set(models.read) == set(first.info.accepted)


def test_a_foreign_log_may_know_more():
  log = {(0,): 1.0, (1,): 5.0, (0, 1): 0.0, (7,): 9.0}
  soup = jaxsoup.greedy(one_hots(2), forbidden, scores=log)
  assert soup.info.accepted == (1,)
  assert soup.info.scores == {(0,): 1.0, (1,): 5.0, (0, 1): 0.0}


class Interrupted(Exception):
  pass


class Failing:
  """An eval_fn that breaks at one call."""

  def __init__(self, score, at):
    self.score, self.at, self.num_calls = score, at, 0

  def __call__(self, params):
    if self.num_calls == self.at:
      raise Interrupted
    self.num_calls += 1
    return self.score(params)


@pytest.mark.parametrize('recipe', [jaxsoup.greedy, jaxsoup.pruned])
def test_resumes_at_any_trial(recipe):
  score = table_score(3)
  whole = Failing(score, at=None)
  expected = recipe(one_hots(5), whole)
  for at in range(whole.num_calls):
    log, interrupted, rest = {}, Failing(score, at), Failing(score, None)
    with pytest.raises(Interrupted):
      recipe(one_hots(5), interrupted, scores=log)
    assert len(log) == at
    assert_same_soup(recipe(one_hots(5), rest, scores=log), expected)
    assert interrupted.num_calls + rest.num_calls == whole.num_calls


def test_resumes_within_passes_with_replacement():
  rng = np.random.default_rng(5)
  models = [np.float32(m) for m in rng.normal(size=(4, 3))]
  score = distance_score(np.zeros(3))
  options = dict(num_passes=3, with_replacement=True)
  whole = Failing(score, at=None)
  expected = jaxsoup.greedy(models, whole, **options)
  for at in range(whole.num_calls):
    log = {}
    with pytest.raises(Interrupted):
      jaxsoup.greedy(models, Failing(score, at), scores=log, **options)
    again = jaxsoup.greedy(models, score, scores=log, **options)
    assert_same_soup(again, expected)


@pytest.mark.parametrize('recipe', [jaxsoup.greedy, jaxsoup.pruned])
def test_alpha_follows_its_ingredient(recipe):
  rng = np.random.default_rng(0)
  for _ in range(10):
    models = [np.float32(m) for m in rng.normal(size=(5, 3))]
    score = distance_score(rng.normal(size=3))
    order = rng.permutation(5)
    soup = recipe(models, score)
    shuffled = recipe([models[k] for k in order], score)
    np.testing.assert_array_equal(shuffled.alpha, soup.alpha[order])
    np.testing.assert_allclose(shuffled.params, soup.params, atol=1e-6)


@pytest.mark.slow_variants
@pytest.mark.parametrize('strict', [False, True])
def test_pruned_is_guarded(strict):
  num_fallbacks = num_cut = 0
  for seed in range(60):
    num = np.random.default_rng(seed).integers(1, NUM_MOST + 1)
    models, score = one_hots(num), table_score(seed)
    soup = jaxsoup.pruned(models, score, strict=strict)
    singles = [score(m) for m in models]
    assert soup.info.score >= max(singles)
    assert soup.info.score >= score(np.mean(models, axis=0))
    expected = _reference.pruned([[m] for m in models], score, strict=strict)
    assert sorted(soup.info.accepted) == expected
    assert_consistent(soup, score, num)
    num_fallbacks += not any(
        t.accepted and t.score == soup.info.score for t in soup.info.trials
    )
    num_cut += 1 < len(soup.info.accepted) < num
  assert num_fallbacks > 3
  assert num_cut > 3


def test_pruned_passes():
  models, score = one_hots(8), table_score(11)
  soup = jaxsoup.pruned(models, score, num_passes=1)
  assert len(soup.info.trials) <= 8
  none = jaxsoup.pruned(models, lambda params: 1.0 * np.sum(params > 0))
  assert none.info.accepted == tuple(range(8))


def test_greedy_and_pruned_share_a_log():
  log, score = {}, Failing(table_score(2), at=None)
  jaxsoup.greedy(one_hots(4), score, scores=log)
  jaxsoup.pruned(one_hots(4), score, scores=log)
  assert score.num_calls == len(log)


@pytest.mark.parametrize('recipe', [jaxsoup.greedy, jaxsoup.pruned])
@pytest.mark.parametrize('bad', [np.nan, np.inf, -np.inf])
def test_a_score_that_is_not_finite(recipe, bad):
  score = lambda params: bad if np.asarray(params)[1] == 1 else 0.5
  with pytest.raises(ValueError, match=f'{bad} for ingredient 1; .*Leave that'):
    recipe(one_hots(3), score)


@pytest.mark.parametrize('recipe', [jaxsoup.greedy, jaxsoup.pruned])
def test_a_soup_whose_score_is_not_finite(recipe):
  score = lambda params: 1.0 if np.max(params) == 1 else np.nan
  with pytest.raises(ValueError, match=r'nan for ingredient 0 \+ ingredient 1'):
    recipe(one_hots(2), score)


@pytest.mark.parametrize('bad', [np.zeros(3), 'high', None, [0.5], 1j])
def test_a_score_that_is_not_a_number(bad):
  with pytest.raises(TypeError, match='ingredient 0; a score is one number'):
    jaxsoup.greedy(one_hots(2), lambda params: bad)


def test_a_log_that_holds_nan():
  with pytest.raises(ValueError, match='log holds nan for ingredient 1'):
    jaxsoup.greedy(one_hots(2), lambda params: 0.0, scores={(1,): np.nan})


@pytest.mark.parametrize(
    'kind', [int, bool, np.float16, np.int64, jax.numpy.bfloat16, np.array]
)
def test_scores_of_any_kind(kind):
  soup = jaxsoup.greedy(one_hots(2), lambda params: kind(1))
  assert soup.info.score == 1.0
  assert type(soup.info.score) is float


@pytest.mark.parametrize(
    'order',
    [[], [0, 0], [3], [-1], [0.5, 1.0], [True], [[0, 1]], [[0], 1], 'score', 1],
)
def test_a_wrong_order(order):
  with pytest.raises(ValueError, match='order is .*expected .*0..2, each'):
    jaxsoup.greedy(one_hots(3), lambda params: 0.0, order=order)


@pytest.mark.parametrize('name', ['num_passes', 'max_ingredients'])
def test_at_least_one(name):
  with pytest.raises(ValueError, match=f'{name} is 0: .* at least 1'):
    jaxsoup.greedy(one_hots(3), lambda params: 0.0, **{name: 0})
