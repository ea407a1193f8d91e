"""Compiled functions of users' functions, which are freed together.

```
@_programs.jit_of(1)
def gradient(loss_fn, params):
  return jax.grad(loss_fn)(params)

gradient(loss_fn, params)              # Compiled once for each loss_fn.
```
"""

from collections.abc import Callable
import functools
from typing import Any
from typing import TypeVar
import weakref

import jax

_T = TypeVar('_T')


def jit_of(
    num_fns: int, **options: Any
) -> Callable[[Callable[..., _T]], Callable[..., _T]]:
  """Like `jax.jit` of a function whose first arguments are functions.

  As static arguments they, and the data in their closures, would be kept alive
  for as long as the process runs. Here programs refer to them weakly. The
  options are those of `jax.jit`, for the arguments after those functions.
  """

  def decorate(fn: Callable[..., _T]) -> Callable[..., _T]:
    programs: dict[tuple[weakref.ref[Any], ...], Callable[..., _T]] = {}

    @functools.wraps(fn)
    def jitted(*args: Any) -> _T:
      fns, rest = args[:num_fns], args[num_fns:]
      try:
        refs = tuple(map(weakref.ref, fns))
        program = programs.get(refs)
      except TypeError:  # Without a weak reference or a hash: not kept.
        return jax.jit(functools.partial(fn, *fns), **options)(*rest)
      if program is None:
        call = lambda *args: fn(*(ref() for ref in refs), *args)
        program = jax.jit(functools.wraps(fn)(call), **options)
        programs[refs] = program
        for f in fns:
          weakref.finalize(f, programs.pop, refs, None)
      return program(*rest)

    return jitted

  return decorate
