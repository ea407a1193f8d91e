"""Float64 in a test: what differs then differs by more than rounding."""

import jax
import jax.experimental


def x64():
  if hasattr(jax, 'enable_x64'):
    return jax.enable_x64(True)
  return jax.experimental.enable_x64()  # Its name until jax 0.8.
