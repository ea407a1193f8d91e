"""Where a tree lies in an Orbax checkpoint, and what is said of it there."""

from collections.abc import Mapping
import re
from typing import Any
from typing import NamedTuple
from typing import TypeVar

from etils import epath

from jaxsoup import _files
from jaxsoup import _json
from jaxsoup import _tree
from jaxsoup.typing import Config
from jaxsoup.typing import Json

TREE_FILE = '_METADATA'
ROOT_FILE = '_CHECKPOINT_METADATA'
COMMITTED = 'commit_success.txt'
ARRAYS = 'array_metadatas'
METRICS = 'metrics'

_T = TypeVar('_T')


class Layout(NamedTuple):
  """Where a tree lies in an Orbax checkpoint, and what is said of it there.

  Attributes:
    root: the directory of the checkpoint or step; None without a source.
    item: the directory of the tree below it, such as 'default', or ''.
    step: where the root lies in its run, for a `CheckpointManager`; or ''.
    rows: the rows of `_METADATA`, by the path of their leaf.
    custom: what the owner stored with the tree.
    parts: if this is a whole step, the layouts of its items, by the first key
      of their leaves.
  """

  root: epath.Path | None = None
  item: str = ''
  step: str = ''
  rows: Mapping[_tree.Path, Json] = {}
  custom: Config | None = None
  parts: Mapping[str, 'Layout'] = {}

  @classmethod
  def of(cls, tree: epath.Path, content: Json) -> 'Layout':
    """That of a tree, whose `_METADATA` has this content."""
    is_root = (tree / ROOT_FILE).exists() or not (
        tree.parent / ROOT_FILE
    ).exists()
    root, item = (tree, '') if is_root else (tree.parent, tree.name)
    # Steps of a manager have an item; those of flax have a name of their own.
    pattern = r'checkpoint_\d+' if is_root else r'(.*[_-])?\d+'
    return cls(
        root=root,
        item=item,
        step=root.name if re.fullmatch(pattern, root.name) else '',
        rows={path_of(row): row for row in content['tree_metadata'].values()},
        custom=content.get('custom_metadata'),
    )

  def arrays(self) -> dict[str, Json]:
    """What `array_metadatas` says of each array, by its name."""
    folder = self.root and self.root / self.item / ARRAYS
    files = sorted(folder.iterdir()) if folder and folder.exists() else []
    rows = [
        row['array_metadata']
        for file in files
        for row in _json.parsed(file.read_bytes())['array_metadatas']
    ]
    return {row['param_name']: row for row in rows}

  def is_key(self, path: _tree.Path) -> bool:
    """Whether Orbax makes PRNG keys of an array of integers."""
    row = self.arrays().get('.'.join(path), {})
    return bool((row.get('ext_metadata') or {}).get('random_key_impl'))

  def items(self) -> list[epath.Path]:
    """The other directories of the step: further trees, JSON, iterators.

    Metrics are those of one model, and of no soup.
    """
    own = {self.item, *self.parts} - {''}
    if self.root is None or not own:
      return []
    others = (p for p in self.root.iterdir() if p.is_dir())
    return sorted(p for p in others if p.name not in {*own, METRICS})

  def trees(self, arrays: Mapping[_tree.Path, _T]) -> list[Any]:
    """Each tree: its layout, and its arrays by their path in it."""
    if not self.parts:
      return [(self, dict(arrays))]
    return [
        (part, {p[1:]: x for p, x in arrays.items() if p[0] == name})
        for name, part in self.parts.items()
    ]


BARE = Layout()


def path_of(row: Json) -> _tree.Path:
  """The path of a leaf, from its row in `_METADATA`."""
  return tuple(str(key['key']) for key in row['key_metadata'])


def finished(steps: Mapping[int, epath.Path]) -> dict[int, epath.Path]:
  """Steps whose writer was not stopped, by what Orbax writes at their end.

  Older versions write a file last only in buckets, and the oldest no time: on
  a disk a step without that file is unfinished where the time is missing.
  """
  marked = {n for n, path in steps.items() if (path / COMMITTED).exists()}
  return {
      n: path
      for n, path in steps.items()
      if not marked or n in marked or _has_ended(path)
  }


def _has_ended(step: epath.Path) -> bool:
  file = step / ROOT_FILE
  if _files.is_remote(step):
    return False
  if not file.exists():
    return True
  try:
    return _json.parsed(file.read_bytes())['commit_timestamp_nsecs'] is not None
  except (KeyError, TypeError, ValueError):
    return False


def is_tree(item: epath.Path) -> bool:
  """Whether an item of a step holds arrays, and not settings."""
  try:
    content = _json.parsed((item / TREE_FILE).read_bytes())
    rows = content['tree_metadata'].values()
    kinds = {row['value_metadata'].get('value_type') for row in rows}
  except (AttributeError, KeyError, OSError, TypeError, ValueError):
    return False
  return not kinds <= {'string', 'scalar'}


def is_text(row: Json) -> bool:
  """Whether a leaf is a string, which Orbax keeps apart from the arrays."""
  return row['value_metadata'].get('value_type') == 'string'


def is_empty(row: Json) -> bool:
  """Whether no array belongs to it: optax's `EmptyState`, a string."""
  return is_text(row) or bool(row['value_metadata'].get('skip_deserialize'))
