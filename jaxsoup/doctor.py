"""Installed versions, and which of them do not work together.

```
doctor.examine()['problems']
```
"""

import importlib.metadata
import platform
from typing import Any

import jaxsoup

_PACKAGES = (
    'jaxsoup',
    'jax',
    'jaxlib',
    'flax',
    'optax',
    'orbax-checkpoint',
    'grain',
    'tensorstore',
    'numpy',
    'ml_collections',
    'tensorflow-datasets',
    'safetensors',
    'scikit-learn',
    'mlxtend',
    'matplotlib',
)
_OPTIONAL = ('scikit-learn', 'mlxtend', 'matplotlib')


def examine() -> dict[str, Any]:
  """Looks at versions and devices.

  Returns:
    A dict of `python`, `versions` (None where a package is missing), `devices`
    and `problems`, each a text that says what to do.
  """
  versions = {name: _version(name) for name in _PACKAGES}
  problems = [
      f'{name} is not installed: pip install -U jaxsoup'
      for name, version in versions.items()
      if version is None and name not in _OPTIONAL
  ]
  problems += _clashes(versions)
  devices: list[str] = []
  if versions['jax'] and versions['jaxlib']:
    devices, trouble = _devices()
    problems += trouble
  return {
      'python': platform.python_version(),
      'versions': versions,
      'devices': devices,
      'problems': problems,
  }


def as_text(summary: dict[str, Any]) -> str:
  """The result of `examine` as lines for a terminal."""
  lines = [f'python               {summary["python"]}']
  for name, version in summary['versions'].items():
    lines.append(f'{name:<20} {version or "not installed"}')
  lines.append(
      f'devices              {", ".join(summary["devices"]) or "none"}'
  )
  problems = [f'Problem: {problem}' for problem in summary['problems']]
  return '\n'.join([*lines, *(problems or ['No problems found.'])])


def _version(name: str) -> str | None:
  if name == 'jaxsoup':
    return jaxsoup.__version__  # Perhaps from a checkout.
  try:
    return importlib.metadata.version(name)
  except importlib.metadata.PackageNotFoundError:
    return None


def _numbers(version: str | None) -> tuple[int, ...]:
  parts = (version or '').split('.')
  return tuple(int(p) for p in parts if p.isdigit())


def _clashes(versions: dict[str, str | None]) -> list[str]:
  """What no package's metadata forbids."""
  jax, flax = _numbers(versions['jax']), _numbers(versions['flax'])
  if jax < (0, 11, 1) or not flax or flax > (0, 12, 8):
    return []
  return [
      f'flax {versions["flax"]} fails to import with jax {versions["jax"]}: '
      'pip install -U flax (Python 3.12 or later), or pip install "jax<0.11"'
  ]


def _devices() -> tuple[list[str], list[str]]:
  try:
    import jax

    kinds = [f'{d.platform}: {d.device_kind}' for d in jax.devices()]
    counted = dict.fromkeys(kinds)
    return [f'{kinds.count(k)} x {k}' for k in counted], []
  except Exception as e:
    # Show whatever a broken installation raises.
    first = str(e).strip().split('\n')[0]
    return [], [f'jax finds no device: {type(e).__name__}: {first}']
