"""What XLA is told in tests; without jax, as jax reads it when it is imported.

Most of a test is compilation. Without optimizations, in one LLVM module a
program, and without the emitters that lower each fusion through MLIR, it takes
a fourth of the time for a network.
"""

import importlib.metadata

JAX_VERSION = importlib.metadata.version('jax')
_FLAGS = [
    '--xla_backend_optimization_level=0',
    '--xla_llvm_disable_expensive_passes=true',
    '--xla_cpu_parallel_codegen_split_count=1',
]
# XLA aborts at flags that it does not know: later versions have only these
# emitters.
if tuple(map(int, JAX_VERSION.split('.')[:2])) < (0, 11):
  _FLAGS.append('--xla_cpu_use_fusion_emitters=false')


def flags(num_devices: int, given: str = '') -> str:
  """XLA_FLAGS for that many CPU devices; those given override our own."""
  count = f'--xla_force_host_platform_device_count={num_devices}'
  return ' '.join([*_FLAGS, given, count])
