"""Warnings that point at the line of the caller."""

import pathlib
import sys
import warnings

_PACKAGE = str(pathlib.Path(__file__).parent)


def warn(message: str) -> None:
  """A `UserWarning` at the first frame that is not of this package."""
  level, frame = 1, sys._getframe()
  while frame.f_back and frame.f_code.co_filename.startswith(_PACKAGE):
    level, frame = level + 1, frame.f_back
  warnings.warn(message, stacklevel=level)
