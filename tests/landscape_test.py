"""Landscapes against closed forms, and what they share with NumPy."""

import functools
import math

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
  by_group = landscape.angles(models, theta_0, depth=1)
  for name in SHAPES:
    vectors = [flat(m[name]) - flat(theta_0[name]) for m in models]
    expected = angles_by_hand(np.stack(vectors))
    np.testing.assert_allclose(by_group[name], expected, atol=0.05)
  by_leaf = landscape.distances(models, depth=math.inf)
  np.testing.assert_allclose(
      by_leaf['body']['bias'][0, 2],
      np.linalg.norm(models[0]['body']['bias'] - models[2]['body']['bias']),
      rtol=1e-5,
  )


def test_angle_of_a_model_that_never_moved_is_not_a_number():
  theta_0 = model(0)
  found = landscape.angles([theta_0, model(1)], theta_0)
  assert np.isnan(found[0]).all() and np.isnan(found[:, 0]).all()
  assert found[1, 1] == 0


def test_small_distances_survive_large_parameters():
  """No difference of large squares: 1e4 from zero, 1e-2 apart."""
  first = {'w': np.full(1000, 1e4, np.float32)}
  second = {'w': first['w'] + np.float32(0.015625)}
  found = landscape.distances([first, second])
  assert found[0, 1] == pytest.approx(0.015625 * np.sqrt(1000), rel=1e-6)
  assert found[0, 0] == 0


@pytest.mark.parametrize('num_held', [1, 2, 3, 5, 7])
def test_distances_in_blocks(num_held, monkeypatch):
  from jaxsoup.landscape import _geometry

  monkeypatch.setattr(_geometry, '_block_size', lambda leaves: num_held)
  models = Counting(model(k) for k in range(5))
  found = landscape.distances(models)
  vectors = np.stack([flat(list.__getitem__(models, k)) for k in range(5)])
  expected = np.linalg.norm(vectors[:, None] - vectors, axis=-1)
  np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)
  # Ingredient 0 tells how large a model is, and is the template.
  assert sum(models.reads) <= 2 + sum(range(5, 0, -num_held))


def test_angles_of_checkpoints(tmp_path):
  theta_0, models = model(0), [model(k) for k in range(1, 4)]
  paths = [
      checkpoints.save(tmp_path / str(k), m) or tmp_path / str(k)
      for k, m in enumerate(models)
  ]
  found = landscape.angles(checkpoints.Ingredients(paths), theta_0)
  np.testing.assert_array_equal(found, landscape.angles(models, theta_0))


def test_angles_on_a_mesh(placement):
  shape = functools.partial(jax.tree.map, placement.put)
  wide = [{'w': np.random.default_rng(k).normal(size=(8, 3))} for k in range(3)]
  wide = jax.tree.map(lambda x: x.astype('f'), wide)
  found = landscape.angles([shape(m) for m in wide[1:]], shape(wide[0]))
  expected = angles_by_hand(
      np.stack([flat(m) - flat(wide[0]) for m in wide[1:]])
  )
  np.testing.assert_allclose(found, expected, atol=0.05)


def test_models_that_do_not_fit_are_named():
  with pytest.raises(ValueError, match="theta_0 does not fit .* leaf 'w'"):
    landscape.angle({'w': np.zeros(3)}, {'w': np.ones(2)}, {'w': np.ones(2)})
  with pytest.raises(ValueError, match='ingredient 1 does not fit'):
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


@pytest.mark.parametrize('chunk_size', [1, 2, 4, 7, 20, None])
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
  size = chunk_size or 1
  assert told == [(min(n + size, 7), 7) for n in range(0, 7, size)]


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


@pytest.mark.parametrize('chunk_size', [1, 3, None])
def test_line_over_batches(chunk_size):
  """The last batch is padded: the padding must not count."""
  x, label, batches = batched_problem()
  error_fn = evaluation.mean_of(
      lambda params, batch: logits_fn(params, batch).argmax(-1)
      != batch['label'],
      batches,
  )
  first, second = model(1), model(2)
  path = landscape.line(error_fn, first, second, 5, chunk_size=chunk_size)
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
    with pytest.raises(TypeError, match='chunk_size=None'):
      landscape.line(host_fn, first, second, 3, chunk_size=chunk_size)
  path = landscape.line(host_fn, first, second, 3, chunk_size=None)
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

  found = landscape.line(
      loss_fn,
      first,
      second,
      num=10,
      chunk_size=8,
      sharding=sharding,
      on_points=lambda *numbers: told.append(numbers),
  )
  expected = landscape.line(loss_fn, first, second, num=10)
  np.testing.assert_allclose(found.loss, expected.loss, rtol=1e-5)
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
      found = landscape.line(square, first, second, 5, chunk_size=chunk_size)
      np.testing.assert_allclose(found.loss, expected.loss, rtol=1e-6)


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
  found = landscape.plane(
      square, *corners, others=[inside, outside], num=4, chunk_size=5
  )
  for params, point, off in zip(
      [*corners, inside, outside], found.points, found.off
  ):
    task = flat(params) - origin
    np.testing.assert_allclose(point, [task @ u, task @ v], atol=1e-4)
    expected = np.linalg.norm(task - task @ u * u - task @ v * v)
    np.testing.assert_allclose(off, expected, rtol=1e-4, atol=1e-4)
  assert found.off[:4].tolist() == [0, 0, 0, 0] and found.off[4] > 1
  expected = [
      [np.sum((origin + x * u + y * v) ** 2) for x in found.x] for y in found.y
  ]
  np.testing.assert_allclose(found.loss, expected, rtol=1e-4)
  low, high = found.points.min(0), found.points.max(0)
  np.testing.assert_allclose(
      [found.x[0], found.y[-1]],
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
