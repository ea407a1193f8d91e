"""Options of `jaxsoup soup` that several recipes have, or that are parsed."""

import enum
import os
import pathlib
import re
from typing import Annotated
from typing import Any
from typing import NamedTuple

import typer

from jaxsoup.commands import _common


def _new_path(text: str) -> pathlib.Path:
  path = _common.local_path(text)
  if os.path.lexists(path):
    raise typer.BadParameter(f'{path} exists: give another path.')
  return path


def _num_bytes(text: str | int) -> int:
  """The value of an option such as 5GB, or its default."""
  match = re.fullmatch(r'(\d+)\s*([KMGT]?)B?', str(text).strip().upper())
  if match is None or not int(match[1]):
    raise typer.BadParameter(f'{text!r} is not a size: write 5GB or 500MB.')
  return int(match[1]) * 1000 ** ' KMGT'.index(match[2] or ' ')


def _floats(text: str) -> list[float]:
  try:
    return [float(x) for x in text.split(',')]
  except ValueError as e:
    raise typer.BadParameter(
        f'{text!r} is not a list of numbers: write 0.5,0.3,0.2.'
    ) from e


Dtype = enum.StrEnum('Dtype', 'float32 bfloat16 float16 float64')


def _stacks(text: str) -> tuple[str, int]:
  """A module and the axis of its layers, from NAME or NAME:AXIS."""
  name, _, axis = text.partition(':')
  if not re.fullmatch(r'\d*', axis):
    raise typer.BadParameter(f'{text!r}: write NAME or NAME:AXIS.')
  return name, int(axis or 0)


def _step_range(text: str) -> tuple[int | None, ...]:
  """Start, stop and distance, from START:STOP:EVERY; each may be empty."""
  parts = (*text.split(':'), '', '')[:3]
  if text.count(':') > 2 or not all(re.fullmatch(r'\d*', x) for x in parts):
    raise typer.BadParameter(
        f'{text!r} is not a range of steps: write START:STOP or '
        'START:STOP:EVERY, such as 10000:20000:1000.'
    )
  return tuple(int(x) if x else None for x in parts)


class Order(NamedTuple):
  """What every recipe is told."""

  runs: _common.Runs
  out: Annotated[
      pathlib.Path,
      typer.Option(
          parser=_new_path,
          help='New file NAME.safetensors, or new directory: in Hugging Face '
          'format if all runs are (config.json next to the weights), '
          'otherwise Orbax.',
      ),
  ]
  item: _common.Item = None
  whole: Annotated[
      bool,
      typer.Option(
          '--whole',
          help='Average the whole state of a training, its optimizer too, to '
          'go on from it. Default: the model.',
      ),
  ] = False
  dtype: Annotated[
      Dtype | None,
      typer.Option(
          help='Dtype of the soup, and for runs of different dtypes. Sums are '
          'in float32 or wider. Default: that of the runs.',
      ),
  ] = None
  ignore: Annotated[
      list[str] | None,
      typer.Option(
          metavar='PATTERN',
          help="Names of arrays, such as 'head*', that are not averaged but "
          'taken from the first run. May be repeated.',
      ),
  ] = None
  intersect: Annotated[
      bool,
      typer.Option(
          '--intersect', help='Leave out arrays that some of the runs lack.'
      ),
  ] = False
  align_tokens: Annotated[
      bool,
      typer.Option(
          '--align-tokens',
          help='Hugging Face format: average embeddings and heads by token, if '
          'the runs have the same tokens in another order.',
      ),
  ] = False
  max_shard_size: Annotated[
      int,
      typer.Option(
          metavar='SIZE',
          parser=_num_bytes,
          help='Hugging Face format: largest size of a file, such as 500MB; '
          'larger soups are split. Default: 5GB.',
          show_default=False,
      ),
  ] = (
      5 * 10**9
  )
  shard: Annotated[
      bool,
      typer.Option(
          '--shard',
          help='Shard each model over all devices.',
          rich_help_panel='Several devices',
      ),
  ] = False
  distributed: Annotated[
      bool,
      typer.Option(
          '--distributed',
          help='Join the other processes of a TPU pod or Slurm job, and shard. '
          'Elsewhere, set JAX_COORDINATOR_ADDRESS (HOST:PORT of process 0), '
          'JAX_NUM_PROCESSES and JAX_PROCESS_ID.',
          rich_help_panel='Several devices',
      ),
  ] = False
  as_json: _common.Json = False


Plan = Annotated[
    int | None,
    typer.Option(
        '--plan',
        metavar='HOSTS',
        min=1,
        help='Print what this would read, write and hold with one process on '
        'each of HOSTS hosts, and how long it would take. Makes no soup.',
        show_default=False,
    ),
]
Eval = Annotated[
    str,
    typer.Option(
        '--eval',
        metavar='MODULE:FUNCTION',
        help='FUNCTION(params) returns the score on held-out data, higher is '
        'better. params are nested dicts.',
    ),
]
Strict = Annotated[
    bool, typer.Option('--strict', help='Reject ties. Default: accept.')
]
Scores = Annotated[
    pathlib.Path | None,
    typer.Option(
        parser=_common.local_path,
        help='File of scores, from which a repeated command resumes.',
    ),
]
Stacks = Annotated[
    list[Any],
    typer.Option(
        '--stack',
        metavar='NAME[:AXIS]',
        parser=_stacks,
        help='Module whose arrays hold all layers along an axis (default 0), '
        'such as params/decoder/layers: each layer counts as one. Repeatable.',
        show_default=False,
    ),
]
Steps = Annotated[
    Any,
    typer.Option(
        metavar='START:STOP[:EVERY]',
        parser=_step_range,
        help='Steps that count, both ends included. Default: all.',
        show_default=False,
    ),
]
Last = Annotated[
    list[int],
    typer.Option(
        min=1,
        help='Only the last so many of them. Repeatable with --eval.',
        show_default=False,
    ),
]
Curve = enum.StrEnum(
    'Curve',
    {
        'mean': 'mean',
        '1-sqrt': '1-sqrt',
        'linear': 'linear',
        'cosine': 'cosine',
        'exponential': 'exponential',
    },
)
Curves = Annotated[
    list[Curve],
    typer.Option(
        '--decay',
        help='Decay of the learning rate that the average replaces; or mean. '
        'Repeatable with --eval.',
    ),
]
Best = Annotated[
    int | None,
    typer.Option(
        min=1, help='Only so many with the best --metric.', show_default=False
    ),
]
Metric = Annotated[
    str | None,
    typer.Option(
        metavar='[FILE:]NAME[:min]',
        help='A metric that the CheckpointManager of the run has stored, or a '
        'FILE (JSON lines, CSV, trainer_state.json). Higher is better, unless '
        ':min.',
        show_default=False,
    ),
]
EvalOrNot = Annotated[
    str | None,
    typer.Option(
        '--eval',
        metavar='MODULE:FUNCTION',
        help='FUNCTION(params) returns a score, higher is better: the best of '
        'the last step and all --last and --decay is saved.',
        show_default=False,
    ),
]
# Of each run; a list of floats when it is parsed.
Alpha = Annotated[
    Any,
    typer.Option(
        metavar='A,B,...',
        parser=_floats,
        help='Mixing coefficient of each run. They are not normalized.',
    ),
]
Memory = enum.StrEnum('Memory', 'auto resident streamed cached')
