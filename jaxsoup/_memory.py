"""How many bytes can still be used, on a device and on the host.

```
amount(free_bytes(jax.devices()[0]))
```
"""

from collections.abc import Iterator
import os
import pathlib

import jax

# Of control groups of version 2, which have no controllers in their paths, and
# of version 1: limit, usage, and what a row of `memory.stat` is called.
_GROUP_FILES = {
    '': ('memory.max', 'memory.current', 'inactive_file'),
    'memory': (
        'memory.limit_in_bytes',
        'memory.usage_in_bytes',
        'total_inactive_file',
    ),
}


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
  of_system = _numbers(root / 'proc/meminfo')
  limits = [1024 * n for name, n in of_system.items() if name == 'MemAvailable']
  limits += _of_control_groups(root)
  if limits:
    return max(0, min(limits))
  return os.sysconf('SC_PAGE_SIZE') * os.sysconf('SC_PHYS_PAGES')


def _of_control_groups(root: pathlib.Path) -> Iterator[int]:
  for line in _lines(root / 'proc/self/cgroup'):
    _, controllers, path = line.split(':', 2)
    for controller in _GROUP_FILES.keys() & controllers.split(','):
      limit, usage, cached = _GROUP_FILES[controller]
      mount = root / 'sys/fs/cgroup' / controller
      own = mount / path.strip('/')
      # Groups above limit it too; a container sees only the mount.
      for folder in [own, *own.parents]:
        most, used = (_numbers(folder / name) for name in (limit, usage))
        # It is no number where it is 'max', unlimited.
        if folder.is_relative_to(mount) and most and used:
          # Cached files count as used, but make room when memory is needed.
          free = _numbers(folder / 'memory.stat').get(cached, 0)
          yield most[''] - used[''] + free


def _numbers(path: pathlib.Path) -> dict[str, int]:
  """The number of each line by what is before it: `name: 12 kB`, `name 12`."""
  rows = (line.removesuffix(' kB').rpartition(' ') for line in _lines(path))
  return {name.strip(' :'): int(n) for name, _, n in rows if n.isdigit()}


def _lines(path: pathlib.Path) -> list[str]:
  try:
    return path.read_text().splitlines()
  except OSError:
    return []
