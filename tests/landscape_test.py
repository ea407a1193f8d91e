"""Landscapes against closed forms, and what they share with NumPy."""

import functools
import gc
from typing import NamedTuple
import weakref

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec
import numpy as np
import pytest

import jaxsoup
from jaxsoup import checkpoints
from jaxsoup import evaluation
from jaxsoup import landscape

SHAPES = {'body': {'kernel': (5, 4), 'bias': (4,)}, 'head': (4, 3)}
is_shape = lambda x: isinstance(x, tuple)


def model(seed, scale=1.0, dtype=np.float32):
  rng = np.random.default_rng(seed)
  draw = lambda shape: (scale * rng.normal(size=shape)).astype(dtype)
  return jax.tree.map(draw, SHAPES, is_leaf=is_shape)


def flat(params):
  leaves = jax.tree.leaves(params)
  return np.concatenate([np.ravel(x).astype(np.float64) for x in leaves])


def moved(theta_0, *steps):
  """theta_0 + sum of models: so that a plane holds, or does not hold it."""
  return jax.tree.map(lambda *x: np.sum(x, 0, dtype='f'), theta_0, *steps)


def square(params):
  """|theta|^2, whose value on any line and plane is known."""
  return sum(jnp.vdot(x, x) for x in jax.tree.leaves(params))


class Counting(list):
  """Ingredients that count how often each is read."""

  def __init__(self, items):
    super().__init__(items)
    self.reads = [0] * len(self)

  def __getitem__(self, k):
    self.reads[k] += 1
    return super().__getitem__(k)


# Angles and distances.


def angles_by_hand(vectors):
  unit = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
  return np.degrees(np.arccos(np.clip(unit @ unit.T, -1, 1)))


def test_running_statistics_are_no_parameters(rng):
  """They follow the data, all runs alike, by more than parameters move."""
  models = [
      {
          'norm': {'mean': 99 + x[:3], 'var': 55 * x[:3] ** 2, 'scale': x[3:6]},
          'w': x[6:],
      }
      for x in rng.normal(size=(4, 12)).astype(np.float32)
  ]
  trained = [{'scale': x['norm']['scale'], 'w': x['w']} for x in models]
  np.testing.assert_array_equal(
      landscape.angles(models[1:], models[0]),
      landscape.angles(trained[1:], trained[0]),
  )
  np.testing.assert_array_equal(
      landscape.distances(models), landscape.distances(trained)
  )


@pytest.mark.parametrize('dtype', ['float32', 'bfloat16'])
def test_angles(dtype):
  dtype = jnp.dtype(dtype)
  theta_0 = model(0, dtype=dtype)
  models = [model(k, dtype=dtype) for k in range(1, 5)]
  expected = angles_by_hand(np.stack([flat(m) - flat(theta_0) for m in models]))
  actual = landscape.angles(models, theta_0)
  np.testing.assert_allclose(actual, expected, atol=0.05)
  assert landscape.angle(theta_0, models[1], models[3]) == pytest.approx(
      expected[1, 3], abs=0.05
  )


def test_angles_of_groups():
  theta_0, models = model(0), [model(k) for k in range(1, 4)]
  by_group = landscape.angles(models, theta_0, group_fn=lambda path: path[:1])
  for name in SHAPES:
    vectors = [flat(m[name]) - flat(theta_0[name]) for m in models]
    expected = angles_by_hand(np.stack(vectors))
    np.testing.assert_allclose(by_group[name], expected, atol=0.05)
  by_leaf = landscape.distances(models, group_fn=lambda path: path)
  np.testing.assert_allclose(
      by_leaf['body']['bias'][0, 2],
      np.linalg.norm(models[0]['body']['bias'] - models[2]['body']['bias']),
      rtol=1e-5,
  )


def test_angle_of_a_model_that_never_moved_is_not_a_number():
  theta_0 = model(0)
  angles = landscape.angles([theta_0, model(1)], theta_0)
  assert np.isnan(angles[0]).all() and np.isnan(angles[:, 0]).all()
  assert angles[1, 1] == 0


def test_a_model_is_at_no_angle_to_itself():
  angles = landscape.angles([model(k) for k in range(1, 12)], model(0))
  assert (np.diagonal(angles) == 0).all()


def test_small_distances_survive_large_parameters():
  """No difference of large squares: 1e4 from zero, 1e-2 apart."""
  first = {'w': np.full(1000, 1e4, np.float32)}
  second = {'w': first['w'] + np.float32(0.015625)}
  distances = landscape.distances([first, second])
  assert distances[0, 1] == pytest.approx(0.015625 * np.sqrt(1000), rel=1e-6)
  assert distances[0, 0] == 0


@pytest.mark.parametrize('num_held', [1, 2, 3, 5, 7])
def test_distances_in_blocks(num_held, monkeypatch):
  from jaxsoup.landscape import _geometry

  monkeypatch.setattr(_geometry, '_block_size', lambda leaves: num_held)
  models = Counting(model(k) for k in range(5))
  distances = landscape.distances(models)
  vectors = np.stack([flat(list.__getitem__(models, k)) for k in range(5)])
  expected = np.linalg.norm(vectors[:, None] - vectors, axis=-1)
  np.testing.assert_allclose(distances, expected, rtol=1e-5, atol=1e-5)
  # Ingredient 0 tells how large a model is, and is the template.
  assert sum(models.reads) <= 2 + sum(range(5, 0, -num_held))


def test_angles_of_checkpoints(tmp_path):
  theta_0, models = model(0), [model(k) for k in range(1, 4)]
  paths = [
      checkpoints.save(tmp_path / str(k), m) or tmp_path / str(k)
      for k, m in enumerate(models)
  ]
  angles = landscape.angles(checkpoints.Ingredients(paths), theta_0)
  np.testing.assert_array_equal(angles, landscape.angles(models, theta_0))


def test_angles_on_a_mesh(placement):
  shape = functools.partial(jax.tree.map, placement.put)
  wide = [{'w': np.random.default_rng(k).normal(size=(8, 3))} for k in range(3)]
  wide = jax.tree.map(lambda x: x.astype('f'), wide)
  angles = landscape.angles([shape(m) for m in wide[1:]], shape(wide[0]))
  expected = angles_by_hand(
      np.stack([flat(m) - flat(wide[0]) for m in wide[1:]])
  )
  np.testing.assert_allclose(angles, expected, atol=0.05)


def test_models_that_do_not_fit_are_named():
  with pytest.raises(ValueError, match="theta_0 does not match .* leaf 'w'"):
    landscape.angle({'w': np.zeros(3)}, {'w': np.ones(2)}, {'w': np.ones(2)})
  with pytest.raises(ValueError, match='ingredient 1 does not match'):
    landscape.line(square, {'w': np.ones(2)}, {'w': np.ones(3)})


# Lines.


def test_line_of_a_quadratic():
  first, second = model(1), model(2)
  path = landscape.line(square, first, second, num=9)
  t = np.linspace(0, 1, 9)
  points = np.outer(1 - t, flat(first)) + np.outer(t, flat(second))
  np.testing.assert_allclose(path.t, t)
  np.testing.assert_allclose(path.loss, (points**2).sum(1), rtol=1e-5)
  # A parabola lies below its chord.
  assert landscape.barrier(path) == 0
  # t (1 - t) |theta_1 - theta_2|^2, of which 9 points hold the maximum.
  rise = landscape.barrier(path._replace(loss=-path.loss))
  distance = landscape.distances([first, second])[0, 1]
  assert rise == pytest.approx(distance**2 / 4, rel=1e-5)


@pytest.mark.parametrize('chunk_size', [1, 2, 4, 7, 20])
def test_chunks_change_nothing(chunk_size):
  first, second, told = model(1), model(2), []
  path = landscape.line(
      square,
      first,
      second,
      num=7,
      chunk_size=chunk_size,
      on_points=lambda *numbers: told.append(numbers),
  )
  expected = [
      square(jaxsoup.interpolate(first, second, t).params) for t in path.t
  ]
  np.testing.assert_allclose(path.loss, expected, rtol=1e-5)
  ends = [min(n + chunk_size, 7) for n in range(0, 7, chunk_size)]
  assert told == [(end, 7) for end in ends]


def test_a_second_line_compiles_nothing():
  traces = []

  def loss_fn(params):
    traces.append(1)
    return square(params)

  for seed in range(3):
    landscape.line(loss_fn, model(seed), model(9), num=5, chunk_size=2)
  assert len(traces) == 1


def batched_problem():
  rng = np.random.default_rng(3)
  x = rng.normal(size=(11, 5)).astype(np.float32)
  label = rng.integers(3, size=11)
  return x, label, evaluation.batched({'x': x, 'label': label}, 4)


def logits_fn(params, batch):
  hidden = batch['x'] @ params['body']['kernel'] + params['body']['bias']
  return jnp.tanh(hidden) @ params['head']


def by_hand(params, x, label):
  """Errors of the same network in NumPy."""
  hidden = np.tanh(x @ params['body']['kernel'] + params['body']['bias'])
  return np.mean((hidden @ params['head']).argmax(-1) != label)


@pytest.mark.parametrize(
    'options', [{}, {'chunk_size': 3}, {'is_traced': False}]
)
def test_line_over_batches(options):
  """The last batch is padded: the padding must not count."""
  x, label, batches = batched_problem()
  error_fn = evaluation.mean_of(
      lambda params, batch: logits_fn(params, batch).argmax(-1)
      != batch['label'],
      batches,
  )
  first, second = model(1), model(2)
  path = landscape.line(error_fn, first, second, 5, **options)
  mixed = [
      jax.tree.map(lambda a, b, t=t: (1 - t) * a + t * b, first, second)
      for t in path.t
  ]
  expected = [by_hand(params, x, label) for params in mixed]
  np.testing.assert_allclose(path.loss, expected, atol=1e-6)


def test_functions_that_cannot_be_traced():
  host_fn = lambda params: float(np.asarray(params['w']).sum())
  first, second = {'w': np.zeros(2, 'f')}, {'w': np.ones(2, 'f')}
  for chunk_size in (1, 2):
    with pytest.raises(TypeError, match='is_traced=False'):
      landscape.line(host_fn, first, second, 3, chunk_size=chunk_size)
  path = landscape.line(host_fn, first, second, 3, is_traced=False)
  np.testing.assert_allclose(path.loss, [0, 1, 2])


def test_leaves_that_are_not_floats_are_those_of_the_first():
  first = {'w': np.float32(0), 'step': np.int32(3)}
  second = {'w': np.float32(1), 'step': np.int32(5)}
  loss_fn = lambda params: params['w'] * params['step']
  for chunk_size in (1, 2):
    path = landscape.line(loss_fn, first, second, 2, chunk_size=chunk_size)
    np.testing.assert_allclose(path.loss, [0, 3])


def test_wrong_arguments_are_named():
  with pytest.raises(TypeError, match=r'shape \(2,\): expected a scalar'):
    landscape.line(lambda x: x, np.zeros(2), np.ones(2))
  with pytest.raises(ValueError, match='num is 1'):
    landscape.line(square, np.zeros(2), np.ones(2), 1)
  with pytest.raises(ValueError, match='chunk_size is 0'):
    landscape.line(square, np.zeros(2), np.ones(2), chunk_size=0)


def test_points_on_a_mesh(on_mesh):
  """Each device evaluates its own points, of models that lie on all of them."""
  sharding = NamedSharding(on_mesh.mesh, PartitionSpec('fsdp'))
  first, second = model(1), model(2)
  told = []

  def loss_fn(params):
    return square(params)

  path = landscape.line(
      loss_fn,
      first,
      second,
      num=10,
      chunk_size=8,
      sharding=sharding,
      on_points=lambda *numbers: told.append(numbers),
  )
  expected = landscape.line(loss_fn, first, second, num=10)
  np.testing.assert_allclose(path.loss, expected.loss, rtol=1e-5)
  assert told == [(8, 10), (10, 10)]
  with pytest.raises(ValueError, match='chunk_size is 6 and sharding'):
    landscape.line(square, first, second, chunk_size=6, sharding=sharding)


def test_points_on_a_mesh_stay_apart(on_mesh):
  """Mixed models are sharded by point: none lies on two devices."""
  from jaxsoup import _mixing

  sharding = NamedSharding(on_mesh.mesh, PartitionSpec('fsdp'))
  everywhere = NamedSharding(on_mesh.mesh, PartitionSpec())
  alpha = jax.device_put(np.ones((8, 2), np.float32), sharding)
  stacked = [jax.device_put(np.ones((2, 6, 3), np.float32), everywhere)]
  (mixed,) = _mixing.mix_many(alpha, stacked)
  assert mixed.addressable_shards[0].data.shape == (2, 6, 3)


def test_line_where_transfers_are_forbidden():
  first, second = jax.device_put((model(1), model(2)))
  expected = landscape.line(square, first, second, 5)
  with jax.transfer_guard('disallow'):
    for chunk_size in (1, 2):
      path = landscape.line(square, first, second, 5, chunk_size=chunk_size)
      np.testing.assert_allclose(path.loss, expected.loss, rtol=1e-6)


# Planes.


def test_plane_of_a_quadratic():
  """|theta_0 + x u + y v|^2, with the basis of Gram-Schmidt in NumPy."""
  corners = [model(k) for k in (1, 2, 3)]
  origin, first, second = map(flat, corners)
  u = (first - origin) / np.linalg.norm(first - origin)
  v = (second - origin) - (second - origin) @ u * u
  v /= np.linalg.norm(v)
  inside = moved(
      jax.tree.map(lambda x: 0.2 * x, corners[0]),
      jax.tree.map(lambda x: 0.5 * x, corners[1]),
      jax.tree.map(lambda x: 0.3 * x, corners[2]),
  )
  outside = model(4)
  plane = landscape.plane(
      square, *corners, others=[inside, outside], num=4, chunk_size=5
  )
  for params, point, off in zip(
      [*corners, inside, outside], plane.points, plane.off
  ):
    task = flat(params) - origin
    np.testing.assert_allclose(point, [task @ u, task @ v], atol=1e-4)
    expected = np.linalg.norm(task - task @ u * u - task @ v * v)
    np.testing.assert_allclose(off, expected, rtol=1e-4, atol=1e-4)
  assert plane.off[:4].tolist() == [0, 0, 0, 0] and plane.off[4] > 1
  expected = [
      [np.sum((origin + x * u + y * v) ** 2) for x in plane.x] for y in plane.y
  ]
  np.testing.assert_allclose(plane.loss, expected, rtol=1e-4)
  low, high = plane.points.min(0), plane.points.max(0)
  np.testing.assert_allclose(
      [plane.x[0], plane.y[-1]],
      [low[0] - 0.25 * (high - low)[0], high[1] + 0.25 * (high - low)[1]],
  )


def test_plane_needs_three_models_apart():
  theta_0, step = model(0), model(1)
  first = moved(theta_0, step)
  second = moved(theta_0, step, step)
  for other in (first, second, theta_0):
    with pytest.raises(ValueError, match='lie on one line'):
      landscape.plane(square, theta_0, first, other)


def test_others_of_a_plane_that_do_not_fit_are_named():
  corners = [{'w': np.eye(3)[k]} for k in range(3)]
  with pytest.raises(ValueError, match=r"others\[0\] .* leaf 'w' has shape"):
    landscape.plane(square, *corners, others=[{'w': np.zeros(2)}])


# Soups against ensembles.


def softmax(z):
  e = np.exp(z - z.max(-1, keepdims=True))
  return e / e.sum(-1, keepdims=True)


def network(params, x, beta=1.0):
  """`logits_fn` in NumPy, float64."""
  p = jax.tree.map(lambda a: np.asarray(a, np.float64), params)
  hidden = np.tanh(x @ p['body']['kernel'] + p['body']['bias'])
  return beta * hidden @ p['head']


def loss_by_hand(logits, label):
  return -np.mean(np.log(softmax(logits))[np.arange(len(label)), label])


def variance_by_hand(logits, difference):
  p = softmax(logits)
  mean = (p * difference).sum(-1)
  return np.mean((p * difference**2).sum(-1) - mean**2)


def between(first, second, t):
  return jax.tree.map(
      lambda a, b: (1 - t) * np.float64(a) + t * np.float64(b), first, second
  )


@pytest.mark.parametrize('t, beta', [(0.5, 1.0), (0.3, 2.0)])
def test_theory_of_a_linear_softmax_model(t, beta):
  """Soup and ensemble are one, while both terms are known and not zero."""
  x, label, batches = batched_problem()
  rng = np.random.default_rng(0)
  first, second = rng.normal(size=(2, 5, 3)).astype(np.float32)
  terms = landscape.soup_minus_ensemble(
      lambda params, batch: batch['x'] @ params,
      first,
      second,
      batches,
      t=t,
      beta=beta,
  )
  logits = beta * x @ between(first, second, t)
  variance = variance_by_hand(logits, beta * x @ (second - first))
  assert variance > 0.5
  assert terms.variance == pytest.approx(variance, rel=1e-4)
  assert terms.curvature == pytest.approx(variance, rel=1e-4)
  assert terms.approximation == pytest.approx(0, abs=1e-4 * variance)
  assert terms.soup == pytest.approx(loss_by_hand(logits, label), rel=1e-5)
  assert terms.ensemble == pytest.approx(terms.soup, rel=1e-5)


@pytest.mark.parametrize('t, beta', [(0.5, 1.0), (0.3, 2.0)])
def test_theory_is_exact_on_a_quadratic(t, beta):
  """Outputs quadratic in theta, a loss linear in them: nothing is left out."""
  x, label, batches = batched_problem()
  rng = np.random.default_rng(1)
  first, second = rng.normal(size=(2, 5, 3)).astype(np.float32)
  terms = landscape.soup_minus_ensemble(
      lambda params, batch: (batch['x'] @ params) ** 2,
      first,
      second,
      batches,
      t=t,
      beta=beta,
      output_loss_fn=lambda z, batch: -jnp.take_along_axis(
          z, batch['label'][:, None], 1
      )[:, 0],
  )
  rows = np.arange(len(x))
  output = lambda w: beta * np.mean(((x @ w) ** 2)[rows, label])
  soup = -output(between(first, second, t))
  ensemble = -(1 - t) * output(first) - t * output(second)
  assert abs(soup - ensemble) > 0.5
  assert terms.soup == pytest.approx(soup, rel=1e-4)
  assert terms.ensemble == pytest.approx(ensemble, rel=1e-4)
  assert terms.approximation == pytest.approx(soup - ensemble, rel=1e-4)
  # The whole of it is curvature: a linear loss does not bend.
  assert terms.variance == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize('t, beta', [(0.5, 1.0), (0.3, 2.0)])
def test_theory_of_a_network(t, beta):
  """The terms, each against NumPy, differences of second order among them."""
  x, label, batches = batched_problem()
  first, second = model(1), model(2)
  terms = landscape.soup_minus_ensemble(
      logits_fn, first, second, batches, t=t, beta=beta
  )
  loss = lambda s: loss_by_hand(
      network(between(first, second, s), x, beta), label
  )
  step = 1e-4
  curvature = (loss(t + step) - 2 * loss(t) + loss(t - step)) / step**2
  ends = network(first, x, beta), network(second, x, beta)
  ensemble = loss_by_hand((1 - t) * ends[0] + t * ends[1], label)
  soup = network(between(first, second, t), x, beta)
  assert terms.soup == pytest.approx(loss(t), rel=1e-5)
  assert terms.ensemble == pytest.approx(ensemble, rel=1e-5)
  assert terms.curvature == pytest.approx(curvature, rel=1e-3)
  expected = variance_by_hand(soup, ends[1] - ends[0])
  assert terms.variance == pytest.approx(expected, rel=1e-4)
  assert terms.approximation == pytest.approx(
      t * (1 - t) / 2 * (terms.variance - terms.curvature), rel=1e-6
  )


def test_error_of_the_theory_is_of_fourth_order():
  """Models half as far apart: a sixteenth of the error, a quarter of all."""
  _, _, batches = batched_problem()
  middle, step = model(1), model(2)
  errors, differences = [], []
  for scale in (0.8, 0.4):
    ends = [
        jax.tree.map(lambda m, s, c=c: m + np.float32(c) * s, middle, step)
        for c in (-scale / 2, scale / 2)
    ]
    terms = landscape.soup_minus_ensemble(logits_fn, *ends, batches)
    differences.append(terms.soup - terms.ensemble)
    errors.append(terms.approximation - differences[-1])
  assert abs(errors[0]) > 1e-4
  assert 10 < errors[0] / errors[1] < 25
  assert 3 < differences[0] / differences[1] < 5


def test_theory_of_squared_loss():
  """The term of the outputs is `|df|^2` where the loss is `|z - y|^2 / 2`."""
  x, _, _ = batched_problem()
  batches = evaluation.batched({'x': x, 'y': x[:, :3]}, 4)
  first, second = model(1), model(2)
  terms = landscape.soup_minus_ensemble(
      logits_fn,
      first,
      second,
      batches,
      output_loss_fn=lambda z, batch: 0.5 * jnp.square(z - batch['y']).sum(-1),
  )
  difference = network(second, x) - network(first, x)
  expected = np.mean((difference**2).sum(-1))
  assert terms.variance == pytest.approx(expected, rel=1e-4)


def test_theory_of_narrow_parameters():
  """bfloat16 would round what a derivative is made of."""
  _, _, batches = batched_problem()
  narrow = [model(k, dtype=jnp.bfloat16) for k in (1, 2)]
  wide = jax.tree.map(lambda x: x.astype(np.float32), narrow)
  np.testing.assert_allclose(
      landscape.soup_minus_ensemble(logits_fn, *narrow, batches),
      landscape.soup_minus_ensemble(logits_fn, *wide, batches),
      rtol=1e-5,
  )


def test_theory_names_wrong_losses():
  _, _, batches = batched_problem()
  models = model(1), model(2)
  with pytest.raises(ValueError, match=r'shape \(\): expected \[4\]'):
    landscape.soup_minus_ensemble(
        logits_fn, *models, batches, output_loss_fn=lambda z, _: z.mean()
    )
  with pytest.raises(ValueError, match='no example'):
    landscape.soup_minus_ensemble(logits_fn, *models, [])


def test_pairs():
  x, label, batches = batched_problem()
  theta_0, models = model(0), Counting(model(k) for k in range(1, 5))
  told = []
  pairs = landscape.pairs(
      models, theta_0, logits_fn, batches, on_pair=told.append
  )
  assert told == pairs
  assert [p.members for p in pairs] == [
      (0, 1), (0, 2), (0, 3), (1, 2), (1, 3), (2, 3)
  ]  # fmt: skip
  models = list(models)
  right = lambda logits: np.mean(logits.argmax(-1) == label)
  for pair in pairs:
    first, second = (models[k] for k in pair.members)
    outputs = network(first, x), network(second, x)
    singles = [right(z) for z in outputs]
    np.testing.assert_allclose(pair.singles, singles, atol=1e-6)
    soup = right(network(between(first, second, 0.5), x))
    assert pair.soup == pytest.approx(soup)
    assert pair.ensemble == pytest.approx(right(sum(outputs)))
    assert pair.gain == pytest.approx(soup - np.mean(singles))
    expected = landscape.angle(theta_0, first, second)
    assert pair.angle == pytest.approx(expected, abs=1e-3)
  only = landscape.pairs(models, theta_0, logits_fn, batches, members=[(1, 3)])
  assert only == [pairs[4]]


def test_pairs_of_batches_in_another_order_each_time():
  x, label, _ = batched_problem()
  rng = np.random.default_rng(0)

  class Shuffled:

    def __iter__(self):
      order = rng.permutation(len(label))
      data = {'x': x[order], 'label': label[order]}
      return iter(evaluation.batched(data, 20))

  models = [model(1), model(2)]
  with pytest.raises(ValueError, match='differ from row'):
    landscape.pairs(models, model(0), logits_fn, Shuffled())


# Sharpness.


def loss_of(params, batch):
  logits = logits_fn(params, batch)
  rows = jnp.take_along_axis(
      jax.nn.log_softmax(logits), batch['label'][:, None], 1
  )
  return -rows[:, 0]


def hessian(params, x, label):
  """The whole Hessian, in float32, and symmetric."""
  from jax import flatten_util

  vector, unravel = flatten_util.ravel_pytree(params)
  loss_fn = lambda v: loss_of(unravel(v), {'x': x, 'label': label}).mean()
  return np.asarray(jax.hessian(loss_fn)(vector), np.float64)


@pytest.mark.slow
def test_sharpness_of_a_network():
  x, label, batches = batched_problem()
  params = model(1)
  eigenvalues = np.linalg.eigvalsh(hessian(params, x, label))
  loss_fn = lambda params: loss_of(params, {'x': x, 'label': label}).mean()
  for fn in (loss_fn, evaluation.mean_of(loss_of, batches)):
    sharpness = landscape.sharpness(fn, params, tolerance=1e-4)
    assert sharpness.eigenvalue == pytest.approx(eigenvalues[-1], rel=1e-3)
    assert sharpness.error <= 1e-4 * sharpness.eigenvalue
    assert sharpness.num_steps < len(eigenvalues)
    # What the error promises: some eigenvalue is that near.
    nearest = np.min(np.abs(eigenvalues - sharpness.eigenvalue))
    assert nearest <= sharpness.error + 1e-4 * eigenvalues[-1]


def test_sharpness_is_the_largest_not_the_steepest_down():
  """Of -5, 1 and 2 it is 2; power iteration would find -5."""
  rng = np.random.default_rng(0)
  q, _ = np.linalg.qr(rng.normal(size=(3, 3)))
  matrix = (q * [-5.0, 1.0, 2.0] @ q.T).astype(np.float32)
  loss_fn = lambda w: 0.5 * w @ matrix @ w
  sharpness = landscape.sharpness(loss_fn, np.ones(3, np.float32))
  assert sharpness.eigenvalue == pytest.approx(2, rel=1e-3)


def test_sharpness_of_a_flat_loss():
  sharpness = landscape.sharpness(lambda w: 3 * w.sum(), np.ones(4, np.float32))
  assert sharpness == (0, 0, 1)


def test_sharpness_stops_and_tells_the_error():
  """After one step the error is large, and the bound holds."""
  values = np.linspace(1, 10, 40).astype(np.float32)
  loss_fn = lambda w: 0.5 * (values * w) @ w
  sharpness = landscape.sharpness(loss_fn, np.ones(40, 'f'), max_steps=2)
  assert sharpness.num_steps == 2 and sharpness.error > 0.1
  assert np.min(np.abs(values - sharpness.eigenvalue)) <= sharpness.error
  sharpness = landscape.sharpness(loss_fn, np.ones(40, 'f'), tolerance=1e-5)
  assert sharpness.eigenvalue == pytest.approx(10, rel=1e-4)


def test_sharpness_of_narrow_and_integer_leaves():
  params = {'w': jnp.ones(3, jnp.bfloat16), 'step': np.int32(2)}
  weights = np.array([1.0, 2.0, 3.0], np.float32)
  loss_fn = lambda p: p['step'] * (weights * p['w']) @ p['w']
  sharpness = landscape.sharpness(loss_fn, params)
  assert sharpness.eigenvalue == pytest.approx(12, rel=1e-4)
  with pytest.raises(ValueError, match='no floats'):
    landscape.sharpness(lambda p: 0.0, {'step': np.int32(2)})


def test_sharpness_on_a_mesh(on_mesh):
  values = np.arange(1, 9, dtype=np.float32)
  scale = on_mesh.put(values)
  params = on_mesh.put(np.ones(8, np.float32))
  sharpness = landscape.sharpness(
      lambda w: 0.5 * jnp.sum(scale * w * w), params
  )
  assert sharpness.eigenvalue == pytest.approx(8, rel=1e-3)


def test_sharpness_where_transfers_are_forbidden():
  params = jax.device_put(model(1))
  expected = landscape.sharpness(square, params)
  with jax.transfer_guard('disallow'):
    assert landscape.sharpness(square, params) == expected
  assert expected.eigenvalue == pytest.approx(2, rel=1e-5)


# Features.


@pytest.mark.parametrize('num', [6, 50])
def test_cka_equals_its_kernel_form(num):
  """`<K H, H L> / sqrt(...)` with the centering matrix H."""
  rng = np.random.default_rng(0)
  features = [rng.normal(size=(num, d)) for d in (7, 7, 12)]
  features[1] = features[0] + 0.5 * features[1]
  center = np.eye(num) - 1 / num
  kernels = [center @ x @ x.T @ center for x in features]
  inner = np.array([[np.trace(a @ b) for b in kernels] for a in kernels])
  norms = np.sqrt(np.diagonal(inner))
  actual = landscape.cka([x.astype(np.float32) for x in features])
  np.testing.assert_allclose(actual, inner / np.outer(norms, norms), rtol=1e-5)


def test_cka_does_not_see_rotations_and_permutations():
  rng = np.random.default_rng(0)
  x = rng.normal(size=(30, 6))
  rotation, _ = np.linalg.qr(rng.normal(size=(6, 6)))
  similarity = landscape.cka([x, 3 * x @ rotation + 1, x[:, ::-1], 0 * x])
  np.testing.assert_allclose(similarity[:3, :3], 1, rtol=1e-6)
  assert np.isnan(similarity[3]).all()


def test_cka_of_different_examples_is_refused():
  with pytest.raises(ValueError, match=r'\(4, 2\), \(5, 2\)'):
    landscape.cka([np.ones((4, 2)), np.ones((5, 2))])


def test_lines_read_the_first_of_a_row_once():
  models = Counting(model(k) for k in range(4))
  members = [(0, 1), (0, 2), (2, 3)]
  paths = landscape.lines(square, models, members, num=5)
  assert list(paths) == members
  assert models.reads == [1, 1, 2, 1]
  for (i, j), path in paths.items():
    expected = landscape.line(square, model(i), model(j), num=5)
    np.testing.assert_array_equal(path.loss, expected.loss)


def test_sharpness_of_complex_parameters(rng):
  """As of their real and imaginary parts."""
  matrix = rng.normal(size=(6, 6)).astype(np.float32)
  of_parts = lambda x: jnp.sum(jnp.square(matrix @ x))
  of_complex = lambda params: of_parts(
      jnp.concatenate([params['z'].real, params['z'].imag])
  )
  z = rng.normal(size=3) + 1j * rng.normal(size=3)
  sharpness = landscape.sharpness(
      of_complex, {'z': z.astype(np.complex64), 'step': np.int32(3)}
  )
  expected = 2 * np.linalg.eigvalsh(matrix.T @ matrix)[-1]
  assert sharpness.eigenvalue == pytest.approx(expected, rel=1e-3)


@pytest.mark.parametrize(
    'measure',
    [
        lambda x: landscape.angle(x, x, x),
        lambda x: landscape.distances([x, x]),
        lambda x: landscape.plane(square, x, x, x),
        lambda x: landscape.sharpness(square, x),
    ],
)
def test_parameters_without_floats_are_one_error(measure):
  with pytest.raises(ValueError, match='The parameters have no floats'):
    measure({'step': np.int32(3)})


# Functions of users.


class _Loss:
  """A loss with data in it, and a count of how often jax traces it."""

  def __init__(self):
    self.num_traced = 0
    self.data = jnp.ones(3)

  def __call__(self, params):
    self.num_traced += 1
    return jnp.sum(self.data * params**2)

  def logits(self, params, batch):
    return self(params) * batch['x']

  def losses(self, logits, batch):
    del batch
    self.num_traced += 1
    return logits.sum(-1)


class _TupleLoss(NamedTuple):
  """Python cannot refer to a tuple weakly."""

  scale: float

  def __call__(self, params):
    return self.scale * jnp.sum(params**2)


ENDS = np.zeros(3, 'f'), np.ones(3, 'f')
MEASURES = {
    'line': lambda f: landscape.line(f, *ENDS, num=9),
    'chunks': lambda f: landscape.line(f, *ENDS, num=9, chunk_size=4),
    'lines': lambda f: landscape.lines(
        f, [*ENDS, 2 * ENDS[1]], [(0, 1), (0, 2), (1, 2)], num=5
    ),
    'plane': lambda f: landscape.plane(f, *np.eye(3, dtype='f'), num=3),
    'sharpness': lambda f: landscape.sharpness(
        lambda params: f(params) + params[0] ** 2, ENDS[1], max_steps=5
    ),
    'mean_of': lambda f: landscape.sharpness(
        evaluation.mean_of(f.logits, [{'x': np.ones(2)}] * 4),
        ENDS[1],
        max_steps=2,
    ),
    'theory': lambda f: landscape.soup_minus_ensemble(
        f.logits, *ENDS, [{'x': np.ones((2, 3))}] * 3, output_loss_fn=f.losses
    ),
}


@pytest.mark.parametrize('measure', MEASURES.values(), ids=MEASURES)
def test_functions_are_not_kept_alive(measure):
  counts = []
  for _ in range(2):
    loss = _Loss()
    measure(loss)
    counts.append(loss.num_traced)
    alive = weakref.ref(loss), weakref.ref(loss.data)
    del loss
    gc.collect()
    assert [x() for x in alive] == [None, None]
  # One trace calls it once for each term and derivative, whatever the batches.
  assert counts[0] == counts[1] <= 8


@pytest.mark.parametrize('name', ['line', 'chunks', 'lines', 'plane'])
def test_functions_are_traced_once(name):
  loss = _Loss()
  MEASURES[name](loss)
  MEASURES[name](loss)
  assert loss.num_traced == 1


def test_functions_without_weak_references():
  path = landscape.line(_TupleLoss(2.0), *ENDS, num=3)
  np.testing.assert_allclose(path.loss, [0, 1.5, 6])
