"""How many bytes can still be used, on a device and on the host.

```
amount(free_bytes(jax.devices()[0]))
```
"""

from collections.abc import Iterator
from collections.abc import Sequence
import os
import pathlib

import jax


def amount(number: float, unit: str = 'B') -> str:
  """A number in three digits, and a prefix of its unit.

  Example:
    >>> amount(17_179_869_184), amount(58_520, ''), amount(4.51e13, 'FLOP')
    ('17.2 GB', '58.5 k', '45.1 TFLOP')
  """
  for prefix, size in zip('ZEPTGMk', (1e21, 1e18, 1e15, 1e12, 1e9, 1e6, 1e3)):
    if number >= 0.9995 * size:
      return f'{number / size:.3g} {prefix}{unit}'
  return f'{number:.0f} {unit}'.rstrip()


def free_bytes(device: jax.Device) -> int:
  """Bytes free on a device; of a CPU, in the host's memory."""
  stats = {} if device.platform == 'cpu' else device.memory_stats() or {}
  if 'bytes_limit' in stats:
    return stats['bytes_limit'] - stats.get('bytes_in_use', 0)
  return host_free_bytes()


def host_free_bytes(root: str | pathlib.Path = '/') -> int:
  """Bytes free on the host: the least that system and control groups allow.

  Where there is no `/proc` (macOS), all of the memory.
  """
  root = pathlib.Path(root)
  limits = [*_of_system(root), *_of_control_groups(root)]
  if limits:
    return max(0, min(limits))
  return os.sysconf('SC_PAGE_SIZE') * os.sysconf('SC_PHYS_PAGES')


def _of_system(root: pathlib.Path) -> Iterator[int]:
  for line in _lines(root / 'proc/meminfo'):
    if line.startswith('MemAvailable:'):
      yield int(line.split()[1]) * 1024


def _of_control_groups(root: pathlib.Path) -> Iterator[int]:
  mount = root / 'sys/fs/cgroup'
  for line in _lines(root / 'proc/self/cgroup'):
    _, controllers, path = line.split(':', 2)
    if not controllers:  # Version 2.
      names = 'memory.max', 'memory.current', 'inactive_file'
      yield from _of_folders(mount, path, names)
    elif 'memory' in controllers.split(','):
      limit, used = 'memory.limit_in_bytes', 'memory.usage_in_bytes'
      names = limit, used, 'total_inactive_file'
      yield from _of_folders(mount / 'memory', path, names)


def _of_folders(
    mount: pathlib.Path, path: str, names: Sequence[str]
) -> Iterator[int]:
  """Groups above limit it too; a container sees only the mount."""
  own = mount / path.strip('/')
  for folder in [own, *own.parents]:
    if mount not in (folder, *folder.parents):
      return
    limit, used = (_number(folder / name) for name in names[:2])
    if limit is not None and used is not None:
      # Cached files count as used, but make room when memory is needed.
      yield limit - used + _stat(folder / 'memory.stat', names[2])


def _number(path: pathlib.Path) -> int | None:
  text = ''.join(_lines(path)).strip()
  return int(text) if text.isdigit() else None  # 'max': unlimited.


def _stat(path: pathlib.Path, name: str) -> int:
  rows = (line.split() for line in _lines(path))
  return next((int(row[1]) for row in rows if row[:1] == [name]), 0)


def _lines(path: pathlib.Path) -> list[str]:
  try:
    return path.read_text().splitlines()
  except OSError:
    return []
