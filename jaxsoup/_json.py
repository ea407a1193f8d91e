"""Values as JSON can hold them."""

import json
import pathlib
from typing import Any

import numpy as np


def parsed(text: str | bytes, **options: Any) -> Any:
  """`json.loads`; whatever is wrong with the text is a ValueError."""
  try:
    return json.loads(text, **options)
  except RecursionError as e:
    raise ValueError('it is nested too deeply') from e


def read(path: pathlib.Path) -> Any:
  """The content of a JSON file; a ValueError names it."""
  try:
    return parsed(path.read_bytes())
  except ValueError as e:
    raise ValueError(f'{path} is not valid JSON: {e}.') from e


def plain(value: Any) -> Any:
  """What JSON can hold: lists for arrays, None for what is not finite."""
  if isinstance(value, dict):
    return {str(k): plain(x) for k, x in value.items()}
  if isinstance(value, (list, tuple)):
    return [plain(x) for x in value]
  if isinstance(value, np.ndarray):
    return plain(value.tolist())
  if isinstance(value, (float, np.floating)):
    return float(value) if np.isfinite(value) else None
  return value.item() if isinstance(value, np.generic) else value
