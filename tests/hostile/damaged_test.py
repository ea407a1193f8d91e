"""Files that are damaged, or made to mislead: an error says what is wrong."""

import json
import os
import pathlib
import struct
import zipfile

import numpy as np
import orbax.checkpoint as ocp
import pytest
import safetensors.numpy
from typer import testing

import jaxsoup
from jaxsoup import checkpoints
from jaxsoup import cli

DEEP = '{"a":' * 50_000 + '1' + '}' * 50_000


def _safetensors(header, body=bytes(8)):
  text = header if isinstance(header, str) else json.dumps(header)
  return struct.pack('<Q', len(text)) + text.encode() + body


def _row(shape, end=8, **more):
  return {'dtype': 'F32', 'shape': shape, 'data_offsets': [0, end], **more}


ROW = json.dumps(_row([2]))
FILES = {
    'fractional shape': (
        _safetensors({'w': _row([2.0])}),
        'its header is wrong',
    ),
    'half an entry': (_safetensors({'w': _row([2.5])}), 'its header is wrong'),
    'repeated name': (
        _safetensors(f'{{"w": {ROW}, "w": {ROW}}}'),
        'two of its entries have the same name',
    ),
    'deep header': (_safetensors(DEEP), 'it is nested too deeply'),
    'deep metadata': (
        _safetensors({'__metadata__': {'jaxsoup': DEEP}, 'w': _row([2])}),
        'it is nested too deeply',
    ),
    'list': (_safetensors([1]), 'its header is wrong'),
    'metadata is a list': (
        _safetensors({'__metadata__': [1], 'w': _row([2])}),
        'its header is wrong',
    ),
    'no arrays': (_safetensors({}, b''), 'it holds no arrays'),
    'offsets that are fractions': (
        _safetensors({'w': _row([2], 8.0)}),
        '[0, 8.0] are not integers',
    ),
    'offsets without end': (
        _safetensors(ROW.join(['{"w": ', '}']).replace('8', '1e999')),
        '[0, inf] are not integers',
    ),
    'a shape with true': (
        _safetensors({'w': _row([True, 2])}),
        '[True, 2] are not integers',
    ),
    'metadata that are no text': (
        _safetensors({'__metadata__': {'a': {'b': 1}}, 'w': _row([2])}),
        'its metadata are not all strings',
    ),
    'too many axes': (
        _safetensors({'w': _row([1] * 70 + [2])}),
        'which no array can have',
    ),
    'empty, and too large': (
        _safetensors({'w': _row([0, 2**62, 2**62], 0)}, b''),
        'which no array can have',
    ),
    'what is stored is no object': (
        _safetensors({'__metadata__': {'jaxsoup': '[]'}, 'w': _row([2])}),
        'what is stored with it is not a JSON object',
    ),
    'what is stored has another type': (
        _safetensors(
            {
                '__metadata__': {'jaxsoup': '{"metadata": 7}'},
                'w': _row([2]),
            }
        ),
        "its entry metadata is '7'",
    ),
    'another name': (
        _safetensors(
            {
                '__metadata__': {'jaxsoup': '{"checksums": {"v": "0"}}'},
                'w': _row([2]),
            }
        ),
        "'w' is not among its checksums",
    ),
}


def inspect(path):
  result = testing.CliRunner().invoke(cli.app, ['inspect', str(path)])
  assert 'Traceback' not in result.output
  return result.exit_code, ' '.join(result.output.split())


@pytest.mark.parametrize('name', FILES)
def test_safetensors(tmp_path, name):
  content, words = FILES[name]
  path = tmp_path / 'x.safetensors'
  path.write_bytes(content)
  code, said = inspect(path)
  assert code == 1 and str(path) in said and words in said


def test_a_changed_name_of_our_own_file(tmp_path):
  path = tmp_path / 'x.safetensors'
  checkpoints.save(path, {'head': np.ones(2, np.float32)})
  content = path.read_bytes()
  begin = content.index(b'"head":')
  path.write_bytes(content[:begin] + b'"hEad"' + content[begin + 6 :])
  code, said = inspect(path)
  assert code == 1 and "'hEad' is not among its checksums" in said


INDICES = {
    '{"weight_map": {}}': 'it lists no arrays',
    '{"weight_map": {"w": ""}}': "'w' is in '', which is not a .safetensors",
    '{"weight_map": {"w": ".."}}': "'w' is in '..', which is not a .safe",
    '{"weight_map": {"w": "a.py"}}': "'w' is in 'a.py', which is not a .safe",
    f'{{"weight_map": {{"w": "{"a" * 300}.safetensors"}}}}': 'too long',
    DEEP: 'it is nested too deeply',
}


@pytest.mark.parametrize('content', INDICES, ids=INDICES.values())
def test_indices(tmp_path, content):
  path = tmp_path / 'x.safetensors.index.json'
  path.write_text(content)
  code, said = inspect(path)
  assert code == 1 and str(path) in said and INDICES[content] in said


def test_an_archive_that_would_fill_the_memory(tmp_path, monkeypatch):
  path = tmp_path / 'x.npz'
  np.savez_compressed(path, w=np.zeros(100_000, np.float32))
  assert inspect(path)[0] == 0
  monkeypatch.setattr('jaxsoup.checkpoints._source._MOST_UNPACKED', 1000)
  code, said = inspect(path)
  assert code == 1 and 'bytes would become 400,128 when they are' in said


def test_long_doubles(tmp_path):
  path = tmp_path / 'x.npz'
  np.savez(path, w=np.ones(3, np.longdouble))
  code, said = inspect(path)
  assert code == 1 and 'dtype float128 is not one of numbers' in said


def _within_itself():
  content = {}
  content['model'] = content
  return content


def _within_a_leaf():
  content = {'a': {}}
  content['a']['b'] = content
  return content


def _doubled():
  content = {}
  for _ in range(50):
    content = {'a': content, 'b': content}
  return content


@pytest.mark.reference
@pytest.mark.parametrize('make', [_within_itself, _within_a_leaf, _doubled])
def test_dicts_that_contain_one_another(tmp_path, monkeypatch, make):
  torch = pytest.importorskip('torch', reason='reads files of torch')
  monkeypatch.setattr('jaxsoup.checkpoints._torch._MOST_ENTRIES', 1000)
  torch.save(make(), tmp_path / 'x.pth')
  code, said = inspect(tmp_path / 'x.pth')
  assert code == 1 and 'its dicts contain one another' in said


@pytest.mark.reference
def test_a_file_of_torch_that_was_compressed(tmp_path):
  torch = pytest.importorskip('torch', reason='reads files of torch')
  torch.save({'w': torch.full((100,), 3.0)}, tmp_path / 'x.pth')
  with (
      zipfile.ZipFile(tmp_path / 'x.pth') as old,
      zipfile.ZipFile(tmp_path / 'y.pth', 'w', zipfile.ZIP_DEFLATED) as new,
  ):
    for name in old.namelist():
      new.writestr(name, old.read(name))
  params = checkpoints.Ingredients([tmp_path / 'y.pth'])[0]
  assert params['w'].tolist() == [3.0] * 100


@pytest.mark.reference
def test_two_tensors_of_torch_with_one_name(tmp_path):
  torch = pytest.importorskip('torch', reason='reads files of torch')
  torch.save({1: torch.ones(2), '1': torch.zeros(2)}, tmp_path / 'x.pth')
  code, said = inspect(tmp_path / 'x.pth')
  assert code == 1 and 'two of its tensors have the same name' in said


def test_structs_are_not_bfloat16(tmp_path):
  path = tmp_path / 'x.npz'
  np.savez(path, w=np.zeros(3, [('a', 'u1'), ('b', 'u1')]))
  code, said = inspect(path)
  assert (
      code == 1 and "array 'w': dtype" in said and 'not one of numbers' in said
  )


@pytest.mark.parametrize('name', ['fifo', 'fifo.safetensors', 'fifo.npz'])
def test_a_pipe_does_not_hang(tmp_path, name):
  os.mkfifo(tmp_path / name)
  code, said = inspect(tmp_path / name)
  assert code == 1 and 'seems to be a pipe or a device, which is not' in said


@pytest.mark.parametrize(
    'name', ['model.safetensors', 'model.safetensors.index.json']
)
def test_a_pipe_in_a_directory_does_not_hang(tmp_path, name):
  os.mkfifo(tmp_path / name)
  code, said = inspect(tmp_path)
  assert code == 1 and 'holds no Orbax checkpoint' in said


def test_more_axes_than_orbax_stores(tmp_path):
  with pytest.raises(ValueError, match="Leaf 'w' has 33 axes"):
    checkpoints.save(tmp_path / 'x', {'w': np.ones([1] * 33, np.float32)})


def test_directories_that_link_to_themselves(tmp_path):
  (tmp_path / 'run' / 'a').mkdir(parents=True)
  for name in ('b', 'a/c'):
    (tmp_path / 'run' / name).symlink_to('.')
  code, said = inspect(tmp_path / 'run')
  assert code == 1 and 'holds no Orbax checkpoint' in said


def test_too_many_directories(tmp_path, monkeypatch):
  monkeypatch.setattr('jaxsoup.checkpoints._orbax._MOST_DIRECTORIES', 20)
  for i in range(30):
    (tmp_path / f'd{i}').mkdir()
  code, said = inspect(tmp_path)
  assert code == 1 and 'no checkpoint in the first 20 directories' in said


@pytest.mark.parametrize('address', ['gs://b/x', 's3://b', 'https://a/b.npz'])
def test_addresses_are_no_local_paths(tmp_path, monkeypatch, address):
  monkeypatch.chdir(tmp_path)
  of_runs = [
      ['inspect', address],
      ['soup', 'model-stock', 'a', '--init', address, '--out', 'c'],
  ]
  if not address.startswith('https'):  # Runs may be in a bucket.
    of_runs = []
  for command in (
      *of_runs,
      ['soup', 'uniform', 'a', 'b', '--out', address],
      ['soup', 'greedy', 'a', '--eval', 'a:b', '--scores', address],
      ['diagnose', 'a', 'b', '--init', address],
      ['diagnose', 'a', 'b', '--report', address],
      ['convert', address, 'b'],
      ['convert', 'a', address],
      ['convert', 'a', 'b', '--like', address],
      ['report', address],
      ['report', 'a', '--out', address],
      ['plan', '--config', address, '--devices', '1'],
      ['plan', '--config', 'a', '--devices', '1', '--json', address],
      ['demo', '--workdir', address],
  ):
    result = testing.CliRunner().invoke(cli.app, command)
    said = ' '.join(result.output.replace('│', ' ').split())
    assert result.exit_code == 2 and f'{address} is an address' in said
  assert not os.listdir()


def test_deep_json_beside_weights(tmp_path):
  path = tmp_path / 'model'
  checkpoints.save(path / 'model.safetensors', {'w': np.ones(2, np.float32)})
  (path / 'config.json').write_text(DEEP)
  result = testing.CliRunner().invoke(
      cli.app,
      ['soup', 'uniform', str(path), str(path), '--out', str(tmp_path / 'o')],
  )
  assert result.exit_code == 1 and 'nested too deeply' in result.output
  assert not (tmp_path / 'o').exists()


@pytest.mark.parametrize(
    'name, content, words',
    [
        ('s.csv', 'held_out,test\n' + 'x' * 200_000 + ',1\n', 'not valid CSV'),
        (
            's.csv',
            'held_out,test\n\xff,1\n'.encode('latin1'),
            'not text in UTF-8',
        ),
        ('s.csv', 'held_out,test,test\n1,1,1\n', "column 'test' twice"),
        ('s.csv', 'held_out,test\n1\n', 'Give each row one for each column'),
        ('s.jsonl', '{"held_out": 1, "held_out": 0}', "'held_out' twice"),
        ('s.jsonl', '{"a": {"b": 1}, "a.b": 0}', "column 'a.b' twice"),
        ('s.jsonl', f'{{"lr": {"9" * 400}}}', 'lr is too large'),
        ('s.jsonl', '{"a":' * 99 + '1' + '}' * 99, 'is nested too deeply'),
        ('s.jsonl', DEEP, 's.jsonl:1 is not valid JSON: it is nested'),
        ('s.json', DEEP, 's.json is not valid JSON: it is nested'),
    ],
)
def test_scores(tmp_path, name, content, words):
  if isinstance(content, str):
    content = content.encode()
  (tmp_path / name).write_bytes(content)
  result = testing.CliRunner().invoke(cli.app, ['report', str(tmp_path / name)])
  assert result.exit_code == 1 and words in result.output


@pytest.mark.parametrize('content', ['null', '[]', '{"rows": []}', DEEP])
def test_results(tmp_path, content):
  (tmp_path / 'results.json').write_text(content)
  result = testing.CliRunner().invoke(cli.app, ['report', str(tmp_path)])
  said = ' '.join(result.output.split())
  assert result.exit_code == 1 and 'Run the command of the exp' in said


def test_a_step_without_the_mark_of_orbax(tmp_path):
  path = tmp_path / 'run'
  with ocp.CheckpointManager(path) as manager:
    for step in (1, 2):
      params = {'w': np.full(2, step, np.float32)}
      manager.save(step, args=ocp.args.StandardSave(params))
  read = lambda: checkpoints.Ingredients([path])[0]['w'].tolist()
  assert read() == [2, 2]
  for step in (1, 2):
    (path / str(step) / 'commit_success.txt').touch()
  assert read() == [2, 2]
  (path / '2' / 'commit_success.txt').unlink()
  # As an older Orbax ends a step on a disk.
  assert read() == [2, 2] and list(checkpoints.steps(path)) == [1, 2]
  # As it begins one.
  file = path / '2' / '_CHECKPOINT_METADATA'
  content = json.loads(file.read_bytes())
  file.write_text(json.dumps({**content, 'commit_timestamp_nsecs': None}))
  assert read() == [1, 1] and list(checkpoints.steps(path)) == [1]


@pytest.mark.parametrize('ending', ['.safetensors', '.npz'])
def test_an_ingredient_that_changes_in_its_place(tmp_path, ending):
  # Its scores would be those of other values than the soup's.
  paths = [tmp_path / f'{k}{ending}' for k in range(2)]
  save = safetensors.numpy.save_file if ending == '.safetensors' else None
  for k, path in enumerate(paths):
    arrays = {'w': np.full(4, k, np.float32)}
    save(arrays, path) if save else np.savez(path, **arrays)
  scored = []

  def score(params):
    scored.append(params)
    if len(scored) == 2:
      content = paths[0].read_bytes()
      with paths[0].open('rb+') as file:  # Of the same size, as rsync would.
        begin = content.rindex(np.zeros(4, np.float32).tobytes())
        file.seek(begin)
        file.write(np.float32([5]).tobytes())
    return float(params['w'].sum())

  words = f"Leaf 'w' of {paths[0]} changed while it was in use"
  with pytest.raises(ValueError, match=words):
    jaxsoup.greedy(checkpoints.Ingredients(paths), score)


@pytest.mark.parametrize(
    'path, words',
    [
        ('a' * 300, 'file name too long. Give a shorter name.'),
        ('a/x', 'ive another path.'),
        ('a\udcff', 'has characters that no path can have'),
    ],
)
def test_paths_that_cannot_be(tmp_path, monkeypatch, path, words):
  monkeypatch.chdir(tmp_path)
  (tmp_path / 'a').write_text('mine')
  for command in (
      ['inspect', path],
      ['convert', path, 'b'],
      ['soup', 'uniform', path, path, '--out', 'b'],
      ['soup', 'uniform', 'm', 'm', '--out', path],
  ):
    result = testing.CliRunner().invoke(cli.app, command)
    said = ' '.join(result.output.replace('│', ' ').split())
    assert result.exit_code in (1, 2) and words in said
  assert os.listdir() == ['a']


@pytest.mark.parametrize(
    'content',
    ['null', '[]', '5', '{"files": 5}', '{"files": {"../a": "x"}}', DEEP],
)
def test_what_is_stored_about_a_soup_is_something_else(directory, content):
  sidecar = pathlib.Path(directory) / 'soup.json'
  sidecar.write_text(content)
  code, said = inspect_deep(directory)
  assert code == 1 and str(sidecar) in said and 'estore it from a copy' in said


@pytest.fixture
def directory(tmp_path):
  """A soup like a directory of Hugging Face, which it was made of."""
  for name in ('a', 'b'):
    (tmp_path / name).mkdir()
    arrays = {'w': np.ones(3, np.float32)}
    safetensors.numpy.save_file(arrays, tmp_path / name / 'model.safetensors')
    (tmp_path / name / 'config.json').write_text('{"model_type": "mine"}')
    (tmp_path / name / 'tokenizer.json').write_text('{}')
  ingredients = checkpoints.Ingredients([tmp_path / 'a', tmp_path / 'b'])
  with pytest.warns(UserWarning, match='equal parameters'):
    return checkpoints.save_directory(tmp_path / 'soup', ingredients)


def inspect_deep(path):
  result = testing.CliRunner().invoke(cli.app, ['inspect', '--deep', str(path)])
  return result.exit_code, ' '.join(result.output.split())


def test_what_is_stored_about_a_soup_was_changed(directory):
  code, said = inspect_deep(directory)
  assert code == 0 and 'Not verified' not in said
  sidecar = pathlib.Path(directory) / 'soup.json'
  content = json.loads(sidecar.read_text())
  assert content['alpha']['items'] == [0.5, 0.5]
  content['alpha']['items'][0] = 0.6
  sidecar.write_text(json.dumps(content))
  with pytest.raises(ValueError, match=f'{sidecar} is not valid: .* changed'):
    checkpoints.load(directory)
  code, said = inspect_deep(directory)
  assert code == 1 and f'{sidecar} is not valid' in said


@pytest.mark.parametrize('name', ['config.json', 'tokenizer.json'])
def test_another_file_of_a_soup_was_changed(directory, name):
  file = pathlib.Path(directory) / name
  file.write_text('{"model_type": "yours"}')
  code, said = inspect_deep(directory)
  assert code == 1 and f'{file} was changed after the soup was written' in said
  file.unlink()
  code, said = inspect_deep(directory)
  assert code == 1 and f'{file} was changed' in said


def test_what_cannot_be_verified_is_listed(directory):
  code, said = inspect_deep(pathlib.Path(directory).parent / 'a')
  assert code == 0
  assert "a/model.safetensors: no checksums of 'w' are stored there" in said
  assert 'a: no checksums of config.json, tokenizer.json' in said
