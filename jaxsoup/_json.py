"""Values as JSON can hold them."""

from typing import Any

import numpy as np


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
