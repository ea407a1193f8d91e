"""Reads the files of an index of Hugging Face as one checkpoint."""

from collections.abc import Callable
from collections.abc import Iterator
import contextlib
import pathlib
import shutil

from jaxsoup import _json
from jaxsoup import _tree
from jaxsoup.checkpoints import _source

ENDING = '.index.json'


def open_source(
    path: pathlib.Path, open_fn: Callable[[pathlib.Path], _source.Source]
) -> _source.Source:
  """Opens an index, and with `open_fn` the files that it lists."""
  tensors: dict[str, tuple[_source.Source, _tree.Path]] = {}
  custom: dict[str, object] = {}
  files, sources = _files_of(path), {}
  for file, wanted in files.items():
    source = sources[file] = open_fn(file)
    names = {source.separator.join(p): p for p in source.metadata.leaves}
    if missing := sorted(wanted - names.keys()):
      raise _source.damaged(
          file, f'it lacks {missing[0]!r}, which {path.name} lists'
      )
    tensors |= {n: (source, p) for n, p in names.items() if n in wanted}
    custom |= source.metadata.custom
  paths = _source.paths_of(tensors, source.separator)
  parts = dict(zip(paths, tensors.values()))
  checksums = {
      _tree.name_of(p): source.metadata.checksums[_tree.name_of(place)]
      for p, (source, place) in parts.items()
      if source.metadata.checksums
  }
  if len(files) > 1:  # What we store with the arrays is for each file.
    custom.pop('jaxsoup', None)
    custom |= {'jaxsoup': {'checksums': checksums}} if checksums else {}
  metadata = _source.Metadata(
      str(path),
      {p: source.metadata.leaves[q] for p, (source, q) in parts.items()},
      custom,
      checksums,
      _source.state_of(path, *files),
  )

  @contextlib.contextmanager
  def patch(copy: pathlib.Path) -> Iterator[_source.PutFn]:
    with contextlib.ExitStack() as stack:
      puts = {}
      for file, source in sources.items():
        shutil.copyfile(file, copy.with_name(file.name))
        assert source.patch_fn is not None
        opened = source.patch_fn(copy.with_name(file.name))
        puts[id(source)] = stack.enter_context(opened)
      yield lambda p, *piece: puts[id(parts[p][0])](parts[p][1], *piece)

  can_patch = all(source.patch_fn for source in sources.values())
  return _source.Source(
      metadata,
      reader_fn=lambda p: parts[p][0].reader_fn(parts[p][1]),
      rows_fn=lambda p: parts[p][0].rows_fn(parts[p][1]),
      separator=source.separator,
      patch_fn=patch if can_patch else None,
  )


def _files_of(path: pathlib.Path) -> dict[pathlib.Path, set[str]]:
  """The tensors that an index expects, by file."""
  ending = path.name.removesuffix(ENDING)
  ending = ending[ending.rindex('.') :]
  try:
    weight_map = _json.parsed(path.read_bytes())['weight_map']
    files: dict[pathlib.Path, set[str]] = {}
    for name, file in weight_map.items():
      # The index is data: it may not name files elsewhere.
      if pathlib.PurePath(file).name != file:
        raise ValueError(f'{name!r} is in {file!r}, outside the directory')
      if not file.endswith(ending):
        raise ValueError(
            f'{name!r} is in {file!r}, which is not a {ending} file'
        )
      files.setdefault(path.parent / file, set()).add(name)
    missing = [str(file) for file in files if not file.is_file()]
  except (AttributeError, KeyError, OSError, TypeError, ValueError) as e:
    raise _source.damaged(path, e) from e
  if missing:
    raise _source.damaged(path, f'{", ".join(missing)} is missing')
  if not files:
    raise _source.damaged(path, 'it lists no arrays')
  return files
