"""A plan as text: its programs and its recipes, as two tables."""

from jaxsoup import _memory
from jaxsoup.plan import machines
from jaxsoup.plan._make import Plan


def as_text(made: Plan) -> str:
  """The plan as two tables."""
  return '\n'.join(
      [
          *_heading(made),
          '',
          'Each program, on one device:',
          _table(_program_rows(made)),
          '',
          'Each recipe, at most: peak memory of one device and of one host, '
          'and totals of the rest:',
          _table(_recipe_rows(made)),
      ]
  )


def _heading(made: Plan) -> list[str]:
  hosts = '1 host' if made.num_hosts == 1 else f'{made.num_hosts} hosts'
  sizes = ', '.join(f'{n} ({name})' for name, n in made.batch_sizes.items())
  lines = [
      f'{made.machine}: {made.num_devices} devices of '
      f'{_memory.amount(made.device_bytes)} each, {hosts}.',
      f'{made.num_ingredients} ingredients of '
      f'{_memory.amount(made.num_parameters, "")} parameters, '
      f'{_memory.amount(made.model_bytes)} each.',
      f'Batches of {sizes}, rounded up to multiples of {made.num_devices}. One '
      'batch is counted: all held-out examples would take '
      f'{_memory.amount(made.held_out_bytes)} more on a device.',
      _sweep(made),
  ]
  if made.read_bytes > made.model_bytes:
    lines.append(
        f'Hosts read {made.read_bytes / made.model_bytes:.2g} times the size '
        'of a model: the devices of a host are not adjacent in the mesh.'
    )
  return lines


def _sweep(made: Plan) -> str:
  """What the fine-tuning takes; its time, if the peak of a device is known."""
  text = (
      f'Fine-tuning {made.num_runs} runs is '
      f'{_memory.amount(made.sweep_flops, "FLOP")}'
  )
  chip = machines.CHIPS.get(made.machine.partition(':')[0])
  if chip is None:
    return f'{text}.'
  seconds = made.sweep_flops / (0.4 * chip.tflops * 1e12 * made.num_devices)
  return (
      f'{text}: {_duration(seconds)}, if steps reach 40 % of the '
      f'{chip.tflops} TFLOP/s of a device.'
  )


def _duration(seconds: float) -> str:
  """Three digits, in the largest unit of which there are two.

  Example:
    >>> _duration(90.0), _duration(19_100.0)
    ('90 seconds', '5.31 hours')
  """
  units = {'days': 86_400, 'hours': 3600, 'minutes': 60, 'seconds': 1}
  fitting = (x for x in units if seconds >= 2 * units[x])
  unit = next(fitting, 'seconds')
  return f'{seconds / units[unit]:.3g} {unit}'


def _program_rows(made: Plan) -> list[list[str]]:
  rows = [
      ['program', 'arguments', 'temporaries', 'output', 'peak', 'of memory',
       'work', 'compiled', 'collectives'],
  ]  # fmt: skip
  for p in made.programs:
    parts = [p.arguments, p.temporaries, p.output]
    collectives = ', '.join(
        f'{t.times} {name} {_memory.amount(t.num_bytes)}'
        for name, t in p.collectives.items()
    )
    is_fitting = not p.problem and p.peak <= made.device_bytes
    rows.append(
        [
            p.name,
            *('-' if p.problem else _memory.amount(n) for n in parts),
            _memory.amount(p.peak) if p.peak else '?',
            f'{p.peak / made.device_bytes:.0%}' if p.peak else '?',
            _memory.amount(p.flops, 'FLOP'),
            f'{p.seconds:.1f} s',
            (collectives or 'none') if is_fitting else 'does not fit',
        ]
    )
  return rows


def _recipe_rows(made: Plan) -> list[list[str]]:
  rows = [
      ['recipe', 'device', 'host', 'reads', 'writes', 'evaluations', 'steps',
       ''],
  ]  # fmt: skip
  for r in made.recipes:
    rows.append(
        [
            r.name,
            *map(_memory.amount, (r.device, r.host, r.reads, r.writes)),
            str(r.evaluations),
            str(r.steps),
            r.note or 'fits',
        ]
    )
  return rows


def _table(rows: list[list[str]]) -> str:
  widths = [max(map(len, column)) for column in zip(*rows)]
  lines = []
  for first, *numbers, last in rows:
    cells = [first.ljust(widths[0])]
    cells += [x.rjust(n) for x, n in zip(numbers, widths[1:-1])]
    lines.append('  '.join([*cells, last]).rstrip())
  return '\n'.join(lines)
