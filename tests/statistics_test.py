"""Statistics against scipy, scikit-learn, repeated rows, and known truths."""

import functools
import json

import jax
import numpy as np
import pytest
from scipy import stats
from sklearn import metrics as sk

import jaxsoup
from jaxsoup import ensembles
from jaxsoup import evaluation
from jaxsoup import metrics
from jaxsoup import statistics


def answers(rng, num, p_a=0.8, p_b=0.7, shared=0.5):
  """Right or wrong, twice; some examples are hard for both."""
  hard = rng.random(num)
  own = rng.random((2, num))
  luck = np.where(rng.random((2, num)) < shared, hard, own)
  return luck[0] < p_a, luck[1] < p_b


def problem(rng, num=120, num_classes=3, num_models=2, best=1.6):
  """Logits `[K, N, C]` that are right more often than not, and labels."""
  label = rng.integers(num_classes, size=num)
  logits = rng.normal(size=(num_models, num, num_classes))
  skills = np.linspace(0.4, best, num_models)
  logits[:, np.arange(num), label] += skills[:, None]
  return logits.astype(np.float32), label


@pytest.mark.parametrize('num', (1, 2, 9, 50, 1000))
@pytest.mark.parametrize('seed', range(4))
def test_mcnemar_equals_a_binomial_test(num, seed):
  a, b = answers(np.random.default_rng(seed), num, p_b=0.7 + 0.05 * seed)
  got = statistics.mcnemar(a, b)
  only_a = sum(x and not y for x, y in zip(a, b))
  only_b = sum(y and not x for x, y in zip(a, b))
  assert got.gain == pytest.approx((only_a - only_b) / num) and got.num == num
  expected = 1.0
  if only_a + only_b:
    expected = stats.binomtest(only_a, only_a + only_b).pvalue
  assert got.p_value == pytest.approx(expected, rel=1e-10)
  mirrored = statistics.mcnemar(b, a)
  assert mirrored.p_value == got.p_value
  assert (mirrored.low, mirrored.high) == (-got.high, -got.low)


def intervals_of_all_tables(num, **options):
  """A comparison by how many examples only the first got right, and so on."""
  rows = np.arange(num)
  return {
      (x, y): statistics.mcnemar(rows < x, rows >= num - y, **options)
      for x in range(num + 1)
      for y in range(num + 1 - x)
  }


# Of five tables of five one has a p-value of exactly 0.0625.
@pytest.mark.parametrize('num, level', [(5, 0.9375), (10, 0.95), (8, 0.8)])
def test_mcnemar_and_its_interval_agree_on_every_table(num, level):
  for got in intervals_of_all_tables(num, level=level).values():
    assert got.is_significant == (got.p_value < 1 - level), got
    assert got.low <= got.gain <= got.high, got
    assert (got.low > 0) == (got.is_significant and got.gain > 0), got


def test_no_interval_without_0_beside_a_p_value_of_a_sixteenth():
  right = np.arange(8) < 5
  got = statistics.compare(right, right & False, metric=None)
  assert got.p_value == 0.0625 and got.low < 0 and not got.is_significant


def test_the_interval_of_mcnemar_holds_every_difference():
  """Exact coverage, by summing over all tables."""
  of_table = intervals_of_all_tables(10)
  tables = np.array(list(of_table))
  low, high = np.array([[x.low, x.high] for x in of_table.values()]).T
  grid = np.linspace(0.01, 0.97, 9)
  coverage = []
  for p_a, p_b in ((a, b) for a in grid for b in grid if a + b < 1):
    cells = np.column_stack([tables, 10 - tables.sum(1)])
    weight = stats.multinomial.pmf(cells, 10, [p_a, p_b, 1 - p_a - p_b])
    holds = (low <= p_a - p_b + 1e-12) & (p_a - p_b <= high + 1e-12)
    coverage.append(weight[holds].sum())
  assert min(coverage) > 0.95 and np.mean(coverage) < 0.99


@pytest.mark.parametrize('num_resamples', (40, 79, 100))
def test_the_bootstrap_and_its_interval_agree(num_resamples):
  """Few resamples, so that p-values lie on both sides of 0.05, and on it."""
  p_values = []
  for seed in range(60):
    rng = np.random.default_rng(seed)
    a, b = rng.normal(size=12), rng.normal(0.7, size=12)
    got = statistics.compare(
        a, b, metric=None, num_resamples=num_resamples, seed=seed
    )
    assert got.is_significant == (round(got.p_value, 12) < 0.05), got
    p_values.append(got.p_value)
  assert min(p_values) < 0.05 < max(p_values)
  if num_resamples == 79:
    assert np.isclose(p_values, 0.05).any()


def test_mcnemar_of_a_whole_validation_set():
  # 50,000 images, 5,000 answers that differ: no overflow, no underflow.
  a = np.arange(50000) < 2700
  b = (np.arange(50000) >= 2700) & (np.arange(50000) < 5000)
  expected = stats.binomtest(2300, 5000).pvalue
  assert statistics.mcnemar(a, b).p_value == pytest.approx(expected, rel=1e-8)


@pytest.mark.parametrize(
    'a, b',
    [
        (np.ones(3), np.ones(3)),
        (np.ones(3, bool), np.ones(4, bool)),
        (np.ones((3, 1), bool), np.ones((3, 1), bool)),
        (np.ones(0, bool), np.ones(0, bool)),
    ],
)
def test_mcnemar_names_what_is_wrong(a, b):
  with pytest.raises(ValueError, match=r'expected bool \[N\] for both'):
    statistics.mcnemar(a, b)


def scipy_interval(fn, *samples, num=4000):
  result = stats.bootstrap(
      samples,
      fn,
      paired=True,
      vectorized=False,
      n_resamples=num,
      method='percentile',
      rng=np.random.default_rng(1),
  )
  return result.confidence_interval


@pytest.mark.parametrize('num', (30, 200))
def test_bootstrap_of_answers_equals_scipy(num, rng):
  a, b = answers(rng, num)
  got = statistics.paired_bootstrap(None, a, b)
  expected = scipy_interval(lambda x, y: x.mean() - y.mean(), a, b)
  assert got.gain == pytest.approx(a.mean() - b.mean())
  width = expected.high - expected.low
  # Differences come in steps of 1 / num.
  margin = max(0.05 * width, 1.01 / num)
  assert got.low == pytest.approx(expected.low, abs=margin)
  assert got.high == pytest.approx(expected.high, abs=margin)
  assert got.num == num


def test_bootstrap_of_numbers_equals_scipy(rng):
  # As many different numbers as examples: rows are drawn, not values.
  a, b = rng.normal(size=80), rng.normal(0.2, size=80)
  got = statistics.paired_bootstrap(None, a, b, level=0.9)
  interval = stats.bootstrap(
      (a - b,), np.mean, confidence_level=0.9, method='percentile', rng=rng
  ).confidence_interval
  width = interval.high - interval.low
  assert got.low == pytest.approx(interval.low, abs=0.05 * width)
  assert got.high == pytest.approx(interval.high, abs=0.05 * width)
  assert got.level == 0.9


def matthews(logits, label):
  return sk.matthews_corrcoef(label, logits.argmax(-1))


def f1(logits, label):
  return sk.f1_score(label, logits.argmax(-1))


@pytest.mark.slow
@pytest.mark.parametrize(
    'ours, reference', [(metrics.f1, f1), (metrics.matthews, matthews)]
)
def test_bootstrap_of_whole_set_metrics(ours, reference, rng):
  """Compiled or not, the same resamples are drawn."""
  (a, b), label = problem(rng, num_classes=2)
  run = functools.partial(
      statistics.paired_bootstrap, label=label, num_resamples=130, seed=2
  )
  got, expected = run(ours, b, a), run(reference, b, a)
  assert got[:4] == pytest.approx(expected[:4], abs=1e-5)
  assert got.gain == pytest.approx(reference(b, label) - reference(a, label))


@pytest.mark.slow
def test_bootstrap_of_a_whole_set_metric_equals_scipy(rng):
  (a, b), label = problem(rng, num_classes=2)
  got = statistics.paired_bootstrap(metrics.matthews, b, a, label=label)
  fn = lambda x, y, z: sk.matthews_corrcoef(z, y) - sk.matthews_corrcoef(z, x)
  expected = scipy_interval(fn, a.argmax(-1), b.argmax(-1), label, num=500)
  width = expected.high - expected.low
  assert got.low == pytest.approx(expected.low, abs=0.1 * width)
  assert got.high == pytest.approx(expected.high, abs=0.1 * width)


def test_mean_of_two_metrics(rng):
  """As GLUE scores MRPC: the mean of accuracy and F1."""
  (a, b), label = problem(rng, num_classes=2)
  metric = lambda x, y: (metrics.accuracy(x, y) + metrics.f1(x, y)) / 2
  got = statistics.compare(b, a, label, metric=metric, num_resamples=100)
  expected = metric(b, label) - metric(a, label)
  assert got.gain == pytest.approx(float(expected), abs=1e-6)
  assert got.low < got.gain < got.high


def test_a_mean_by_either_path(rng):
  (a, b), label = problem(rng)
  fast = statistics.paired_bootstrap(metrics.correct, a, b, label=label)
  slow = statistics.paired_bootstrap(
      lambda x, y: np.mean(x.argmax(-1) == y), a, b, label=label
  )
  assert fast.gain == pytest.approx(slow.gain)
  np.testing.assert_allclose(fast[1:3], slow[1:3], atol=0.015)


def test_more_examples_than_sets_are_means_over_sets(rng):
  label = {'x': rng.integers(3, size=40), 'y': rng.integers(3, size=90)}
  a, b = (
      {k: rng.normal(size=(len(v), 3)) for k, v in label.items()}
      for _ in range(2)
  )
  mean = lambda z: np.mean([(z[k].argmax(-1) == label[k]).mean() for k in z])
  got = statistics.paired_bootstrap(metrics.correct, a, b, label=label)
  assert got.gain == pytest.approx(mean(a) - mean(b))
  assert got.num == 130
  # Each set is resampled by itself, so that variances add up.
  variances = []
  for k, y in label.items():
    d = (a[k].argmax(-1) == y) * 1.0 - (b[k].argmax(-1) == y)
    variances.append(d.var() / len(d) / 4)
  expected = 2 * stats.norm.ppf(0.975) * np.sqrt(sum(variances))
  assert got.high - got.low == pytest.approx(expected, rel=0.07)


def coverage(draw, truth, num_draws=300, **options):
  """How often the interval holds the truth, and how often p < 0.05."""
  held, significant = [], []
  for seed in range(num_draws):
    a, b, label = draw(np.random.default_rng(seed))
    comparison = statistics.paired_bootstrap(
        None, a, b, label=label, num_resamples=500, seed=seed, **options
    )
    held.append(comparison.low <= truth <= comparison.high)
    significant.append(comparison.is_significant)
  return np.mean(held), np.mean(significant)


def test_coverage_of_a_known_difference():
  draw = lambda rng: (*answers(rng, 200), None)
  held, _ = coverage(draw, 0.1)
  assert 0.91 < held < 0.98


def test_no_difference_is_rarely_significant():
  draw = lambda rng: (*answers(rng, 200, 0.7, 0.7), None)
  held, significant = coverage(draw, 0.0)
  assert 0.91 < held < 0.98
  assert 0.01 < significant < 0.09


def corrupted(is_known):
  """Two corruptions of one test set: who fails on one fails on the other."""

  def draw(rng):
    a, b = answers(rng, 200)
    flip = rng.random((2, 200)) < 0.1
    label = np.arange(200)
    return (
        {'x': a, 'y': a ^ flip[0]},
        {'x': b, 'y': b ^ flip[1]},
        {'x': label, 'y': label if is_known else label[::-1]},
    )

  return draw


def test_sets_of_the_same_examples_are_resampled_together():
  truth = (0.1 + 0.1 * 0.8) / 2  # A flip leaves 1 - 2 x 0.1 of a difference.
  held, _ = coverage(corrupted(is_known=True), truth)
  assert 0.91 < held < 0.98
  # As if they were independent, the interval is too short.
  too_seldom, _ = coverage(corrupted(is_known=False), truth)
  assert too_seldom < 0.89


def test_sets_without_labels_go_by_length(rng):
  a, b = answers(rng, 100)
  sets = lambda x, y: {'x': x, 'y': y}
  one = statistics.paired_bootstrap(None, a, b)
  twice = statistics.paired_bootstrap(None, sets(a, a), sets(b, b))
  # The same set twice says no more than once.
  assert twice[:4] == pytest.approx(one[:4])


def test_comparison_is_antisymmetric(rng):
  a, b = answers(rng, 150)
  one, other = (
      statistics.compare(*pair, metric=None) for pair in ((a, b), (b, a))
  )
  assert one.gain == -other.gain and one.p_value == other.p_value
  assert one.low == pytest.approx(-other.high, abs=0.012)


def test_equal_models_are_no_gain(rng):
  a, _ = answers(rng, 50)
  got = statistics.compare(a, a, metric=None)
  # Of 50 examples that agree, up to 7 % of others may differ: (1/40)^(1/50).
  margin = 1 - 0.025 ** (1 / 50)
  assert got[:4] == pytest.approx((0, -margin, margin, 1))
  numbers = statistics.compare(a * 1.0, a * 1.0, metric=None)
  assert numbers[:4] == (0, 0, 0, 1) and not numbers.is_significant


def test_p_value_is_of_mcnemar_where_it_can_be(rng):
  (a, b), label = problem(rng)
  right = [z.argmax(-1) == label for z in (b, a)]
  got = statistics.compare(b, a, label)
  assert got == statistics.mcnemar(*right)
  assert got.method == 'exact McNemar'
  for other in (
      statistics.compare(b, a, label, metric=metrics.log_likelihood),
      statistics.compare({'x': b}, {'x': a}, {'x': label}),
      statistics.compare(b, a, label, metric=metrics.f1, num_resamples=50),
  ):
    assert other.method == 'paired bootstrap'


def test_seed_decides():
  a, b = answers(np.random.default_rng(0), 100)
  run = functools.partial(statistics.paired_bootstrap, None, a, b)
  assert run(seed=1) == run(seed=1) != run(seed=2)


def test_device_arrays(rng):
  (a, b), label = problem(rng)
  on_device = jax.device_put((a, b, label))
  assert statistics.compare(a, b, label) == statistics.compare(*on_device)


@pytest.mark.parametrize(
    'a, b, label, metric, match',
    [
        (np.ones(3), np.ones(4), None, None, 'answer 3 and 4 examples'),
        (np.ones(0), np.ones(0), None, None, 'at least 1'),
        (
            np.ones((3, 2)),
            np.ones((3, 2)),
            np.ones(2),
            metrics.correct,
            '2 labe',
        ),
        (np.ones((3, 2)), np.ones((3, 2)), None, None, 'Logits need a metric'),
        ({'x': np.ones(3)}, {'y': np.ones(3)}, None, None, r"\['x'\].*\['y'\]"),
        ({}, {}, None, None, 'at least one'),
        (np.ones(3), np.ones(3), None, lambda x, y: np.nan, 'not finite'),
    ],
)
def test_bootstrap_names_what_is_wrong(a, b, label, metric, match):
  with pytest.raises(ValueError, match=match):
    statistics.paired_bootstrap(metric, a, b, label=label)


def test_too_few_resamples_for_the_level():
  a, b = np.arange(9.0), np.ones(9)
  for num, level in ((39, 0.95), (40, 0.99), (40, 1.0)):
    with pytest.raises(ValueError, match=f'num_resamples is {num} and level'):
      statistics.paired_bootstrap(None, a, b, num_resamples=num, level=level)


@pytest.mark.parametrize('num', (2, 3, 12))
def test_over_repeats_equals_a_t_test(num, rng):
  gains = rng.normal(0.01, 0.02, num)
  got = statistics.over_repeats(gains, level=0.9)
  expected = stats.ttest_1samp(gains, 0)
  interval = expected.confidence_interval(0.9)
  np.testing.assert_allclose(got[1:3], interval, rtol=1e-9)
  assert got.p_value == pytest.approx(expected.pvalue, rel=1e-9)
  assert got.num_repeats == num and got.method == 'paired t'


def test_the_corrected_t_is_that_of_nadeau_and_bengio(rng):
  """`t = mean / sqrt((1 / n + n_test / n_train) variance)`."""
  gains, num_test, num_train = rng.normal(0.01, 0.02, 8), 897, 900
  got = statistics.over_repeats(gains, share=num_test / (num_test + num_train))
  error = np.sqrt((1 / 8 + num_test / num_train) * gains.var(ddof=1))
  expected = stats.t(7, gains.mean(), error).interval(0.95)
  np.testing.assert_allclose(got[1:3], expected)
  assert got.p_value == pytest.approx(2 * stats.t(7).sf(gains.mean() / error))
  assert got.method == 'corrected resampled t'


@pytest.mark.parametrize('gains, share', [([0.1], 0), ([0.1, 0.1, 0.2], 1)])
def test_what_tells_nothing_is_never_significant(gains, share):
  """One repeat, or the same examples in all repeats."""
  got = statistics.over_repeats(gains, share=share)
  assert got.gain == np.mean(gains) and not got.is_significant
  assert np.isnan([got.low, got.high, got.p_value]).all()


def test_over_repeats_names_what_is_wrong():
  with pytest.raises(ValueError, match=r'shape \[0\]'):
    statistics.over_repeats([])
  for share in (-0.1, 1.1, np.nan):
    with pytest.raises(ValueError, match=f'share is {share}: expected'):
      statistics.over_repeats([0.1, 0.2], share=share)


def split_gains(rng, num, repeats, pool, report, gain=0.0):
  """Gains of two given models, `[num, repeats]`, on parts of one pool.

  On three in ten examples one of them alone is right. `gain` is the truth.
  """
  chances = [(0.3 - gain) / 2, 0.7, (0.3 + gain) / 2]
  drawn = rng.choice([-1.0, 0.0, 1.0], (num, 1, pool), p=chances)
  parts = rng.permuted(np.broadcast_to(drawn, (num, repeats, pool)), axis=-1)
  return parts[..., :report].mean(-1)


def size_and_coverage(gains, truth, share):
  """How often a gain is significant, and how often intervals hold the truth."""
  got = [statistics.over_repeats(x, share=share) for x in gains]
  return (
      np.mean([x.is_significant for x in got]),
      np.mean([x.low <= truth <= x.high for x in got]),
  )


def margin_of(num, chance=0.05):
  """Four standard errors of a share of `num` draws."""
  return 4 * np.sqrt(chance * (1 - chance) / num)


@pytest.mark.slow_variants
@pytest.mark.parametrize(
    'repeats, pool, report, plain',
    [(8, 100, 50, 0.46), (3, 100, 50, 0.16), (8, 200, 40, 0.22)],
)
def test_parts_of_one_pool_need_the_corrected_t(
    repeats, pool, report, plain, rng
):
  draw = functools.partial(split_gains, rng, 1000, repeats, pool, report)
  gains, share = draw(), report / pool
  size, coverage = size_and_coverage(gains, 0.0, share)
  assert size == pytest.approx(0.05, abs=margin_of(1000))
  assert coverage == pytest.approx(0.95, abs=margin_of(1000))
  # As if the repeats were independent: far too often significant.
  size, coverage = size_and_coverage(gains, 0.0, 0.0)
  assert size == pytest.approx(plain, abs=margin_of(1000, plain))
  assert coverage == pytest.approx(1 - size)
  # The interval of a gain that is there.
  _, coverage = size_and_coverage(draw(gain=0.1), 0.1, share)
  assert coverage == pytest.approx(0.95, abs=margin_of(1000))


def crossed_problem(rng, num, pool, report, deviations):
  """Differences of repeats and their examples; the truth is 0.

  Deviations are those of the repeats, of the examples and of what is left.
  """
  of_repeat, of_example, left = deviations
  shift = rng.normal(0, of_example, pool)
  ids = [rng.permutation(pool)[:report] for _ in range(num)]
  own = rng.normal(0, of_repeat, num)
  noise = rng.normal(0, left, (num, report))
  return own[:, None] + shift[np.array(ids)] + noise, ids


@pytest.mark.slow_variants
@pytest.mark.parametrize(
    'num, pool, report, deviations',
    [
        (8, 300, 300, (0.02, 0.3, 0.3)),  # All examples in common.
        (8, 400, 200, (0.0, 0.3, 0.05)),  # Repeats differ by them alone.
        (8, 2000, 200, (0.03, 0.3, 0.3)),  # Few in common.
        (8, 300, 300, (0.05, 0.0, 0.3)),  # Examples do not matter.
        (4, 400, 200, (0.01, 0.3, 0.1)),
    ],
)
def test_crossed_repeats_and_examples(num, pool, report, deviations, rng):
  """The size of the test, and so the coverage of the interval, of no gain."""
  is_found, widths = [], {'crossed': [], 'corrected': []}
  for _ in range(600):
    differences, ids = crossed_problem(rng, num, pool, report, deviations)
    got = statistics.crossed(None, differences, 0 * differences, ids)
    is_found.append(got.is_significant)
    widths['crossed'].append(got.high - got.low)
    assumed = statistics.over_repeats(
        differences.mean(1), share=min(report / pool, 0.99)
    )
    widths['corrected'].append(assumed.high - assumed.low)
  assert np.mean(is_found) == pytest.approx(0.05, abs=margin_of(600))
  # What is assumed is the worst case.
  median = {name: np.median(x) for name, x in widths.items()}
  assert median['crossed'] < 1.1 * median['corrected']


def test_crossed_metrics_that_are_no_means(rng):
  """Leaving out one example of an accuracy says what its answer does."""
  ids = [rng.permutation(80)[:50] for _ in range(4)]
  label = [rng.integers(3, size=50) for _ in ids]
  a, b = (
      [rng.normal(size=(50, 3)) + skill * np.eye(3)[y] for y in label]
      for skill in (1.0, 0.6)
  )
  expected = statistics.crossed(metrics.correct, a, b, ids, label=label)
  got = statistics.crossed(metrics.accuracy, a, b, ids, label=label)
  assert got[:4] == pytest.approx(expected[:4], rel=1e-3, abs=1e-5)
  assert got.num == len(np.unique(ids)) and got.num_repeats == 4
  one = statistics.crossed(
      metrics.correct, a[:1], b[:1], ids[:1], label=label[:1]
  )
  assert np.isnan(one.low) and not one.is_significant


def test_crossed_names_what_is_wrong():
  x = np.ones((2, 5))
  with pytest.raises(ValueError, match='2 and 1 repeats, 2 entries of ids'):
    statistics.crossed(None, x, x[:1], [range(5)] * 2)
  with pytest.raises(ValueError, match=r'5 examples, and ids of shape \[4\]'):
    statistics.crossed(None, x, x, [range(4)] * 2)


def test_equal_repeats():
  assert statistics.over_repeats([0.1, 0.1]).p_value == 0
  assert statistics.over_repeats([0.0, 0.0]).p_value == 1


def test_optimism_of_two_sets_holds_the_truth():
  """No selection, so that there is no optimism: 95 % of intervals hold 0."""
  held, significant = [], []
  for seed in range(300):
    rng = np.random.default_rng(seed)
    both = [
        statistics.paired_bootstrap(None, *answers(rng, n), num_resamples=400)
        for n in (150, 300)
    ]
    got = statistics.optimism(*both)
    assert got.num == 450 and got.is_significant == (got.p_value < 0.05)
    held.append(got.low <= 0 <= got.high)
    significant.append(got.is_significant)
  assert 0.91 < np.mean(held) < 0.985
  assert 0.01 < np.mean(significant) < 0.09


def test_interval_of_a_difference_of_gains(rng):
  """Of symmetric intervals that of two independent means; else side by side."""
  a, b = rng.normal(0.03, 0.1, 80), rng.normal(0.01, 0.2, 60)
  errors = [stats.sem(x) for x in (a, b)]
  margin = stats.norm.ppf(0.975)
  both = [
      statistics.Comparison(
          x.mean(), x.mean() - margin * e, x.mean() + margin * e, 0.5
      )
      for x, e in zip((a, b), errors)
  ]
  got = statistics.optimism(*both)
  error = np.hypot(*errors)
  z = (a.mean() - b.mean()) / error
  np.testing.assert_allclose(
      got[:4],
      [
          z * error,
          (z - margin) * error,
          (z + margin) * error,
          2 * stats.norm.sf(abs(z)),
      ],
  )
  # Far down for the first and far up for the second is far down in all.
  skewed = statistics.optimism(
      statistics.Comparison(0.5, 0.5 - 0.3, 0.5 + 0.05, 0.1),
      statistics.Comparison(0.2, 0.2 - 0.12, 0.2 + 0.4, 0.1),
  )
  np.testing.assert_allclose(skewed[:3], [0.3, 0.3 - 0.5, 0.3 + 0.13])
  # The p-value goes by the side on which 0 lies, as the interval does.
  assert skewed.p_value > 0.05 and not skewed.is_significant
  mirrored = statistics.optimism(
      statistics.Comparison(0.2, 0.2 - 0.12, 0.2 + 0.4, 0.1),
      statistics.Comparison(0.5, 0.5 - 0.3, 0.5 + 0.05, 0.1),
  )
  np.testing.assert_allclose(mirrored[:3], [-0.3, -0.3 - 0.13, -0.3 + 0.5])
  assert mirrored.p_value == pytest.approx(skewed.p_value)


def test_selection_is_optimistic():
  """The best of 50 equal models gains on the data that chose it only."""
  rng = np.random.default_rng(0)
  right = rng.random((51, 2, 400)) < 0.7
  first, others = right[0], right[1:]
  best = others[others[:, 0].mean(-1).argmax()]
  gains = [statistics.compare(best[i], first[i], metric=None) for i in range(2)]
  got = statistics.optimism(*gains)
  assert got.gain == pytest.approx(gains[0].gain - gains[1].gain)
  assert got.gain > 0.02


def test_optimism_names_what_is_wrong():
  one = statistics.Comparison(0.1, 0.0, 0.2, 0.05)
  with pytest.raises(ValueError, match='levels 0.95 and 0.9: expected one'):
    statistics.optimism(one, one._replace(level=0.9))


class Source:
  """Random access, as the sources of `jaxsoup.data`."""

  def __init__(self, arrays):
    self._arrays = arrays

  def __len__(self):
    return len(self._arrays['label'])

  def __getitem__(self, rows):
    return {name: x[rows] for name, x in self._arrays.items()}


def images(rng, num, label=None):
  return {
      'image': rng.integers(0, 256, (num, 4, 4, 1), np.uint8),
      'label': np.zeros(num, np.int32) if label is None else label,
  }


FORMS = {
    'array': lambda x: x['image'],
    'device': lambda x: jax.device_put(x['image']),
    'mapping': lambda x: x,
    'source': Source,
    'parts': lambda x: [x['image'][:100], x['image'][100:]],
}


@pytest.mark.parametrize('form', FORMS.values(), ids=FORMS.keys())
def test_shared_examples_are_named(form, rng):
  a, b = images(rng, 1500), images(rng, 1300, np.ones(1300))
  statistics.check_disjoint(select=form(a), tune=form(b))
  # Across the pieces in which a source is read; under another label.
  b['image'][[7, 1200]] = a['image'][[1400, 3]]
  in_a, in_b = statistics.shared_rows(form(a), form(b))
  assert in_a.tolist() == [3, 1400] and in_b.tolist() == [7, 1200]
  with pytest.raises(
      ValueError,
      match=(
          'select and report share examples: 2 of the 1500 rows of select .*'
          '1300 rows.*; row 3 of select is row 1200 of report'
      ),
  ):
    statistics.check_disjoint(select=form(a), report=form(b))


def test_shared_rows_equal_those_by_loop(rng):
  a, b = rng.integers(0, 3, (60, 4)), rng.integers(0, 3, (50, 4))
  in_a, in_b = statistics.shared_rows(a, b)
  expected = [i for i, x in enumerate(a) if any((x == y).all() for y in b)]
  assert in_a.tolist() == expected
  expected = [i for i, y in enumerate(b) if any((x == y).all() for x in a)]
  assert in_b.tolist() == expected


def test_inputs_are_compared_together():
  # The same tokens under another attention mask are another example.
  a = {'input_ids': np.array([[1, 2]]), 'attention_mask': np.array([[1, 1]])}
  b = {**a, 'attention_mask': np.array([[1, 0]])}
  statistics.check_disjoint(select=a, report=b)
  with pytest.raises(ValueError, match='the same data set'):
    statistics.check_disjoint(select=a, report={k: +x for k, x in a.items()})


def test_texts(rng):
  a = {'text': np.array(['a', 'a longer one']), 'label': np.array([0, 1])}
  b = {'text': np.array(['b', 'a', 'c'], object), 'label': np.array([0, 1, 0])}
  in_a, in_b = statistics.shared_rows(a, b)
  assert in_a.tolist() == [0] and in_b.tolist() == [1]


def test_one_data_set_twice_is_refused(rng):
  a, b = images(rng, 20), images(rng, 30)
  for other in (a, {'image': a['image'].copy()}, [b, a]):
    with pytest.raises(ValueError, match='select and report are the same data'):
      if isinstance(other, list):  # The same object among others.
        statistics.check_disjoint(select=a, report=other)
      statistics.check_disjoint(select=a, report=other)
  # Doubles inside a role are no leak.
  statistics.check_disjoint(select=[a, a], report=b)


def test_split_is_disjoint_and_recorded():
  sizes = {'train': 50, 'select': 20, 'report': 30}
  rows, record = statistics.split(110, sizes, seed=3)
  assert {k: len(x) for k, x in rows.items()} == sizes
  together = np.concatenate(list(rows.values()))
  assert len(set(together.tolist())) == 100 and together.max() < 110
  stored = json.loads(json.dumps(record))
  again = statistics.split(110, sizes, seed=3, record=stored)
  for name in sizes:
    np.testing.assert_array_equal(rows[name], again.rows[name])
  with pytest.raises(ValueError, match='the record .* pass the arguments'):
    statistics.split(110, sizes, seed=4, record=stored)
  # The hash is of the rows, not of the arguments.
  with pytest.raises(ValueError, match='the record'):
    statistics.split(110, sizes, seed=3, record={**stored, 'hash': '0'})


def test_split_is_random():
  rows = [
      statistics.split(1000, {'a': 500}, seed=seed).rows['a']
      for seed in range(20)
  ]
  counts = np.bincount(np.concatenate(rows), minlength=1000)
  # Binomial(20, 1/2): the mean of 1,000 counts, and their variance of 5.
  assert counts.mean() == 10 and 4 < counts.var() < 6


@pytest.mark.parametrize('sizes', ({}, {'a': 0, 'b': 2}, {'a': 6, 'b': 5}))
def test_split_names_what_is_wrong(sizes):
  with pytest.raises(ValueError, match='of 10: expected at least 1 each'):
    statistics.split(10, sizes, seed=0)


def ensemble_values(logits, label):
  return lambda members: metrics.correct(logits[list(members)].mean(0), label)


def choice_on_rows(logits, label, rows, recipe):
  """The recipe on data in which rows are repeated, as a bootstrap means it."""
  logits, label = logits[:, rows], label[rows]
  accuracy = lambda x: np.mean(np.asarray(x).argmax(-1) == label)
  return set(recipe(list(logits), accuracy).info.accepted)


RECIPES = {
    'greedy': jaxsoup.greedy,
    'strict': functools.partial(jaxsoup.greedy, strict=True),
    'pruned': jaxsoup.pruned,
    'again': functools.partial(
        jaxsoup.greedy, num_passes=2, with_replacement=True
    ),
}


@pytest.mark.parametrize('recipe', RECIPES.values(), ids=RECIPES.keys())
def test_stability_equals_searches_on_repeated_rows(recipe, rng):
  logits, label = problem(rng, num=64, num_models=5, best=0.6)
  logits = np.round(logits * 8) / 8  # Means without rounding, as sums go.
  got = statistics.stability(
      ensemble_values(logits, label), 5, recipe=recipe, num_resamples=12, seed=4
  )
  all_rows = np.arange(64)
  chosen = choice_on_rows(logits, label, all_rows, recipe)
  assert set(got.chosen) == chosen
  same = np.random.default_rng(4)
  choices = [
      choice_on_rows(
          logits,
          label,
          np.repeat(all_rows, same.multinomial(64, [1 / 64] * 64)),
          recipe,
      )
      for _ in range(12)
  ]
  expected = [np.mean([k in c for c in choices]) for k in range(5)]
  np.testing.assert_allclose(got.frequency, expected)
  np.testing.assert_array_equal(got.sizes, [len(c) for c in choices])
  jaccard = [len(c & chosen) / len(c | chosen) for c in choices]
  assert got.overlap == pytest.approx(np.mean(jaccard))
  # Else nothing above was compared.
  assert len(set(map(frozenset, choices))) > 1


def test_stability_evaluates_each_candidate_once(rng):
  logits, label = problem(rng, num_models=5, best=0.6)
  calls = []

  def values_fn(members):
    calls.append(members)
    return ensemble_values(logits, label)(members)

  known = {}
  got = statistics.stability(values_fn, 5, answers=known)
  assert len(calls) == len(set(calls)) == got.num_evaluated == len(known)
  assert 5 < got.num_evaluated < 2**5
  again = statistics.stability(values_fn, 5, answers=known)
  assert again.num_evaluated == 0 and len(calls) == got.num_evaluated
  np.testing.assert_array_equal(again.frequency, got.frequency)


def test_stability_of_soups(rng):
  """Linear models: what holds for the ensemble holds for the soup."""
  models = [{'w': rng.normal(size=(3, 2)).astype(np.float32)} for _ in range(4)]
  x = rng.normal(size=(50, 3)).astype(np.float32)
  label = (x[:, 0] > 0).astype(np.int32)
  batches = evaluation.batched({'x': x}, 16)
  run = evaluation.logits_of(lambda p, batch: batch['x'] @ p['w'], batches)

  def values_fn(members):
    soup = jaxsoup.uniform([models[k] for k in members])
    return metrics.correct(run(soup.params), label)

  logits = ensembles.collect(models, lambda p, b: b['x'] @ p['w'], batches)
  soups = statistics.stability(values_fn, 4, num_resamples=20)
  outputs = statistics.stability(
      ensemble_values(logits, label), 4, num_resamples=20
  )
  assert soups.chosen == outputs.chosen
  np.testing.assert_array_equal(soups.frequency, outputs.frequency)
  eval_fn = lambda p: float(np.mean((x @ p['w']).argmax(-1) == label))
  greedy = jaxsoup.greedy(models, eval_fn)
  assert soups.chosen == tuple(sorted(greedy.info.accepted))


def test_a_model_that_is_always_right_is_always_chosen():
  label = np.arange(30) % 3
  right, wrong = np.eye(3)[label], np.eye(3)[(label + 1) % 3]
  logits = np.stack([wrong, 2 * right, wrong])
  got = statistics.stability(
      ensemble_values(logits, label), 3, recipe=RECIPES['strict']
  )
  assert got.chosen == (1,) and got.frequency.tolist() == [0, 1, 0]
  assert got.overlap == 1 and set(got.sizes) == {1}


def test_stability_names_what_is_wrong():
  with pytest.raises(ValueError, match=r'shape \[\] for \(0,\)'):
    statistics.stability(lambda members: 0.5, 3)
  with pytest.raises(ValueError, match=r'returned 4 numbers for \(1,\), and 3'):
    statistics.stability(lambda members: np.ones(3 + members[0]), 3)
