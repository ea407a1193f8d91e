"""Files of other libraries: npz, torch, safetensors; whole, and damaged."""

import io
import json
import pathlib
import pickle
import struct
import sys
import zipfile

import _damaging
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy

import jaxsoup
from jaxsoup import checkpoints

FORMATS = ('safetensors', 'npz', 'pth')


def arrays_of(k=0):
  rng = np.random.default_rng(k)
  normal = lambda *shape: rng.normal(size=shape).astype(np.float32)
  return {
      'blocks': {'0': {'kernel': normal(5, 3), 'bias': normal(3)}},
      'scale': normal(),
      'half': normal(4).astype(jnp.bfloat16),
      'step': np.asarray(7, np.int64),
      'empty': normal(0, 2),
  }


def named(tree, separator):
  flat, _ = jax.tree_util.tree_flatten_with_path(tree)
  return {separator.join(k.key for k in path): x for path, x in flat}


def to_torch(array):
  torch = pytest.importorskip('torch', reason='reads files of torch')
  if array.dtype == jnp.bfloat16:
    return torch.from_numpy(array.view(np.int16)).view(torch.bfloat16)
  return torch.from_numpy(array.copy())


def write(path, tree):
  """Writes a file as other libraries do."""
  if path.suffix == '.npz':
    np.savez(path, **named(tree, '/'))
  elif path.suffix == '.safetensors':
    arrays = {n: np.asarray(x) for n, x in named(tree, '.').items()}
    safetensors.numpy.save_file(arrays, path)
  else:
    torch = pytest.importorskip('torch', reason='reads files of torch')
    tensors = {n: to_torch(np.asarray(x)) for n, x in named(tree, '.').items()}
    torch.save(tensors, path)
  return path


def assert_same(arrays, expected):
  assert set(arrays) == set(expected)
  for name, x in expected.items():
    assert arrays.shapes[name].shape == x.shape
    assert arrays[name].dtype == arrays.shapes[name].dtype == x.dtype
    np.testing.assert_array_equal(arrays[name], x)


# --- Whole --------------------------------------------------------------------


@pytest.mark.parametrize('suffix', FORMATS)
def test_arrays_by_their_names(tmp_path, suffix):
  path = write(tmp_path / f'model.{suffix}', arrays_of())
  separator = '/' if suffix == 'npz' else '.'
  assert_same(checkpoints.Arrays(path), named(arrays_of(), separator))


@pytest.mark.parametrize('suffix', FORMATS)
def test_soup_of_files(tmp_path, suffix):
  trees = [arrays_of(k) for k in range(3)]
  paths = [
      write(tmp_path / f'{k}.{suffix}', tree) for k, tree in enumerate(trees)
  ]
  ingredients = checkpoints.Ingredients(paths)
  expected = jaxsoup.uniform(trees).params
  jax.tree.map(
      np.testing.assert_array_equal,
      jaxsoup.uniform(ingredients).params,
      jax.tree.map(np.asarray, expected),
  )
  out = tmp_path / 'soup.safetensors'
  checkpoints.save_average(out, ingredients)
  # In the dtypes of the files; jax alone has no 64-bit integers.
  expected = named(expected, '.') | {'step': trees[0]['step']}
  assert_same(checkpoints.Arrays(out), expected)
  stored = checkpoints.provenance(out)['ingredients']
  assert len({row['content_hash'] for row in stored} - {None}) == 3


@pytest.mark.parametrize('dtype', ['>f4', '<f8', '>i2', '?', 'u1', 'c8', 'f2'])
@pytest.mark.parametrize('order', 'CF')
@pytest.mark.parametrize('save', [np.savez, np.savez_compressed])
def test_npz(tmp_path, dtype, order, save):
  array = np.asarray(np.arange(24).reshape(2, 3, 4), dtype, order=order)
  save(tmp_path / 'x.npz', **{'a/b': array, 'a/c': array[0]})
  expected = {
      'a/b': array.astype(array.dtype.newbyteorder('=')),
      'a/c': array[0].astype(array.dtype.newbyteorder('=')),
  }
  assert_same(checkpoints.Arrays(tmp_path / 'x.npz'), expected)


@pytest.mark.parametrize('save', [np.savez, np.savez_compressed])
def test_large_npz_is_read_in_pieces(tmp_path, save):
  array = np.random.default_rng(0).integers(0, 9, (3_000, 512), np.int32)
  save(tmp_path / 'x.npz', x=array.astype(np.float32))
  params = checkpoints.Ingredients([tmp_path / 'x.npz'])[0]
  np.testing.assert_array_equal(params['x'], array)


def test_bfloat16_that_numpy_forgot(tmp_path):
  # As big_vision saves it: bytes without a meaning.
  array = np.arange(6, dtype=np.float32).astype(jnp.bfloat16)
  np.savez(tmp_path / 'x.npz', x=array.view('V2'))
  assert_same(checkpoints.Arrays(tmp_path / 'x.npz'), {'x': array})


@pytest.mark.parametrize('is_zip', [True, False])
def test_torch(tmp_path, is_zip):
  torch = pytest.importorskip('torch', reason='reads files of torch')
  kernel = torch.arange(12.0).reshape(3, 4)
  content = {
      'epoch': 3,
      'optimizer': {'state': {0: {'exp_avg': torch.ones(2)}}},
      'model': {
          'a.kernel': kernel.T,  # Not contiguous.
          'a.row': kernel[1],  # Shares its memory.
          'a.half': torch.nn.Parameter(kernel[0].half()),
          'a.bf16': kernel[:, 0].bfloat16(),
          'a.f8': kernel.to(torch.float8_e4m3fn),
          'a.conj': (kernel * 1j).conj(),
          'note': 'no tensor',
      },
  }
  if not is_zip:  # torch cannot read such files itself.
    del content['model']['a.f8']
  path = tmp_path / 'x.pt'
  torch.save(content, path, _use_new_zipfile_serialization=is_zip)
  x = kernel.numpy()
  expected = {
      'a.kernel': x.T,
      'a.row': x[1],
      'a.half': x[0].astype(np.float16),
      'a.bf16': x[:, 0].astype(jnp.bfloat16),
      'a.f8': x.astype(jnp.float8_e4m3fn),
      'a.conj': np.conj(x * 1j).astype(np.complex64),
  }
  expected = {n: expected[n] for n in expected if n in content['model']}
  assert_same(checkpoints.Arrays(path), expected)
  restored = checkpoints.Ingredients([path])[0]['a']['kernel']
  np.testing.assert_array_equal(restored, x.T)


def test_nested_dicts_of_torch(tmp_path):
  torch = pytest.importorskip('torch', reason='reads files of torch')
  content = {'student': {'w': torch.ones(2)}, 'teacher': {'w': torch.zeros(2)}}
  torch.save(content, tmp_path / 'x.bin')
  expected = {'student.w': np.ones(2, 'f4'), 'teacher.w': np.zeros(2, 'f4')}
  assert_same(checkpoints.Arrays(tmp_path / 'x.bin'), expected)


def test_without_torch(tmp_path, monkeypatch):
  (tmp_path / 'x.pth').write_bytes(b'PK')
  monkeypatch.setitem(sys.modules, 'torch', None)
  with pytest.raises(ImportError, match='x.pth .* not installed: `pip install'):
    checkpoints.Arrays(tmp_path / 'x.pth')


@pytest.mark.parametrize('view', ['T', 'columns', 'reversed', 'broadcast'])
def test_arrays_that_are_not_contiguous_are_written_whole(tmp_path, view):
  # safetensors 0.8 writes the memory of an array, whatever its strides.
  x = np.arange(12, dtype=np.float32).reshape(3, 4)
  x = {
      'T': x.T,
      'columns': x[:, ::2],
      'reversed': x[::-1],
      'broadcast': np.broadcast_to(x[0], (5, 4)),
  }[view]
  path = tmp_path / 'x.safetensors'
  checkpoints.save(path, {'w': x})
  read = safetensors.numpy.load_file(path)['w']
  np.testing.assert_array_equal(read, x)
  np.testing.assert_array_equal(checkpoints.Arrays(path)['w'], x)
  torch = pytest.importorskip('torch', reason='reads the file with torch')
  from safetensors import torch as safetensors_torch

  read = safetensors_torch.load_file(path)['w']
  assert torch.equal(read, torch.from_numpy(x.copy()))


# --- Damaged ------------------------------------------------------------------


def npz(**members):
  """An archive of any bytes."""
  buffer = io.BytesIO()
  with zipfile.ZipFile(buffer, 'w') as archive:
    for name, content in members.items():
      archive.writestr(f'{name}.npy', content)
  return buffer.getvalue()


def npy(header, data=b'', length=None):
  header = header.encode()
  length = len(header) if length is None else length
  return b'\x93NUMPY\x02\x00' + struct.pack('<I', length) + header + data


def st_file(header, data=b''):
  header = header if isinstance(header, bytes) else json.dumps(header).encode()
  return struct.pack('<Q', len(header)) + header + data


def row(dtype='F32', shape=(2,), offsets=(0, 8)):
  return {'dtype': dtype, 'shape': shape, 'data_offsets': offsets}


FLOATS = "{'descr': '<f4', 'fortran_order': False, 'shape': (%s,)}"
BROKEN = {
    'npz': [
        (b'', 'not a zip'),
        (b'PK\x03\x04', 'not a zip'),
        (npz(), 'no arrays'),
        (npz(x=b'no magic'), 'magic string is not correct'),
        (npz(x=npy(FLOATS % 3, b'12345678')), '8 bytes'),
        (npz(x=npy(FLOATS % 10**13)), 'has 0 bytes'),
        (npz(x=npy(FLOATS % -2)), 'has the shape'),
        (npz(x=npy(FLOATS % 2, b'12345678', 1 << 31)), 'expected 2147'),
        (
            npz(x=npy(FLOATS.replace('<f4', '<U2') % 1, bytes(8))),
            'not one of numbers',
        ),
        (npz(x=npy(FLOATS.replace('<f4', '|O') % 1)), 'pickled objects'),
        (npz(x=npy('(' * 9_000)), 'cannot be read'),
        (npz(x=npy("__import__('os').getcwd()")), 'cannot be read'),
        (npz(x=npy('{}')), 'correct keys'),
    ],
    'safetensors': [
        (b'', 'header declares'),
        (struct.pack('<Q', 1 << 62), 'header declares'),
        (struct.pack('<Q', 99_000_000), 'header declares'),
        (st_file(b'[' * 9_000), 'header is wrong'),
        (st_file({'a': row('F99')}, bytes(8)), "dtype 'F99', which is not"),
        (st_file({'a': row(shape=(3,))}, bytes(8)), 'has 8 bytes'),
        (st_file({'a': row(), 'b': row()}, bytes(8)), 'begins at 0'),
        (st_file({'a': row(offsets=(4, 12))}, bytes(12)), 'begins at 4'),
        (st_file({'a': row()}, bytes(9)), 'the file at 9'),
        (st_file({'a': row(shape=(-2,), offsets=(0, -8))}), 'bytes'),
        (st_file({'a': row(shape=(1 << 62,), offsets=(0, 1 << 64))}), 'the'),
        (st_file({'a': row(shape='22')}, bytes(8)), 'not a list'),
        (st_file({'a': row(offsets=(-8, 0))}, bytes(8)), 'header|begins'),
        (st_file({'a': row(offsets=(0, 1 << 60))}, bytes(8)), 'bytes'),
        (st_file({'a': row(offsets=None)}, bytes(8)), 'header'),
        (st_file({'a': 3}), 'header is wrong'),
        (st_file(b'\xff\xfe{}'), 'header is wrong'),
        (b'\x05', 'header declares'),
    ],
    'pth': [
        (b'', 'cannot be read'),
        (b'PK\x03\x04', 'cannot be read'),
        (pickle.dumps({'a': np.ones(2)}), 'x.pth'),
        (pickle.dumps(3), 'x.pth'),
        (bytes(range(256)) * 4, 'cannot be read'),
    ],
}


@pytest.mark.parametrize(
    'suffix, content, said',
    [(suffix, *case) for suffix, cases in BROKEN.items() for case in cases],
    ids=lambda x: '' if isinstance(x, bytes) else None,
)
def test_broken_files_are_named(tmp_path, suffix, content, said):
  if suffix == 'pth':
    pytest.importorskip('torch', reason='reads files of torch')
  path = tmp_path / f'x.{suffix}'
  path.write_bytes(content)
  with pytest.raises(ValueError, match=said) as e:
    checkpoints.Arrays(path)
  assert str(path) in str(e.value) and '\n' not in str(e.value)


def test_objects_in_npz_are_never_loaded(tmp_path):
  class Evil:

    def __reduce__(self):
      return pathlib.Path.touch, (tmp_path / 'ran',)

  np.savez(tmp_path / 'x.npz', a=np.asarray([Evil()], object))
  with pytest.raises(ValueError, match='pickled objects'):
    checkpoints.Arrays(tmp_path / 'x.npz')
  torch = pytest.importorskip('torch', reason='reads files of torch')
  torch.save({'a': torch.ones(2), 'b': Evil()}, tmp_path / 'x.pth')
  with pytest.raises(ValueError, match='would run code when it is loaded'):
    checkpoints.Arrays(tmp_path / 'x.pth')
  assert not (tmp_path / 'ran').exists()


def test_a_flipped_bit_in_a_compressed_array(tmp_path):
  path = tmp_path / 'x.npz'
  np.savez_compressed(path, x=np.random.default_rng(0).normal(size=999))
  content = bytearray(path.read_bytes())
  content[len(content) // 2] ^= 4
  path.write_bytes(content)
  with pytest.raises(ValueError, match='x.npz cannot be read'):
    checkpoints.Arrays(path)['x']


def test_a_file_that_shrinks(tmp_path):
  path = write(tmp_path / 'x.npz', {'a': np.ones(2000), 'b': np.ones(2)})
  arrays = checkpoints.Arrays(path)
  path.write_bytes(path.read_bytes()[:1000])
  with pytest.raises(ValueError, match='it ends too early'):
    arrays['a']


def read_all(path):
  """Reads a file, which is whole, or damaged in a way that is said."""
  try:
    arrays = checkpoints.Arrays(path)
    for name in arrays:
      arrays[name]
  except ValueError as e:
    assert str(path) in str(e)


def test_no_damage_crashes_or_takes_all_memory(tmp_path):
  for suffix in FORMATS:
    if suffix == 'pth':
      torch = pytest.importorskip('torch', reason='reads files of torch')
      content = {'a': torch.ones(3, 4), 'b': {'c': torch.ones(2).half()}}
      torch.save(content, tmp_path / 'whole.pth')
      old = tmp_path / 'whole.bin'
      torch.save(content, old, _use_new_zipfile_serialization=False)
    else:
      write(tmp_path / f'whole.{suffix}', arrays_of())
  bomb = npy(FLOATS % (1 << 30), b'')
  (tmp_path / 'bomb.npz').write_bytes(npz(x=bomb))
  _damaging.survives('arrays_test', tmp_path, 300)


@pytest.mark.parametrize(
    'own', ['[', '3', '[1]', '{"checksums": 3}', '{"checksums": {"a": 1}}']
)
def test_metadata_of_the_arrays_may_be_damaged(tmp_path, own):
  header = {'__metadata__': {'jaxsoup': own}, 'a': row()}
  path = tmp_path / 'x.safetensors'
  path.write_bytes(st_file(header, bytes(8)))
  with pytest.raises(ValueError, match='x.safetensors cannot be read'):
    checkpoints.Arrays(path)


@pytest.mark.parametrize('suffix', FORMATS)
def test_leaves_that_only_one_has_are_not_lost_in_silence(tmp_path, suffix):
  few = write(tmp_path / f'a.{suffix}', {'w': np.ones(2, 'f4')})
  more = {'w': np.ones(2, 'f4'), 'head': np.ones(3, 'f4')}
  more = write(tmp_path / f'b.{suffix}', more)
  ingredients = checkpoints.Ingredients([few, more])
  with pytest.raises(ValueError, match="'head' is unexpected"):
    checkpoints.save_average(tmp_path / 'soup.safetensors', ingredients)
