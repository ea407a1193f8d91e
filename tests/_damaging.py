"""A process that reads files with damage at random, in little memory.

python _damaging.py MODULE FOLDER NUM: `MODULE.read_all(path)` reads each file
of the folder NUM times, each time with other bits changed or an end cut off. In
a process of its own, because a crash would take the tests with it.
"""

import importlib
import pathlib
import resource
import subprocess
import sys
from typing import Any

from hypothesis import strategies as st
import numpy as np


def changed(content: bytes, data: Any) -> bytes:
  """A file with a few bytes that hypothesis changed, or without its end."""
  content = bytearray(content)
  where = st.integers(0, len(content) - 1)
  for place in data.draw(st.lists(where, max_size=4)):
    content[place] = data.draw(st.integers(0, 255))
  return bytes(content[: data.draw(st.none() | where)])


def survives(module: str, folder: pathlib.Path, num: int) -> None:
  """Raises unless the process ends well."""
  result = subprocess.run(
      [sys.executable, __file__, module, str(folder), str(num)],
      capture_output=True,
      text=True,
      cwd=pathlib.Path(__file__).parent,
      timeout=300,
  )
  assert result.stdout == 'survived\n', result.stderr[-3000:]


def main() -> None:
  module, folder, num = sys.argv[1:]
  read_all = importlib.import_module(module).read_all
  paths = sorted(pathlib.Path(folder).iterdir())
  for path in paths:  # Imports what it needs, before memory is limited.
    if path.name.startswith('whole'):
      read_all(path)
  used = int(pathlib.Path('/proc/self/statm').read_text().split()[0]) * 4096
  # Addresses, of which each thread that reads takes many.
  limit = used + (2 << 30)
  resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
  rng = np.random.default_rng(0)
  for path in paths:
    content = path.read_bytes()
    changed = path.with_name(path.name.replace(path.name.split('.')[0], 'new'))
    for _ in range(int(num)):
      new = np.frombuffer(content, np.uint8).copy()
      places = rng.integers(0, new.size, rng.integers(1, 5))
      new[places] ^= 1 << rng.integers(0, 8, places.size).astype(np.uint8)
      end = new.size if rng.random() < 0.8 else rng.integers(0, new.size)
      changed.write_bytes(new[:end].tobytes())
      read_all(changed)
  print('survived')


if __name__ == '__main__':
  main()
