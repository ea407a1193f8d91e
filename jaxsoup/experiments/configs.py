"""Configs: files in which an experiment is a few functions; their overrides.

```
experiment = configs.load('configs/digits.py', ['--config.seed=1'])
splits = experiment.data_fn(experiment.config)
```
"""

from collections.abc import Callable
from collections.abc import Iterator
from collections.abc import Sequence
import difflib
import importlib.util
import json
import math
import pathlib
import sys
import types
from typing import Any
from typing import NamedTuple

from absl import flags
import cloudpickle
from flax import traverse_util
import ml_collections
from ml_collections import config_flags

from jaxsoup import _json
from jaxsoup import _processes
from jaxsoup.runtime import buckets
from jaxsoup.runtime import user_code
from jaxsoup.typing import Json

Run = Json
# Fields that only affect the analysis after all models are trained.
LATER = ('landscape.', 'stability.')


class Experiment(NamedTuple):
  """An experiment, as a config file defines it.

  Attributes:
    config: of `get_config(arg)`, with the overrides.
    runs: of `sweep(config)`: hyper-parameters of each run.
    data_fn: its `data`: config -> `jaxsoup.data.sources.Splits`; without one it
      can only be planned.
    model_fn: its `model`: config -> `modeling.Model`; else `config.model`
      describes the model.
    log_fn: its `log`: config -> what is called with each report of the
      training, a dict, such as `wandb.init(project='soups').log`.
    source: the arguments of `load`, for workers that load it, too.
  """

  config: ml_collections.ConfigDict
  runs: list[Run]
  data_fn: Callable[[ml_collections.ConfigDict], Any] | None = None
  model_fn: Callable[[ml_collections.ConfigDict], Any] | None = None
  log_fn: Callable[[ml_collections.ConfigDict], Any] | None = None
  source: tuple[str, tuple[str, ...]] | None = None


class UsageError(ValueError):
  """A wrong argument or config; the message says what is expected."""

  exit_code = 2


def parse(
    argv: Sequence[str], *, has_only: bool = False
) -> types.SimpleNamespace:
  """Parses `--config=FILE --workdir=DIR --config.x=y ...`.

  Args:
    argv: the arguments, without the program's name.
    has_only: whether there is `--only=4,13`.

  Returns:
    `config`, `workdir`, `seeds` (from `config.seed` on), `distributed`, `only`
    (numbers; none for all) and `overrides`, such as '--config.seed=1'.

  Raises:
    UsageError: an unknown, missing or malformed argument.
  """
  values = flags.FlagValues()
  flags.DEFINE_string('config', None, '', flag_values=values)
  flags.DEFINE_string('workdir', None, '', flag_values=values)
  flags.DEFINE_integer('seeds', 1, '', lower_bound=1, flag_values=values)
  flags.DEFINE_bool('distributed', False, '', flag_values=values)
  if has_only:
    flags.DEFINE_list('only', [], '', flag_values=values)
  else:
    flags.DEFINE_bool('export', False, '', flag_values=values)
  is_override = lambda a: a.startswith(('-config.', '--config.'))
  try:
    _, *rest = values(['main', *(a for a in argv if not is_override(a))])
    parsed = types.SimpleNamespace(**{'only': [], **values.flag_values_dict()})
    if rest:
      raise ValueError(f'Unexpected argument {rest[0]!r}: write --NAME=VALUE')
    if missing := [x for x in ('config', 'workdir') if not values[x].value]:
      raise ValueError(f'--{missing[0]} is missing')
    if not all(map(str.isdecimal, parsed.only)):
      raise ValueError(f'--only is {parsed.only}. Write --only=4,13')
  except (flags.Error, ValueError) as e:
    raise UsageError(f'{e}. Usage: {USAGE}') from e
  try:
    buckets.path_of(parsed.workdir)
  except ValueError as e:
    raise UsageError(str(e)) from e
  parsed.only = [int(number) for number in parsed.only]
  parsed.overrides = list(filter(is_override, argv))
  return parsed


USAGE = (
    'python -m jaxsoup.experiments.main --config=FILE[:ARG] --workdir=DIR '
    '[--config.NAME=VALUE ...] [--seeds=N] [--export] [--distributed]'
)


def load(path: str, overrides: Sequence[str] = ()) -> Experiment:
  """Reads a config and draws the runs of its sweep.

  Args:
    path: a Python file with `get_config(arg)`, `sweep(config)`, `data(config)`
      and perhaps `model(config)` and `log(config)`; perhaps with an argument
      behind a colon: 'configs/digits.py:runlocal'.
    overrides: such as '--config.seed=1'.

  Raises:
    UsageError: no such file, function, key, or a value of another type.
  """
  if '://' in path:
    raise UsageError(f'{path} is an address: copy the config here.')
  file, _, arg = path.partition(':')
  if not pathlib.Path(file).is_file():
    folder = pathlib.Path(file).parent
    there = sorted(p.name for p in folder.glob('*.py'))
    raise UsageError(
        f'There is no config {file}.'
        + (f' Give one of {folder}: {", ".join(there)}.' if there else '')
    )
  module = _module(file)
  optional = ('data', 'model', 'log')
  for name in ('get_config', 'sweep', *optional):
    if not callable(getattr(module, name, len if name in optional else None)):
      raise UsageError(f'{file} has no function {name}: see configs/digits.py.')
  config = _called(module, path, 'get_config', module.get_config, arg or None)
  if not isinstance(config, ml_collections.ConfigDict):
    raise UsageError(
        f'{path}: get_config returned {type(config).__name__}: expected an '
        'ml_collections.ConfigDict, see configs/digits.py.'
    )
  if 'seed' not in config:
    with config.unlocked():
      config.seed = 0
  # Not DEFINE_config_file, which imports in a way that Python deprecates.
  values = flags.FlagValues()
  argv = ['main', *overrides]
  try:
    config_flags.DEFINE_config_dict(
        'config', config, flag_values=values, sys_argv=argv
    )
    values(argv)
  except (
      flags.Error, AttributeError, IndexError, KeyError, TypeError, ValueError
  ) as e:  # fmt: skip
    raise UsageError(
        _explain(overrides, module.get_config(arg or None), e)
    ) from e
  if problems := list(_problems(flat(values.config))):
    raise UsageError(f'{path}: {"; ".join(problems)}.')
  sweep_fn = lambda config: list(module.sweep(config))
  runs = _called(module, path, 'sweep', sweep_fn, values.config)
  if problem := _problem_of(runs):
    raise UsageError(f'{path}: sweep returned {problem}.')
  # What the library raises in them says what to do.
  passing = (ImportError, OSError, ValueError)
  functions = {
      f'{name}_fn': user_code.guarded(
          getattr(module, name), module.__file__, f'{path}: {name}', passing
      )
      for name in optional
      if hasattr(module, name)
  }
  source = f'{pathlib.Path(file).absolute()}:{arg}'.rstrip(':')
  return Experiment(
      values.config, runs, **functions, source=(source, tuple(overrides))
  )


def _called(module: Any, path: str, name: str, fn: Any, argument: Any) -> Any:
  """What a function of a config file returns; a UsageError where it raises."""
  try:
    return user_code.guarded(fn, module.__file__, f'{path}: {name}')(argument)
  except user_code.UserCodeError as e:
    raise UsageError(str(e)) from e


def _problem_of(runs: list[Any]) -> str:
  """What is wrong with the runs that a sweep returned, if anything is."""
  if not runs:
    return 'no runs: expected one dict of hyper-parameters for each'
  for i, run in enumerate(runs):
    if not isinstance(run, dict):
      return f'{run!r:.60} as run {i}: expected a dict of hyper-parameters'
    for key in ('learning_rate', 'weight_decay'):
      value = run.get(key, 0.0)
      if not isinstance(value, (int, float)) or not 0 <= value < math.inf:
        return f'{key} {value!r:.60} in run {i}: expected a number, 0 or more'
  return ''


# What fields may hold, by the last part of their name.
_POSITIVE = {
    'batch_size', 'depth', 'group_size', 'mlp_width', 'num_accumulated',
    'num_classes', 'num_epochs', 'num_heads', 'num_runs',
    'num_splits', 'patch_size', 'width',
}  # fmt: skip
_OF_TRAINING = ('finetune', 'learned', 'pretrain', 'sweep')
_SEEDS = ('draw', 'seed')
_SHARES = {
    'decay_from', 'ema', 'final', 'label_smoothing', 'momentum',
    'val_fraction', 'warmup',
}  # fmt: skip


def _problems(fields: Json) -> Iterator[str]:
  """Fields with values that no experiment can have, and what is allowed."""
  for key, value in fields.items():
    section, _, name = key.rpartition('.')
    numbers = value if isinstance(value, (tuple, list)) else [value]
    if not all(type(x) in (int, float) for x in numbers):
      if name in _SHARES and isinstance(value, (tuple, list)):
        yield f'config.{key} is {value!r}: expected numbers between 0 and 1'
      if name in _POSITIVE and isinstance(value, str):
        yield f'config.{key} is {value!r}: expected a number'
      continue
    expected = ''
    if not all(map(math.isfinite, numbers)):
      expected = 'a finite number'
    elif name in _POSITIVE and min(numbers, default=1) < 1:
      expected = '1 or more'
    elif name in _SHARES and not all(0 <= x <= 1 for x in numbers):
      expected = 'between 0 and 1'
    elif section == 'sweep' and len(numbers) == 2 and numbers[0] > numbers[1]:
      expected = 'a range, low before high'
    elif name == 'image_shape' and (len(numbers) != 3 or min(numbers) < 1):
      expected = 'height, width and channels'
    elif name == 'keep_steps':
      names = 'num_epochs', 'batch_size'
      each, size = (fields.get(f'{section}.{name}') for name in names)
      try:
        last = each * (fields['data.sizes.train'] // size)
      except (KeyError, TypeError, ZeroDivisionError):
        last = math.inf  # Not known, or wrong itself.
      if not all(1 <= x <= last for x in numbers):
        expected = f'steps from 1 to {last}, the last one'
    is_of_runs = section.partition('.')[0] in _OF_TRAINING
    is_negative = min(numbers, default=0) < 0 and name not in _SEEDS
    is_at_least_0 = is_of_runs or name == 'num_workers'
    if is_at_least_0 and is_negative and not expected:
      expected = '0 or more'
    if expected:
      yield f'config.{key} is {value!r}: expected {expected}'


def _explain(overrides, config, error) -> str:
  """Names the wrong override, and what is expected."""
  known = flat(config)
  names = [
      override.lstrip('-').partition('=')[0].removeprefix('config.')
      for override in overrides
  ]
  for name in names:
    if name not in known and not any(k.startswith(f'{name}[') for k in known):
      near = difflib.get_close_matches(name, known, 3, 0.4)
      return (
          f'The config has no {name!r}. '
          + (f'Did you mean {" or ".join(near)}? ' if near else '')
          + f'It has: {", ".join(sorted(known))}.'
      )
  first = str(error).strip().split('\n')[0]
  kinds = [
      f'{name} is {type(known[name]).__name__}, such as {known[name]!r}'
      for name in names
      if name in known
  ]
  return f'{first} ({"; ".join(kinds)})' if kinds else first


def flat(config: ml_collections.ConfigDict) -> Json:
  """Its fields by their names, such as 'finetune.num_epochs'."""
  fields = traverse_util.flatten_dict(config.to_dict())
  return {'.'.join(map(str, path)): x for path, x in fields.items()}


def _module(file: str) -> Any:
  spec = importlib.util.spec_from_file_location('jaxsoup_config', file)
  if spec is None or spec.loader is None:
    raise UsageError(f'{file} is not a Python file: its name must end in .py.')
  module = importlib.util.module_from_spec(spec)
  sys.modules[spec.name] = module  # Where dataclasses look it up.
  user_code.guarded(spec.loader.exec_module, file, file)(module)
  # Workers that read data cannot import it.
  cloudpickle.register_pickle_by_value(module)
  return module


def check_unchanged(
    config: ml_collections.ConfigDict, file: pathlib.Path
) -> None:
  """Stores the config with a workdir, or compares it with the stored one.

  A workdir in which nothing was made yet, such as when the config had a wrong
  path, accepts other values of the same fields.

  Raises:
    UsageError: the workdir belongs to another config; names what differs.
    ValueError: the stored config is unreadable.
  """
  try:
    now = _lasting(json.loads(json.dumps(flat(config))))
  except TypeError as e:
    raise UsageError(
        f'The config holds what JSON cannot hold: {e}. Use numbers, text, '
        'lists and dicts.'
    ) from e
  # They decide where and how fast a run is trained, not what.
  for name in ('sweep.shard', 'data.num_workers'):
    now.pop(name, None)
  # Listed before the file is read: another process may write it meanwhile.
  names = others(file.parent, file.name)
  if file.exists():
    try:
      then = _lasting(dict(_json.parsed(file.read_bytes())))
    except (TypeError, ValueError) as e:
      raise ValueError(
          f'{file} is unreadable: {e}. Delete that file if the workdir belongs '
          'to this config: it is written again, and everything else is kept.'
      ) from e
    differing = [
        f'{key} was {then.get(key)!r}, is now {now.get(key)!r}'
        for key in sorted(then.keys() | now.keys())
        if then.get(key) != now.get(key)
    ]
    if not differing:
      return
    if {*names} - {'.lock'} or then.keys() != now.keys():
      raise UsageError(
          f'{file.parent} was started with another config: '
          f'{"; ".join(differing)}. Use another workdir, or delete this one.'
      )
  else:
    require_new(file.parent, names)
  if _processes.is_main():
    _json.write(file, now, indent=2)


def others(workdir: pathlib.Path, own: str) -> list[str]:
  """Names in a workdir, without those that begin with `own`."""
  paths = workdir.iterdir() if workdir.is_dir() else ()
  return sorted(p.name for p in paths if not p.name.startswith(own))


def require_new(workdir: pathlib.Path, names: Sequence[str]) -> None:
  """Raises if a workdir in which nothing was started yet holds something."""
  if names := [name for name in names if not name.startswith('.lock')]:
    raise UsageError(
        f'{workdir} holds {", ".join(names[:5])}, and no experiment was '
        'started in it. Give another workdir, so that nothing is overwritten.'
    )


def _lasting(fields: Json) -> Json:
  """The fields that cannot change in a workdir."""
  return {k: v for k, v in fields.items() if not k.startswith(LATER)}
