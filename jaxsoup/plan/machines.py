"""Meshes of machines that are not attached, for the compiler.

```
mesh, device_bytes = machines.topology_mesh('v5e:8x8')
```

The compiler of TPUs is in the package libtpu, and works on any machine.
"""

import importlib.util
import os
from typing import NamedTuple

import jax
from jax.experimental import topologies

from jaxsoup import _memory
from jaxsoup.experiments import configs
from jaxsoup.train import loop


class Chip(NamedTuple):
  """A kind of accelerator.

  Attributes:
    hbm_gib: memory of a chip, in GiB.
    bfloat16: peak of a chip in dense products of bfloat16, in TFLOP/s.
    float32: that of float32 in the precision that XLA uses by default: one
      pass in bfloat16 on TPUs, TF32 on GPUs.
    largest: shape of the largest pod of a TPU; empty for a GPU.
  """

  hbm_gib: int
  bfloat16: float
  float32: float
  largest: tuple[int, ...] = ()


# cloud.google.com/tpu/docs/v4, /v5e, /v5p, /v6e, section "System architecture";
# data sheets of NVIDIA, SXM modules, without sparsity.
CHIPS = {
    'v4': Chip(32, 275, 275, (16, 16, 16)),
    'v5e': Chip(16, 197, 197, (16, 16)),
    'v5p': Chip(95, 459, 459, (16, 20, 28)),
    'v6e': Chip(32, 918, 918, (16, 16)),
    'A100': Chip(80, 312, 156),
    'H100': Chip(80, 989.4, 494.7),
    'H200': Chip(141, 989.4, 494.7),
}
TPUS = {name: chip for name, chip in CHIPS.items() if chip.largest}


class Rates(NamedTuple):
  """What predicts the seconds of a plan; without a rate there is none.

  Attributes:
    chip: whose peaks count, a key of `CHIPS`; '' if that is not known.
    utilisation: share of its peak that programs reach.
    read: what one host reads, in GB/s; None if that is not known.
  """

  chip: str = ''
  utilisation: float = 0.4
  read: float | None = None

  def compute_seconds(self, flops: float, wide_flops: float) -> float | None:
    """`FLOPs / (peak x utilisation)` of one device.

    Args:
      flops: all of them.
      wide_flops: those that multiply float32.

    Returns:
      Seconds, or None.

    Example:
      >>> Rates('v5e', utilisation=0.5).compute_seconds(197e12, 0)
      2.0
    """
    if self.chip not in CHIPS:
      return None
    chip = CHIPS[self.chip]
    narrow = (flops - wide_flops) / chip.bfloat16
    return (narrow + wide_flops / chip.float32) / 1e12 / self.utilisation

  def read_seconds(self, num_bytes: float) -> float | None:
    """`bytes / rate` of one host."""
    return None if self.read is None else num_bytes / (1e9 * self.read)


def topology_mesh(name: str) -> tuple[jax.sharding.Mesh, int]:
  """A mesh of TPUs that are not attached, and the bytes of memory of each.

  Args:
    name: generation and shape: 'v5e:8x8', 'v5p:4x4x4'.

  Returns:
    (mesh with the axis `fsdp`, bytes a device).

  Raises:
    ImportError: libtpu is missing.
    UsageError: there is no such generation or shape.
  """
  if importlib.util.find_spec('libtpu') is None:
    raise ImportError(
        'The compiler of TPUs, libtpu, is not installed: pip install '
        '"jaxsoup[tpu-plan]". Or plan for virtual CPU devices: --devices N.'
    )
  kind, _, shape = name.partition(':')
  sides = [int(n) for n in shape.split('x') if n.isascii() and n.isdigit()]
  if kind not in TPUS or not sides or 'x'.join(map(str, sides)) != shape:
    raise configs.UsageError(
        f'There is no topology {name!r}: write one of {", ".join(TPUS)}, and '
        'its shape: v5e:8x8, v6e:16x16, v5p:4x4x4 or v4:2x2x2.'
    )
  chip = TPUS[kind]
  problem = ''
  if 0 in sides:  # The compiler's SIGFPE would end the process.
    problem = 'each side must be at least 1.'
  elif len(sides) != len(chip.largest) or any(
      n > most for n, most in zip(sorted(sides), sorted(chip.largest))
  ):  # The compiler would go on, and end the process later.
    largest = 'x'.join(map(str, chip.largest))
    problem = f'the largest of {kind} is {largest}.'
  if problem:
    raise configs.UsageError(f'{name!r} is not a valid topology: {problem}')
  _prepare_compiler()
  # Or v4 has two devices a chip, and no mesh.
  options = {'chip_config_name': 'megacore'} if kind == 'v4' else {}
  try:
    devices = topologies.get_topology_desc(
        platform='tpu', topology_name=name, **options
    ).devices
  except Exception as e:  # libtpu raises several types.
    raise configs.UsageError(
        f'{name!r} is not a valid topology: its first two sides must be '
        f'multiples of 2. {str(e).splitlines()[0]}'
    ) from e
  return loop.all_devices(devices), chip.hbm_gib * 2**30


def _prepare_compiler() -> None:
  """Must come before libtpu is loaded."""
  defaults = {
      'TPU_SKIP_MDS_QUERY': '1',  # Or it queries a TPU host's metadata.
      'TPU_WORKER_HOSTNAMES': 'localhost',
      'TPU_ACCELERATOR_TYPE': 'v5litepod-4',  # Of any other machine, too.
      'TPU_MIN_LOG_LEVEL': '3',
      'TPU_STDERR_LOG_LEVEL': '3',
      # It takes a lock, which a second process would fail to get.
      'ALLOW_MULTIPLE_LIBTPU_LOAD': '1',
  }
  for name, value in defaults.items():
    os.environ.setdefault(name, value)
  # The compiler overflows its stack on scanned blocks of this size, and dies.
  flag = '--fibers_default_thread_stack_size'
  given = os.environ.get('LIBTPU_INIT_ARGS', '')
  if flag not in given:
    os.environ['LIBTPU_INIT_ARGS'] = f'{given} {flag}=4194304'.strip()


def cpu_mesh(
    num_devices: int, chip: str | None = None
) -> tuple[jax.sharding.Mesh, int]:
  """A mesh of virtual CPU devices, and the bytes that each can have.

  Args:
    num_devices: how many.
    chip: a key of `CHIPS` that they stand for: theirs is its memory.

  Returns:
    (mesh with the axis `fsdp`, bytes a device).

  Raises:
    UsageError: jax has started with fewer, or there is no such chip.
  """
  if chip is not None and chip not in CHIPS:
    raise configs.UsageError(
        f'There is no chip {chip!r}: choose from {", ".join(CHIPS)}.'
    )
  devices = jax.devices('cpu')
  if len(devices) < num_devices:
    raise configs.UsageError(
        f'jax has {len(devices)} CPU devices, not {num_devices}: set XLA_FLAGS='
        f'--xla_force_host_platform_device_count={num_devices}.'
    )
  mesh = loop.all_devices(devices[:num_devices])
  if chip is not None:
    return mesh, CHIPS[chip].hbm_gib * 2**30
  return mesh, _memory.host_free_bytes() // num_devices
