"""Values as JSON can hold them."""

import hashlib
import json
import pathlib
from typing import Any

import numpy as np

from jaxsoup import _files
from jaxsoup.typing import Config
from jaxsoup.typing import Json

_CHECKSUM = 'checksum'
_PREFIX = 'blake2b:'


def parsed(text: str | bytes, **options: Any) -> Any:
  """`json.loads`; whatever is wrong with the text is a ValueError."""
  try:
    return json.loads(text, **options)
  except RecursionError as e:
    raise ValueError('it is nested too deeply') from e


def read(path: pathlib.Path) -> Any:
  """The content of a JSON file, sealed or not; a ValueError names it."""
  try:
    content = parsed(path.read_bytes())
    return unsealed(content) if isinstance(content, dict) else content
  except ValueError as e:
    raise ValueError(
        f'{path} is not valid: {e}. Restore it from a copy.'
    ) from e


def write(path: Any, content: Any, indent: int | None = 1) -> None:
  """Writes a JSON file, which is there when it is complete."""
  path.parent.mkdir(parents=True, exist_ok=True)
  with _files.replaced(path) as unfinished:
    unfinished.write_text(json.dumps(content, indent=indent))


def sealed(content: Config) -> Json:
  """A JSON object with a checksum of it."""
  content = json.loads(json.dumps(content))  # As it will be read.
  return {**content, _CHECKSUM: _hash(content)}


def unsealed(content: Config) -> Json:
  """The same without its checksum; a ValueError if it was changed.

  What has none, of another program or an older version, is returned as it is.
  """
  rest = {key: value for key, value in content.items() if key != _CHECKSUM}
  stored = content.get(_CHECKSUM)
  if not str(stored).startswith(_PREFIX):
    return dict(content)
  if stored != (actual := _hash(rest)):
    raise ValueError(
        f'it was changed after it was written: its checksum is {actual}, but '
        f'{stored} was stored with it'
    )
  return rest


def _hash(content: Config) -> str:
  text = json.dumps(content, sort_keys=True).encode()
  return f'{_PREFIX}{hashlib.blake2b(text, digest_size=16).hexdigest()}'


def plain(value: Any) -> Any:
  """As JSON: NamedTuples are dicts, arrays lists, what is not finite None."""
  value = value._asdict() if hasattr(value, '_asdict') else value
  if isinstance(value, dict):
    return {str(k): plain(x) for k, x in value.items()}
  if isinstance(value, (list, tuple)):
    return [plain(x) for x in value]
  if isinstance(value, np.ndarray):
    return plain(value.tolist())
  if isinstance(value, (float, np.floating)):
    return float(value) if np.isfinite(value) else None
  return value.item() if isinstance(value, np.generic) else value
