"""What a compiled program communicates, and what a traced one multiplies.

```
hlo.collectives_of(compiled.as_text())['all-reduce'].num_bytes
hlo.flops_of(traced.jaxpr.jaxpr)
```
"""

from collections.abc import Iterator
import math
import re
from typing import Any
from typing import NamedTuple

from jax.extend import core
import numpy as np

_COLLECTIVE = re.compile(
    r' = (.*?) (all-gather|all-reduce|reduce-scatter|all-to-all|'
    r'collective-permute|collective-broadcast)(?:-start)?\('
)
_COMPUTATION = re.compile(r'(ENTRY )?%?([\w.-]+) (?:\(.*)?\{$')
_CALLED = re.compile(
    r'(?:body|calls|to_apply|true_computation|false_computation)=%?([\w.-]+)'
)
_BRANCHES = re.compile(r'branch_computations=\{([^}]*)\}')
_SHAPE = re.compile(r'\b(pred|[a-z]+(\d+)\w*)\[([\d,]*)\]')


class Traffic(NamedTuple):
  """How often a collective runs, and the bytes of all its results."""

  times: int
  num_bytes: int


def collectives_of(text: str) -> dict[str, Traffic]:
  """The collectives of a program, those in loops as often as these run.

  Args:
    text: of a compiled program.

  Returns:
    By name. An asynchronous one, which the compiler splits into parts that
    share a channel, counts once.

  Example:
    >>> text = '''ENTRY %main (p: f32[2]) -> f32[4] {
    ...   %p = f32[2]{0} parameter(0)
    ...   ROOT %g = f32[4]{0} all-gather(%p), channel_id=1, dimensions={0}
    ... }'''
    >>> collectives_of(text)
    {'all-gather': Traffic(times=1, num_bytes=16)}
  """
  entry, computations = _computations(text)
  # By channel: the parts of one asynchronous collective share it.
  by_channel: dict[Any, tuple[str, int, int]] = {}
  for times, line in _executed(entry, computations, 1):
    match = _COLLECTIVE.search(line)
    if match is None:
      continue
    shapes, name = match.groups()
    sizes = [
        math.prod(map(int, filter(None, dimensions.split(','))))
        * max(1, int(bits or 8) // 8)
        for _, bits, dimensions in _SHAPE.findall(shapes)
    ]
    # The start of an asynchronous one returns its operand as well.
    is_start = f'{name}-start(' in line and name != 'all-reduce'
    size = max(sizes, default=0) if is_start else sum(sizes)
    channel = re.search(r'channel_id=(\d+)', line)
    key = channel[1] if channel else line
    before = by_channel.get(key, (name, 0, 0))
    by_channel[key] = name, max(before[1], times), max(before[2], size)
  traffic: dict[str, Traffic] = {}
  for name, times, size in by_channel.values():
    before_times, num_bytes = traffic.get(name, (0, 0))
    traffic[name] = Traffic(before_times + times, num_bytes + times * size)
  return traffic


def _computations(text: str) -> tuple[str, dict[str, list[str]]]:
  entry, name = '', ''
  lines: dict[str, list[str]] = {}
  for line in text.splitlines():
    match = None if line.startswith(' ') else _COMPUTATION.match(line)
    if match:
      name = match[2]
      lines[name] = []
      entry = name if match[1] else entry
    elif name:
      lines[name].append(line)
  return entry, lines


def _executed(name, computations, times) -> Iterator[tuple[int, str]]:
  """Every instruction below a computation, and how often it runs."""
  for line in computations.get(name, ()):
    yield times, line
    inside = times
    if ' while(' in line:
      inside = times * _trip_count(line, computations)
    called = _CALLED.findall(line)
    for group in _BRANCHES.findall(line):
      called += [x.strip().lstrip('%') for x in group.split(',')]
    for other in called:
      yield from _executed(other, computations, inside)


def _trip_count(line: str, computations) -> int:
  """Of a loop: as the compiler notes it, or the bound in its condition."""
  known = re.search(r'known_trip_count.{1,8}n.{1,4}?(\d+)', line)
  if known:
    return int(known[1])
  condition = re.search(r'condition=%?([\w.-]+)', line)
  lines = computations.get(condition[1], ()) if condition else ()
  bounds = [int(n) for x in lines for n in re.findall(r'constant\((\d+)\)', x)]
  return max(bounds, default=1)


def flops_of(jaxpr: Any, dtype: Any = None) -> float:
  """Multiplications and additions in all products and convolutions.

  Args:
    jaxpr: of a traced function; scans count as often as they run, and of
      branches the most expensive. Loops without a known end count once.
    dtype: counts only products of this dtype; None counts all.

  Returns:
    FLOPs on all devices together.

  Example:
    >>> import jax
    >>> x = jax.ShapeDtypeStruct((2, 3), 'float32')
    >>> flops_of(jax.make_jaxpr(lambda x: x @ x.T)(x).jaxpr)
    24.0
  """
  return sum(_equation_flops(eqn, dtype) for eqn in jaxpr.eqns)


_PRODUCTS = (
    'dot_general', 'conv_general_dilated', 'jaxsoup_inner', 'jaxsoup_mix'
)  # fmt: skip


def _equation_flops(eqn: Any, dtype: Any) -> float:
  if eqn.primitive.name in _PRODUCTS:
    is_other = dtype is not None and eqn.invars[0].aval.dtype != dtype
    return 0.0 if is_other else _product_flops(eqn)
  if eqn.primitive.name == 'cond':
    return max(flops_of(branch, dtype) for branch in eqn.params['branches'])
  inside = [
      flops_of(one, dtype)
      for value in eqn.params.values()
      for one in (value if isinstance(value, (list, tuple)) else [value])
      if isinstance(one, (core.ClosedJaxpr, core.Jaxpr))
  ]
  times = eqn.params['length'] if eqn.primitive.name == 'scan' else 1
  return times * sum(inside, 0.0)


def _product_flops(eqn: Any) -> float:
  if eqn.primitive.name == 'dot_general':
    (contracted, _), _ = eqn.params['dimension_numbers']
    shape = eqn.invars[0].aval.shape
    out = math.prod(eqn.outvars[0].aval.shape)
    return 2 * out * math.prod(shape[i] for i in contracted)
  if eqn.primitive.name == 'conv_general_dilated':
    return _convolution_flops(eqn)
  return 2 * eqn.invars[1].aval.size  # Each number of the stack once.


def _convolution_flops(eqn: Any) -> float:
  """Two for each pair of an output and a tap of its kernel in the image.

  Taps on padding, or on the zeros that a dilation of the image puts between
  its pixels, are no work that a model needs.
  """
  params, (image, kernel) = eqn.params, (x.aval.shape for x in eqn.invars)
  out = eqn.outvars[0].aval.shape
  lhs, rhs, result = params['dimension_numbers']
  pairs = 1
  names = 'window_strides', 'padding', 'lhs_dilation', 'rhs_dilation'
  axes = zip(lhs[2:], rhs[2:], result[2:], *map(params.get, names))
  for i, j, o, stride, (before, _), spread, dilation in axes:
    first = stride * np.arange(out[o])[:, None] - before
    tap = first + dilation * np.arange(kernel[j])
    is_inside = (tap >= 0) & (tap <= (image[i] - 1) * spread)
    pairs *= np.sum(is_inside & (tap % spread == 0))
  # `kernel[rhs[1]]` are the input features of one group.
  return 2.0 * int(pairs) * out[result[0]] * out[result[1]] * kernel[rhs[1]]
