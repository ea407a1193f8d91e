"""Checkpoints read piece by piece: safetensors, shards, averages, memory."""

from concurrent import futures
import errno
import itertools
import json
import os
import pathlib
import tracemalloc
import warnings

from hypothesis import given
from hypothesis import strategies as st
import jax
import jax.numpy as jnp
from jax.sharding import AxisType
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec
import numpy as np
import pytest
from safetensors import numpy as safetensors

import jaxsoup
from jaxsoup import checkpoints
from jaxsoup import sharding
from jaxsoup.checkpoints import _checksum
from jaxsoup.checkpoints import _pieces

NUM = 3


@pytest.fixture
def small_pieces(monkeypatch):
  """Many pieces a leaf, as large models have."""
  monkeypatch.setattr(_pieces, '_PIECE_BYTES', 100)


def params_of(seed: int, dtype=np.float32):
  rng = np.random.default_rng(seed)
  draw = lambda *shape: rng.normal(size=shape).astype(dtype)
  return {
      'body': {'kernel': draw(24, 8), 'bias': draw(8), 'cube': draw(4, 2, 12)},
      'head': {'kernel': draw(8, 4)},
      'scale': draw(),
      'step': np.int32(7),
  }


def flat_names(params):
  with_paths, _ = jax.tree_util.tree_flatten_with_path(params)
  return {
      '.'.join(str(k.key) for k in path): np.asarray(x)
      for path, x in with_paths
  }


def save_by_others(path, params) -> str:
  safetensors.save_file(flat_names(params), path)
  return str(path)


def assert_equal(got, expected):
  assert jax.tree.structure(got) == jax.tree.structure(expected)
  for x, y in zip(jax.tree.leaves(got), jax.tree.leaves(expected)):
    assert x.dtype == y.dtype
    np.testing.assert_array_equal(np.asarray(x), np.asarray(y))


def mean_of(params_list):
  def mean(*leaves):
    if leaves[0].dtype.kind == 'i':
      return leaves[0]
    wide = np.stack([np.asarray(x, np.float64) for x in leaves])
    return wide.mean(0).astype(leaves[0].dtype)

  return jax.tree.map(mean, *params_list)


WRITERS = {
    'safetensors by others': lambda folder, k, p: save_by_others(
        folder / f'{k}.safetensors', p
    ),
    'safetensors': lambda folder, k, p: checkpoints.save(
        folder / f'{k}.safetensors', p
    ),
    'orbax': lambda folder, k, p: checkpoints.save(folder / str(k), p),
}


# --- Formats ------------------------------------------------------------------


@pytest.mark.parametrize(
    'dtype', [np.float16, jnp.bfloat16, np.float32, np.float64, np.int8]
)
def test_reads_what_safetensors_writes(tmp_path, dtype, small_pieces):
  tensor = (np.arange(4 * 30).reshape(4, 30) - 60).astype(dtype)
  path = save_by_others(tmp_path / 'a.safetensors', {'x': {'y': tensor}})
  # Of all threads, as a thread of its own reads.
  before = jax.config.jax_enable_x64
  jax.config.update('jax_enable_x64', True)
  try:
    array = checkpoints.Ingredients([path])[0]['x']['y']
  finally:
    jax.config.update('jax_enable_x64', before)
  assert array.dtype == tensor.dtype
  np.testing.assert_array_equal(np.asarray(array), tensor)


def test_safetensors_reads_what_we_write(tmp_path, small_pieces):
  params = params_of(0) | {'empty': np.zeros((0, 3), np.float32)}
  # A transposed array, whose memory is not in the order of its rows.
  params['body']['kernel'] = np.asfortranarray(params['body']['kernel'])
  path = checkpoints.save(tmp_path / 'a.safetensors', params)
  arrays = safetensors.load_file(path)
  for name, expected in flat_names(params).items():
    np.testing.assert_array_equal(arrays.pop(name), expected)
  assert not arrays
  assert_equal(checkpoints.Ingredients([path])[0], params)


def test_several_files_with_an_index(tmp_path, small_pieces):
  names = flat_names(params_of(0))
  parts = {
      'one.safetensors': list(names)[:3],
      'two.safetensors': list(names)[3:],
  }
  weight_map = {}
  for file, members in parts.items():
    safetensors.save_file({n: names[n] for n in members}, tmp_path / file)
    weight_map |= dict.fromkeys(members, file)
  index = tmp_path / 'model.safetensors.index.json'
  index.write_text(json.dumps({'metadata': {}, 'weight_map': weight_map}))
  for path in (tmp_path, index):
    assert_equal(checkpoints.Ingredients([path])[0], params_of(0))
  (tmp_path / 'two.safetensors').unlink()
  with pytest.raises(ValueError, match='two.safetensors is missing'):
    checkpoints.Ingredients([tmp_path])[0]
  weight_map['scale'] = '../elsewhere.safetensors'
  index.write_text(json.dumps({'weight_map': weight_map}))
  with pytest.raises(ValueError, match='outside the directory'):
    checkpoints.Ingredients([tmp_path])[0]


def test_a_directory_as_transformers_writes_it(tmp_path):
  save_by_others(tmp_path / 'model.safetensors', params_of(0))
  (tmp_path / 'config.json').write_text('{}')
  assert_equal(checkpoints.Ingredients([tmp_path])[0], params_of(0))
  save_by_others(tmp_path / 'adapter.safetensors', params_of(1))
  assert_equal(checkpoints.Ingredients([tmp_path])[0], params_of(0))
  (tmp_path / 'model.safetensors').rename(tmp_path / 'other.safetensors')
  with pytest.raises(ValueError, match='2 .safetensors files but no index'):
    checkpoints.Ingredients([tmp_path])


def test_a_name_that_begins_another_stays_flat(tmp_path):
  path = tmp_path / 'a.safetensors'
  tensors = {'w': np.ones(2, np.float32), 'w.scale': np.ones(1, np.float32)}
  safetensors.save_file(tensors, path)
  assert_equal(checkpoints.Ingredients([path])[0], tensors)


def test_a_file_that_was_cut_short(tmp_path):
  path = pathlib.Path(
      checkpoints.save(tmp_path / 'a.safetensors', params_of(0))
  )
  content = path.read_bytes()
  for size in (4, 100, len(content) // 2, len(content) - 1):
    path.write_bytes(content[:size])
    with pytest.raises(ValueError, match='a.safetensors cannot be read'):
      checkpoints.Ingredients([path])[0]


@pytest.mark.parametrize('writer', ['safetensors', 'orbax'])
def test_no_flipped_bit_of_the_values_goes_unseen(tmp_path, writer):
  params = {'w': np.random.default_rng(0).normal(size=4000).astype(np.float32)}
  path = pathlib.Path(WRITERS[writer](tmp_path, 0, params))
  files = (
      [path] if path.is_file() else [p for p in path.rglob('*') if p.is_file()]
  )
  file = max(files, key=lambda f: f.stat().st_size)
  content = bytearray(file.read_bytes())
  rng = np.random.default_rng(1)
  for place in rng.integers(len(content) - 15_000, len(content), 20):
    changed = bytearray(content)
    changed[place] ^= 1 << rng.integers(8)
    file.write_bytes(changed)
    with pytest.raises(ValueError, match='damaged'):
      checkpoints.Ingredients([path])[0]
  file.write_bytes(content)
  assert_equal(checkpoints.Ingredients([path])[0], params)


def test_never_overwrites(tmp_path):
  path = tmp_path / 'a.safetensors'
  path.write_text('mine')
  for write in (
      lambda: checkpoints.save(path, params_of(0)),
      lambda: checkpoints.save_average(path, checkpoints.Ingredients([path])),
  ):
    with pytest.raises((FileExistsError, ValueError)):
      write()
  assert path.read_text() == 'mine' and len(list(tmp_path.iterdir())) == 1


@pytest.mark.parametrize('has_links', [True, False])
def test_a_file_that_comes_meanwhile_is_kept(tmp_path, monkeypatch, has_links):
  """Also on file systems without hard links, as gcsfuse and exFAT."""
  path = tmp_path / 'soup.safetensors'

  def no_link(*_):
    raise PermissionError(errno.EPERM, 'Operation not permitted')

  if not has_links:
    monkeypatch.setattr(os, 'link', no_link)
  checkpoints.save(tmp_path / 'a.safetensors', params_of(0))
  ingredients = checkpoints.Ingredients([tmp_path / 'a.safetensors'])
  checkpoints.save_average(path, ingredients)
  assert_equal(checkpoints.Ingredients([path])[0], params_of(0))
  path.unlink()
  ingredients.look_for_stop = lambda: path.write_text('mine')
  with pytest.raises(FileExistsError):
    checkpoints.save_average(path, ingredients)
  names = {p.name for p in tmp_path.iterdir()}
  assert path.read_text() == 'mine' and names == {'a.safetensors', path.name}


def _checksum_of(array, cuts=(), rng=None):
  """The checksum of an array that is read in pieces, in any order."""
  data = np.ascontiguousarray(array).reshape(-1).view(np.uint8)
  checksum = _checksum.Checksum(data.size)
  starts = [0, *cuts]
  order = range(len(starts)) if rng is None else rng.permutation(len(starts))
  parts = np.split(data, cuts)
  for i in order:
    checksum.add(parts[i], starts[i])
  return checksum.digest()


@pytest.fixture
def small_blocks(monkeypatch):
  monkeypatch.setattr(_checksum, '_BLOCK_BYTES', 64)


@pytest.mark.parametrize('num_bytes', [0, 1, 63, 64, 65, 128, 1003])
def test_checksums_do_not_depend_on_the_pieces(small_blocks, num_bytes):
  rng = np.random.default_rng(num_bytes)
  array = rng.integers(0, 256, num_bytes, np.uint8)
  whole = _checksum.of(array)
  for num_cuts in (1, 2, 5, 40):
    cuts = np.sort(rng.integers(0, num_bytes + 1, num_cuts))
    assert _checksum_of(array, cuts, rng) == whole


def test_checksums_of_threads():
  array = np.random.default_rng(0).integers(0, 256, 1_000_003, np.uint8)
  checksum = _checksum.Checksum(array.size)
  starts = range(0, array.size, 10_007)
  with futures.ThreadPoolExecutor(4) as pool:
    list(pool.map(lambda s: checksum.add(array[s : s + 10_007], s), starts))
  assert checksum.digest() == _checksum.of(array)


@pytest.mark.parametrize(
    'stride', [1, 8, 509, 8 * 509, 1 << 12, 1 << 16, 1 << 17, 1 << 18]
)
def test_a_checksum_depends_on_positions(stride):
  rows = np.random.default_rng(0).integers(0, 256, (3, stride), np.uint8)
  orders = list(itertools.permutations(range(3)))
  assert len({_checksum.of(rows[[*order]]) for order in orders}) == len(orders)


def test_signs_of_pairs_change_a_checksum():
  values = np.random.default_rng(0).normal(size=(4, 509))
  seen = {_checksum.of(values)}
  for i, j in itertools.combinations(range(4), 2):
    other = values.copy()
    other[[i, j], 0] *= -1
    seen.add(_checksum.of(other))
  assert len(seen) == 7


@given(
    before=st.binary(min_size=1, max_size=300),
    changes=st.dictionaries(
        st.integers(0, 299), st.integers(1, 255), min_size=1, max_size=20
    ),
)
def test_any_change_of_bytes_changes_a_checksum(before, changes):
  before = np.frombuffer(before, np.uint8)
  after = before.copy()
  for place, change in changes.items():
    after[place % after.size] ^= change
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(_checksum, '_BLOCK_BYTES', 32)
    is_equal = _checksum.of(before) == _checksum.of(after)
  assert is_equal == bool((before == after).all())


@pytest.mark.parametrize('spec', [('fsdp',), (None, 'fsdp'), ()])
def test_checksums_of_shards(on_mesh, spec, monkeypatch):
  monkeypatch.setattr(_checksum, '_SLAB_BYTES', 100)
  axes = tuple(on_mesh.mesh.axis_names[0] if s else None for s in spec)
  array = np.random.default_rng(0).normal(size=(16, 8)).astype(np.float32)
  on = NamedSharding(on_mesh.mesh, PartitionSpec(*axes))
  assert _checksum.of(jax.device_put(array, on)) == _checksum.of(array)


def test_digests_of_another_kind_are_not_compared(tmp_path):
  params = {'head': {'w': np.arange(9.0, dtype=np.float32)}}
  path = checkpoints.save(tmp_path / 'a.safetensors', params)
  stored = _checksum.of(params['head']['w'])
  # Not sealed, as by an older version, which gave checksums other names.
  content = pathlib.Path(path).read_bytes()
  for now, then in (
      (b'checksum\\', b'an_entry\\'),
      (b'"head.w\\', b'"head/w\\'),
  ):
    assert now in content
    content = content.replace(now, then)
  for digest, is_read in (('509:1f2e3d4c', True), ('xxh3:' + '0' * 32, False)):
    other = pathlib.Path(tmp_path / f'{is_read}.safetensors')
    other.write_bytes(
        content.replace(stored.encode(), digest.ljust(len(stored)).encode())
    )
    ingredients = checkpoints.Ingredients([other])
    # What is not known to be ours is no identity either.
    assert (ingredients.known_hash(0) is None) == is_read
    if is_read:
      actual = ingredients[0]['head']['w']
      np.testing.assert_array_equal(actual, params['head']['w'])
    else:
      with pytest.raises(ValueError, match='is damaged: its checksum is xxh3:'):
        ingredients[0]


def test_models_with_rows_in_another_order_are_no_duplicates(tmp_path):
  rows = np.random.default_rng(0).normal(size=(4, 1018)).astype(np.float32)
  flipped = rows.copy()
  flipped[:2, 1] *= -1  # The highest bits of 64.
  models = [rows, rows[::-1].copy(), flipped, np.roll(rows, 1, 0)]
  paths = [tmp_path / f'{k}.npz' for k in range(len(models))]
  for k, path in enumerate(paths):
    np.savez(path, x=models[k], y=models[k - 1])  # And leaves change places.
  with warnings.catch_warnings(action='error'):
    soup = jaxsoup.uniform(checkpoints.Ingredients(paths))
  assert soup.info.duplicates == ()


def test_complex_numbers_in_safetensors(tmp_path):
  models = [{'z': np.complex64([1 + 2j, k - 1j])} for k in range(2)]
  paths = [
      checkpoints.save(tmp_path / f'{k}.safetensors', x)
      for k, x in enumerate(models)
  ]
  if 'C64' in safetensors._TYPES:  # Not in 0.5.
    by_others = safetensors.load_file(paths[0])
    np.testing.assert_array_equal(by_others['z'], models[0]['z'])
  soup = jaxsoup.uniform(checkpoints.Ingredients(paths))
  np.testing.assert_array_equal(soup.params['z'], [1 + 2j, 0.5 - 1j])


@pytest.mark.parametrize('dtype', [jnp.int4, jnp.float4_e2m1fn])
def test_dtypes_that_safetensors_lacks_are_named(tmp_path, dtype):
  params = {'body': {'w': jnp.ones(2, dtype)}}
  with pytest.raises(TypeError, match="'body/w' has dtype .*4.*Orbax"):
    checkpoints.save(tmp_path / 'a.safetensors', params)
  assert not list(tmp_path.iterdir())


# --- Averages -----------------------------------------------------------------


@pytest.mark.parametrize('writer', WRITERS)
@pytest.mark.parametrize('dtype', [np.float32, jnp.bfloat16])
def test_uniform_equals_numpy(tmp_path, writer, dtype, small_pieces):
  params = [params_of(k, dtype) for k in range(NUM)]
  paths = [WRITERS[writer](tmp_path, k, p) for k, p in enumerate(params)]
  soup = jaxsoup.uniform(checkpoints.Ingredients(paths))
  for x, y in zip(
      jax.tree.leaves(soup.params), jax.tree.leaves(mean_of(params))
  ):
    assert x.dtype == y.dtype
    np.testing.assert_allclose(
        np.asarray(x, np.float64),
        np.asarray(y, np.float64),
        rtol=1e-2 if dtype == jnp.bfloat16 else 1e-6,
        atol=1e-7,
    )
  assert_equal(soup.params, jaxsoup.uniform(params).params)


def test_formats_may_be_mixed(tmp_path, small_pieces):
  params = [params_of(k) for k in range(NUM)]
  paths = [
      w(tmp_path, k, p)
      for k, (w, p) in enumerate(zip(WRITERS.values(), params))
  ]
  soup = jaxsoup.uniform(checkpoints.Ingredients(paths))
  assert_equal(soup.params, jaxsoup.uniform(params).params)


@pytest.mark.parametrize('alpha', [None, [0.5, 0.0, 0.5], 'tree'])
def test_from_file_to_file_is_the_same(tmp_path, alpha, small_pieces):
  if alpha == 'tree':
    rows = {'body': [1, 0, 0], 'head': [0, 0, 1], 'scale': [0, 1, 0]}
    alpha = rows
  paths = [
      WRITERS['safetensors by others'](tmp_path, k, params_of(k))
      for k in range(NUM)
  ]
  ingredients = checkpoints.Ingredients(paths)
  path = checkpoints.save_average(
      tmp_path / 'new' / 'soup.safetensors',
      ingredients,
      alpha,
      metadata={'a': 1},
  )
  soup = (
      jaxsoup.uniform(ingredients)
      if alpha is None
      else jaxsoup.average(ingredients, alpha)
  )
  loaded = checkpoints.load(path)
  assert_equal(loaded.params, soup.params)
  jax.tree.map(np.testing.assert_array_equal, loaded.alpha, soup.alpha)
  own = checkpoints.provenance(path)
  assert own['metadata'] == {'a': 1} and len(own['ingredients']) == NUM
  assert own['content_hash'] == checkpoints.Ingredients([path]).content_hash(0)
  assert [p.name for p in (tmp_path / 'new').iterdir()] == ['soup.safetensors']


@pytest.mark.parametrize('axis_type', [AxisType.Auto, AxisType.Explicit])
@pytest.mark.parametrize('writer', WRITERS)
def test_each_shard_is_read_onto_its_device(
    tmp_path, writer, axis_type, small_pieces
):
  paths = [WRITERS[writer](tmp_path, k, params_of(k)) for k in range(NUM)]
  expected = jaxsoup.uniform(checkpoints.Ingredients(paths)).params
  for num in (4, 2, 1):
    mesh = jax.make_mesh(
        (num,), ('fsdp',), axis_types=(axis_type,), devices=jax.devices()[:num]
    )
    abstract = sharding.fsdp(
        jax.eval_shape(lambda: params_of(0)), mesh, min_size=0
    )
    ingredients = checkpoints.Ingredients(paths, abstract)
    assert_equal(ingredients[1], params_of(1))
    soup = jaxsoup.uniform(ingredients)
    assert_equal(soup.params, expected)
    for x, a in zip(jax.tree.leaves(soup.params), jax.tree.leaves(abstract)):
      assert x.sharding == a.sharding
  columns = NamedSharding(mesh, PartitionSpec(None, 'fsdp'))
  abstract['body']['kernel'] = jax.ShapeDtypeStruct(
      (24, 8), np.float32, sharding=columns
  )
  assert_equal(checkpoints.Ingredients(paths, abstract)[2], params_of(2))


@pytest.mark.parametrize(
    'saved_on, read_on', [(4, 2), (4, 1), (2, 4), (1, 4), (2, 1)]
)
def test_any_mesh_reads_what_another_wrote(tmp_path, saved_on, read_on):
  def on(num):
    mesh = jax.make_mesh(
        (num,),
        ('fsdp',),
        axis_types=(AxisType.Auto,),
        devices=jax.devices()[:num],
    )
    return sharding.fsdp(jax.eval_shape(lambda: params_of(0)), mesh, min_size=0)

  shardings = jax.tree.map(lambda x: x.sharding, on(saved_on))
  for name in ('orbax', 'file.safetensors'):
    path = checkpoints.save(
        tmp_path / name, jax.device_put(params_of(0), shardings)
    )
    params = checkpoints.Ingredients([path], on(read_on))[0]
    assert_equal(params, params_of(0))


def _save_all(tmp_path, writer, models):
  return checkpoints.Ingredients(
      [WRITERS[writer](tmp_path, k, p) for k, p in enumerate(models)]
  )


@pytest.mark.parametrize('writer', WRITERS)
def test_nan_is_named(tmp_path, writer, small_pieces):
  models = [params_of(k) for k in range(NUM)]
  models[1]['body']['kernel'][20, 3] = np.nan
  ingredients = _save_all(tmp_path, writer, models)
  with pytest.raises(ValueError, match="ingredient 1 .* in leaf 'body/kernel'"):
    jaxsoup.uniform(ingredients)


def test_a_sum_that_overflows_accuses_nobody(tmp_path):
  models = [
      {'w': np.full(3, 3e38, np.float32)},
      {'w': np.full(3, 2e38, np.float32)},
  ]
  with np.errstate(over='ignore'):
    soup = jaxsoup.uniform(_save_all(tmp_path, 'safetensors', models))
  assert np.isinf(np.asarray(soup.params['w'])).all()


@pytest.mark.parametrize('writer', WRITERS)
def test_duplicates_are_found(tmp_path, writer, small_pieces):
  ingredients = _save_all(tmp_path, writer, [params_of(k) for k in (0, 1, 0)])
  with pytest.warns(
      UserWarning, match='ingredient 0 .* and ingredient 2 .*equal'
  ):
    soup = jaxsoup.uniform(ingredients)
  assert soup.info.duplicates == ((0, 2),)


def test_leaves_that_are_not_floats(tmp_path):
  models = [params_of(k) for k in range(2)]
  models[1]['step'] = np.int32(8)
  ingredients = _save_all(tmp_path / 'state', 'safetensors', models)
  assert jaxsoup.uniform(ingredients).params['step'] == 7
  assert jaxsoup.average(ingredients, [0, 1]).params['step'] == 8
  for k, model in enumerate(models):
    model['codes'] = np.full((2, 2), k, np.int8)
  ingredients = _save_all(tmp_path / 'codes', 'safetensors', models)
  with pytest.raises(ValueError, match="leaf 'codes' of dtype int8 is .*1 1"):
    jaxsoup.uniform(ingredients)


def test_mismatches_are_named_before_anything_is_read(tmp_path, monkeypatch):
  models = [params_of(0), params_of(1) | {'more': np.ones(2, np.float32)}]
  ingredients = _save_all(tmp_path, 'safetensors', models)
  monkeypatch.setattr(_pieces, 'run', None)
  with pytest.raises(ValueError, match="leaf 'more' is unexpected"):
    jaxsoup.uniform(ingredients)


# --- Memory -------------------------------------------------------------------


def _peak_bytes(function) -> int:
  tracemalloc.start()
  try:
    function()
    return tracemalloc.get_traced_memory()[1]
  finally:
    tracemalloc.stop()


@pytest.mark.slow
def test_memory_is_that_of_one_model_whatever_their_number(
    tmp_path, monkeypatch
):
  monkeypatch.setattr(_pieces, '_PIECE_BYTES', 1 << 16)
  monkeypatch.setattr(_pieces, '_BUDGET_BYTES', 1 << 20)
  num_bytes = 4 * 1024 * 4096
  paths = []
  for k in range(8):
    w = np.random.default_rng(k).normal(size=(1024, 4096)).astype(np.float32)
    paths.append(save_by_others(tmp_path / f'{k}.safetensors', {'w': w}))
  del w

  def uniform(num):
    jaxsoup.uniform(checkpoints.Ingredients(paths[:num]))

  def to_file(num):
    checkpoints.save_average(
        tmp_path / f'soup{num}.safetensors',
        checkpoints.Ingredients(paths[:num]),
    )

  uniform(1), to_file(1)  # What is imported and compiled only once.
  for num in (2, 8):
    assert _peak_bytes(lambda n=num: uniform(n)) < 1.3 * num_bytes
    assert _peak_bytes(lambda n=num: to_file(n)) < 0.3 * num_bytes
