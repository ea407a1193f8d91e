"""Options of `jaxsoup soup` that several recipes have, or that are parsed."""

from collections.abc import Iterator
from concurrent import futures
import contextlib
import enum
import functools
import multiprocessing
import os
import pathlib
import re
from typing import Annotated
from typing import Any
from typing import NamedTuple

import typer

from jaxsoup.commands import _common
from jaxsoup.runtime import user_code


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


def _objective(text: str) -> str | dict[str, float]:
  """A name, or the weights of several, from NAME=WEIGHT,NAME=WEIGHT."""
  # Names may have commas.
  pairs = re.findall(r'(.+?)=([-+.\deE]+)(?:,|$)', text)
  if '=' not in text:
    return text
  if ','.join(map('='.join, pairs)) != text:
    raise typer.BadParameter(
        f'{text!r}: write the name of a score, or NAME=WEIGHT,NAME=WEIGHT.'
    )
  return {name: float(weight) for name, weight in pairs}


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


_of_command = functools.partial(
    typer.Option, rich_help_panel='Scores of a command'
)
_OBJECTIVE = 'NAME[=WEIGHT],...'


class Scored(NamedTuple):
  """Where the scores of a search come from."""

  eval_name: Annotated[
      str | None,
      typer.Option(
          '--eval',
          metavar='MODULE:FUNCTION',
          help='FUNCTION(params) returns the score on held-out data, higher is '
          'better, or a dict of several. params are nested dicts.',
      ),
  ] = None
  scores: Annotated[
      pathlib.Path | None,
      _common.path_option(
          help='File of scores, from which a repeated command resumes.',
      ),
  ] = None
  objective: Annotated[
      Any,
      typer.Option(
          metavar=_OBJECTIVE,
          parser=_objective,
          help='Of several scores: the one that counts, a weighted sum, or the '
          'worst of all.',
      ),
  ] = None
  workers: Annotated[
      int,
      typer.Option(
          min=1,
          help='Processes of this machine that evaluate candidates at a time, '
          'with the same result. They share its devices and memory.',
      ),
  ] = 1
  command: Annotated[
      str | None,
      _of_command(
          '--score-command',
          metavar='COMMAND',
          help="In place of --eval: such as 'python my_eval.py {path}', with "
          'the path of a candidate, stored as the runs are. The last line that '
          'it prints is the score: a number, or a JSON object of several.',
      ),
  ] = None
  score_file: Annotated[
      str | None,
      _of_command(
          metavar='{path}...',
          help='JSON file that the command writes, in place of its output; or '
          "a pattern such as '{path}-out/*.json'.",
      ),
  ] = None
  score_key: Annotated[
      str,
      _of_command(
          metavar='NAME/NAME',
          help='Where in the JSON object the score is, or the scores are.',
      ),
  ] = ''
  timeout: Annotated[
      float | None,
      _of_command(
          '--score-timeout',
          metavar='SECONDS',
          min=0,
          help='Time limit of the command. Default: none.',
      ),
  ] = None
  retries: Annotated[
      int,
      _of_command(
          '--score-retries',
          min=0,
          help='How often a command that fails is run again.',
      ),
  ] = 0
  scratch: Annotated[
      pathlib.Path | None,
      _of_command(
          metavar='DIR',
          parser=_common.local_path,
          help='Directory for candidates. Default: /dev/shm if two fit there, '
          'else the temporary directory.',
      ),
  ] = None

  @contextlib.contextmanager
  def arguments(self, ingredients: Any) -> Iterator[dict[str, Any]]:
    """What a search in Python takes, while the workers are there."""
    from jaxsoup import checkpoints
    from jaxsoup import scoring

    if self.command is None:
      eval_fn = user_code.load(self.eval_name or '')
      evaluation = user_code.identity(self.eval_name or '')
    else:
      eval_fn = scoring.from_command(
          self.command,
          ingredients,
          score_file=self.score_file,
          score_key=self.score_key,
          timeout=self.timeout,
          retries=self.retries,
          scratch=self.scratch,
          outputs=self.scores and f'{self.scores}.outputs',
      )
      evaluation = scoring.identity(self.command, self.score_key)
    log = None
    if self.scores is not None:
      log = checkpoints.ScoreLog(self.scores, ingredients, evaluation)
    objective = objective_of(self.objective)
    arguments = {'eval_fn': eval_fn, 'objective': objective, 'scores': log}
    with on_workers(self.workers) as more:
      yield {**arguments, **more}


@contextlib.contextmanager
def on_workers(num: int) -> Iterator[dict[str, Any]]:
  """Arguments for so many processes; none for one."""
  if num == 1:
    yield {}
    return
  # A fork of a process that runs jax may hang.
  context = multiprocessing.get_context('spawn')
  executor = futures.ProcessPoolExecutor(num, context)
  try:
    yield {'executor': executor, 'num_ahead': 2 * num}
  finally:
    executor.shutdown(cancel_futures=True)


def objective_of(given: Any) -> Any:
  """What an option says, as an argument of a search."""
  from jaxsoup import evaluation

  return evaluation.worst if given == 'worst' else given


Plan = Annotated[
    int | None,
    typer.Option(
        '--plan',
        metavar='HOSTS',
        min=1,
        help='Print what this would read, write and hold with one process on '
        'each of HOSTS hosts, and how long it would take. Makes no soup.',
    ),
]
Strict = Annotated[
    bool, typer.Option('--strict', help='Reject ties. Default: accept.')
]
Stacks = Annotated[
    list[Any],
    typer.Option(
        '--stack',
        metavar='NAME[:AXIS]',
        parser=_stacks,
        help='Module whose arrays hold all layers along an axis (default 0), '
        'such as params/decoder/layers: each layer counts as one. Repeatable.',
    ),
]
Steps = Annotated[
    Any,
    typer.Option(
        metavar='START:STOP[:EVERY]',
        parser=_step_range,
        help='Steps that count, both ends included. Default: all.',
    ),
]
Last = Annotated[
    list[int],
    typer.Option(
        min=1,
        help='Only the last so many of them. Repeatable with --eval.',
    ),
]
Curve = enum.StrEnum('Curve', 'mean 1-sqrt linear cosine exponential')
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
    typer.Option(min=1, help='Only so many with the best --metric.'),
]
Metric = Annotated[
    str | None,
    typer.Option(
        metavar='[FILE:]NAME[:min]',
        help='A metric that the CheckpointManager of the run has stored, or a '
        'FILE (JSON lines, CSV, trainer_state.json). Higher is better, unless '
        ':min.',
    ),
]
EvalOrNot = Annotated[
    str | None,
    typer.Option(
        '--eval',
        metavar='MODULE:FUNCTION',
        help='FUNCTION(params) returns a score, higher is better: the best of '
        'the last step and all --last and --decay is saved.',
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
Method = enum.StrEnum('Method', 'cma random coordinates')
Space = enum.StrEnum('Space', 'simplex hyperplane')
Start = enum.StrEnum('Start', 'uniform greedy categories')
ValObjective = Annotated[
    Any,
    typer.Option(
        metavar=_OBJECTIVE,
        parser=_objective,
        help='The same for a second split of the held-out data: the candidate '
        'that is best there is returned, of those that were the best so far.',
    ),
]
