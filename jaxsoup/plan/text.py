"""A plan as text: its programs and its recipes, as two tables."""

from jaxsoup._memory import amount
from jaxsoup.plan import machines
from jaxsoup.plan.recipes import Plan


def as_text(made: Plan) -> str:
  """The plan as two tables."""
  lines = [
      *_heading(made),
      '',
      'Each program, on one device:',
      _table(_program_rows(made)),
      '',
      'The fine-tuning and each recipe, at most: peak memory of one device and '
      'of one host, the examples that each host reads, and totals of the rest:',
      _table(_recipe_rows(made)),
  ]
  return '\n'.join(lines)


def _heading(made: Plan) -> list[str]:
  hosts = '1 host' if made.num_hosts == 1 else f'{made.num_hosts} hosts'
  sizes = ', '.join(f'{n} ({name})' for name, n in made.batch_sizes.items())
  lines = [
      f'{made.machine}: {made.num_devices} devices of '
      f'{amount(made.device_bytes)} each, {hosts}.',
      f'{made.num_ingredients} ingredients of '
      f'{amount(made.num_parameters, "")} parameters, '
      f'{amount(made.model_bytes)} each.',
      f'Batches of {sizes}.',
      f'Fine-tuning {made.num_runs} runs is '
      f'{amount(made.sweep_flops, "FLOP")}.',
      *_predictions(made),
  ]
  if made.num_used < made.num_devices:
    lines.append(
        f'Only {made.num_used} of {made.num_devices} devices is used: '
        'config.is_sharded is not set.'
    )
  if made.read_bytes > made.model_bytes:
    lines.append(
        f'Hosts read {made.read_bytes / made.model_bytes:.2g} times the size '
        'of a model: the devices of a host are not adjacent in the mesh.'
    )
  return lines


def _predictions(made: Plan) -> list[str]:
  """From which rates seconds are predicted, and those of the fine-tuning."""
  rates, of_sweep = made.rates, made.recipes[0]
  lines = []
  if of_sweep.compute_seconds is not None:
    chip = machines.CHIPS[rates.chip]
    lines.append(
        f'Predicted, not measured: compute s, if products reach '
        f'{rates.utilisation:.0%} of the peak of {rates.chip}, '
        f'{chip.bfloat16:g} TFLOP/s in bfloat16 and {chip.float32:g} in '
        "float32 at XLA's default precision; fine-tuning takes "
        f'{_duration(of_sweep.compute_seconds)}.'
    )
  if of_sweep.read_seconds is not None:
    lines.append(
        f'Predicted, not measured: read s, if each host reads {rates.read:g} '
        'GB/s, examples as the model takes them and not compressed; '
        f'fine-tuning takes {_duration(of_sweep.read_seconds)}.'
    )
  return lines


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


def _seconds(seconds: float | None) -> str:
  """Three digits; '-' if there is no prediction.

  Example:
    >>> _seconds(0.123456), _seconds(2_403_700.0), _seconds(None)
    ('0.123', '2,400,000', '-')
  """
  if seconds is None:
    return '-'
  rounded = float(f'{seconds:.3g}')
  return f'{rounded:,.0f}' if rounded >= 100 else f'{rounded:g}'


def _program_rows(made: Plan) -> list[list[str]]:
  rows = [
      ['program', 'arguments', 'temporaries', 'output', 'peak', 'of memory',
       'work', 'compiled', 'collectives'],
  ]  # fmt: skip
  for p in made.programs:
    collectives = ', '.join(
        f'{t.times} {name} {amount(t.num_bytes)}'
        for name, t in p.collectives.items()
    )
    is_fitting = not p.problem and p.peak <= made.device_bytes
    parts = p.arguments, p.temporaries, p.output
    rows.append(
        [
            p.name,
            *('-' if p.problem else amount(n) for n in parts),
            amount(p.peak) if p.peak else '?',
            f'{p.peak / made.device_bytes:.0%}' if p.peak else '?',
            amount(p.flops, 'FLOP'),
            f'{p.seconds:.1f} s',
            (collectives or 'none') if is_fitting else 'does not fit',
        ]
    )
  return rows


def _recipe_rows(made: Plan) -> list[list[str]]:
  head = ['recipe', 'device', 'host', 'reads', 'examples', 'writes',
          'evaluations', 'steps', 'compute s', 'read s', '']  # fmt: skip
  return [head] + [
      [
          r.name,
          *map(amount, (r.device, r.host, r.reads, r.examples, r.writes)),
          str(r.evaluations),
          f'{r.steps:,}',
          *map(_seconds, (r.compute_seconds, r.read_seconds)),
          r.note or 'fits',
      ]
      for r in made.recipes
  ]


def _table(rows: list[list[str]]) -> str:
  widths = [max(map(len, column)) for column in zip(*rows)]
  lines = []
  for first, *numbers, last in rows:
    cells = [first.ljust(widths[0])]
    cells += [x.rjust(n) for x, n in zip(numbers, widths[1:-1])]
    lines.append('  '.join([*cells, last]).rstrip())
  return '\n'.join(lines)
