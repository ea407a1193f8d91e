"""Scores that a command of the user computes, as an `eval_fn`.

```
ingredients = checkpoints.Ingredients(runs)
eval_fn = scoring.from_command('python my_eval.py {path}', ingredients)
soup = jaxsoup.greedy(ingredients, eval_fn)
```
"""

from collections.abc import Iterator
from collections.abc import Sequence
import contextlib
import dataclasses
import glob
import hashlib
import itertools
import math
import os
import pathlib
import re
import shlex
import shutil
import signal
import subprocess
import tempfile
import time
from typing import Any

import jax

from jaxsoup import _json
from jaxsoup import _processes
from jaxsoup import _tree
from jaxsoup import checkpoints
from jaxsoup.runtime import user_code
from jaxsoup.typing import EvalFn
from jaxsoup.typing import Params
from jaxsoup.typing import PathLike

PATH = '{path}'
# Where files lie in memory.
_MEMORY = pathlib.Path('/dev/shm')
# What only a shell understands; variables may be set before the command.
_OF_SHELLS = re.compile(r'[|&;<>()$`*?\[\]~#!\n]|\A\s*\w+=')
_TAIL = 2000
_GRACE = 5  # Seconds between SIGTERM and SIGKILL.


def from_command(
    command: str,
    ingredients: checkpoints.Ingredients | None = None,
    *,
    score_file: str | None = None,
    score_key: str = '',
    timeout: float | None = None,
    retries: int = 0,
    scratch: PathLike | None = None,
    outputs: PathLike | None = None,
) -> EvalFn:
  """The score that a command prints, as an `eval_fn`.

  The candidate is written as its ingredients are, in a new directory that is
  deleted after the trial; what the command puts next to it is deleted too. The
  score is the last line of the standard output that is JSON: a number, or an
  object. Of an object all numbers count, those of inner ones by names such as
  `mmlu/acc`; what is no number is left out. Of several processes the first one
  runs the command, and all get the score.

  The command starts in the current directory with an empty standard input. It
  is run without a shell, unless it has characters that only a shell
  understands, such as `|` or `$`.

  Args:
    command: of which `{path}` is replaced by the path of the candidate.
    ingredients: of the search, whose layout the candidate gets; None writes an
      Orbax checkpoint of the bare parameters.
    score_file: of a command that writes a file of JSON: its path, which begins
      with `{path}`, so that it is new in each trial. It may be a pattern, such
      as `{path}-results/*.json`, that one file matches.
    score_key: where in the JSON the score is, such as `results/mmlu`.
    timeout: seconds after which the command is ended. What it started and left
      running is ended in any case.
    retries: how often a command that fails, runs out of time or has no score is
      run again.
    scratch: the directory for candidates. By default `/dev/shm`, which is
      memory, if two candidates fit there, else the temporary directory. Several
      processes need one that all of them see.
    outputs: a directory that keeps what each run prints, `0001.out` and
      `0001.err` and so on. None keeps nothing; an error shows the end.

  Returns:
    `eval_fn(params) -> float | dict[str, float]`.

  Raises:
    ValueError: `{path}` is missing, or the command is no command.
    user_code.UserCodeError: (when called) no run had a score.

  Example:
    >>> import numpy as np
    >>> eval_fn = from_command("echo '{path}' 0.5 | cut -d' ' -f2")
    >>> eval_fn({'w': np.ones(2, np.float32)})
    0.5
  """
  if PATH not in command:
    raise ValueError(
        f'The command {command!r} has no {PATH}, which stands for the '
        f'candidate: python my_eval.py {PATH}.'
    )
  if score_file is not None and not score_file.startswith(PATH):
    raise ValueError(
        f'The score file {score_file!r} (--score-file) has to begin with '
        f'{PATH}: a file elsewhere may be of an earlier trial. Have the '
        f'command write to {PATH}.json or {PATH}-results/.'
    )
  try:
    shlex.split(command)
  except ValueError as e:
    raise ValueError(f'The command {command!r} cannot be read: {e}.') from e
  return _Command(
      command,
      ingredients,
      score_file,
      score_key,
      timeout,
      retries,
      scratch,
      outputs,
  )


def _with_room(params: Params) -> pathlib.Path:
  """The memory of the host if two candidates fit, else a disk."""
  leaves = jax.tree.leaves(params)
  needed = 2 * sum(map(_tree.num_bytes, leaves))
  if _MEMORY.is_dir() and needed < shutil.disk_usage(_MEMORY).free:
    return _MEMORY
  return pathlib.Path(tempfile.gettempdir())


class _Failure(Exception):
  """A run without a score; the message says why."""


# Not a closure, which could not be sent to workers.
@dataclasses.dataclass(frozen=True)
class _Command:
  """What `from_command` returns."""

  text: str
  ingredients: checkpoints.Ingredients | None
  score_file: str | None
  score_key: str
  timeout: float | None
  retries: int
  scratch: PathLike | None
  outputs: PathLike | None

  def __call__(self, params: Params) -> Any:
    with self._written(params) as path:
      said: dict[str, Any] = {}
      with _processes.together():
        if _processes.is_main():
          said = self._tried(path)
      said = _processes.json_of_main(said)
    if 'error' in said:
      raise user_code.UserCodeError(said['error'])
    return said['score']

  @contextlib.contextmanager
  def _written(self, params: Params) -> Iterator[str]:
    """The path of a candidate, which is there meanwhile."""
    if self.scratch is None and jax.process_count() > 1:
      raise ValueError(
          'Several processes write a candidate: pass scratch= (--scratch), a '
          'directory that all of them see.'
      )
    folder = None
    with _processes.together():
      if _processes.is_main():
        scratch = _with_room(params) if self.scratch is None else self.scratch
        pathlib.Path(scratch).mkdir(parents=True, exist_ok=True)
        folder = tempfile.mkdtemp(prefix='jaxsoup-', dir=scratch)
    folder = _processes.json_of_main(folder)
    try:
      path = f'{folder}/candidate'
      yield checkpoints.save_like(path, params, self.ingredients)
    finally:
      if _processes.is_main():
        shutil.rmtree(folder, ignore_errors=True)

  def _tried(self, path: str) -> dict[str, Any]:
    """The score, or the error of the last run."""
    error = ''
    folder = pathlib.Path(path).parent
    own = set(folder.iterdir())
    for _ in range(1 + self.retries):
      for left in set(folder.iterdir()) - own:  # By a run that failed.
        shutil.rmtree(left) if left.is_dir() else left.unlink()
      with tempfile.TemporaryDirectory(prefix='jaxsoup-') as temporary:
        files = self._files(pathlib.Path(temporary))
        try:
          self._run(path, files)
          return {'score': self._score(path, files[0])}
        except _Failure as e:
          error = self._described(e, path, files)
    again = f' It was run {1 + self.retries} times.' if self.retries else ''
    return {'error': error + again}

  def _files(self, temporary: pathlib.Path) -> list[pathlib.Path]:
    """Where standard output and standard error go."""
    folder, name = temporary, 'run'
    if self.outputs is not None:
      folder = pathlib.Path(self.outputs)
      folder.mkdir(parents=True, exist_ok=True)
      numbers = [int(p.stem) for p in folder.glob('[0-9]*.out')]
      for number in itertools.count(max(numbers, default=0) + 1):
        name = f'{number:04}'
        with contextlib.suppress(FileExistsError):  # Of another worker.
          (folder / f'{name}.out').touch(exist_ok=False)
          break
    return [folder / f'{name}.out', folder / f'{name}.err']

  def _run(self, path: str, files: Sequence[pathlib.Path]) -> None:
    """Runs it to its end; raises a `_Failure` unless it exits with 0."""
    if _OF_SHELLS.search(self.text.replace(PATH, '')):
      words = ['/bin/sh', '-c', self.text.replace(PATH, shlex.quote(path))]
    else:
      words = [w.replace(PATH, path) for w in shlex.split(self.text)]
    end = math.inf if self.timeout is None else time.monotonic() + self.timeout
    with open(files[0], 'wb') as out, open(files[1], 'wb') as err:
      try:
        process = subprocess.Popen(
            words,
            stdin=subprocess.DEVNULL,
            stdout=out,
            stderr=err,
            start_new_session=True,  # To end all that it starts.
        )
      except OSError as e:
        raise _Failure(f'cannot be started: {e}') from e
      try:
        while (code := _waited(process, 0.2)) is None:
          # Several processes would have to agree.
          if self.ingredients is not None and jax.process_count() == 1:
            self.ingredients.look_for_stop()
          if time.monotonic() > end:
            raise _Failure(
                f'did not end within {self.timeout:g} s (--score-timeout)'
            )
      finally:
        _end(process)
    if code:
      said = f'exited with {code}'
      if code < 0:
        said = f'was ended by {signal.Signals(-code).name}'
      raise _Failure(said)

  def _score(self, path: str, out: pathlib.Path) -> Any:
    """What it printed or wrote last; raises a `_Failure`."""
    file = out
    if self.score_file is not None:
      pattern = glob.escape(path) + self.score_file.removeprefix(PATH)
      files = glob.glob(pattern, recursive=True)
      if len(files) != 1:
        raise _Failure(
            f'wrote {len(files)} files {self.score_file}: expected one'
        )
      file = pathlib.Path(files[0])
    text = file.read_text(errors='replace')
    values = filter(None, map(_parsed, [text, *reversed(text.splitlines())]))
    parsed = next(values, None)
    if parsed is None:
      raise _Failure(
          f'{"wrote" if self.score_file else "printed"} no score: expected '
          'JSON, a number or an object, in the last line'
      )
    (value,) = parsed
    for key in filter(None, self.score_key.split('/')):
      if not isinstance(value, dict) or key not in value:
        has = ', '.join(value) if isinstance(value, dict) else repr(value)
        raise _Failure(f'has no score {self.score_key!r}, but {has:.200}')
      value = value[key]
    numbers = dict(_numbers(value))
    if not numbers:
      raise _Failure(f'printed {value!r:.80}: expected a number or an object')
    return numbers.get('', numbers)

  def _described(
      self, failure: _Failure, path: str, files: Sequence[pathlib.Path]
  ) -> str:
    ends = [file.read_bytes()[-_TAIL:] for file in files if file.exists()]
    texts = [end.decode(errors='replace').strip() for end in ends]
    tail = next(filter(None, reversed(texts)), '(nothing)')
    kept = ''
    if self.outputs is not None:
      kept = f'All of it is in {files[0]} and {files[1].name}.'
    return (
        f'The command {self.text.replace(PATH, path)} {failure}. It printed:\n'
        f'{tail}\n{kept}'.rstrip()
    )


def _waited(process: subprocess.Popen[bytes], seconds: float) -> int | None:
  try:
    return process.wait(seconds)
  except subprocess.TimeoutExpired:
    return None


def _end(process: subprocess.Popen[bytes]) -> None:
  """Ends a command, and what it started and left behind."""
  for number in (signal.SIGTERM, signal.SIGKILL):
    end = time.monotonic() + _GRACE
    with contextlib.suppress(ProcessLookupError):  # None of them is left.
      os.killpg(process.pid, number)
      while time.monotonic() < end:
        _waited(process, 0.02)
        os.killpg(process.pid, 0)
        time.sleep(0.02)


def _parsed(text: str) -> tuple[Any] | None:
  """What JSON says, in a tuple of its own; None if it is no JSON."""
  for parse in (_json.parsed, float):  # nan is a score, which is refused.
    with contextlib.suppress(ValueError):
      return (parse(text),)
  return None


def _numbers(value: Any, name: str = '') -> Iterator[tuple[str, float]]:
  """All numbers of nested objects, by their path."""
  if isinstance(value, dict):
    for key, inner in value.items():
      yield from _numbers(inner, f'{name}/{key}' if name else key)
  elif isinstance(value, (int, float)) and not isinstance(value, bool):
    yield name, float(value)


def identity(command: str, score_key: str = '') -> str:
  """The command, with hashes of the scripts that it names, for a `ScoreLog`.

  Args:
    command, score_key: as for `from_command`.

  Returns:
    A text that changes if one of these scripts does.
  """
  files = [pathlib.Path(w) for w in shlex.split(command) if os.path.isfile(w)]
  # Scripts; not programs and data.
  small = [f for f in files if f.suffix and f.stat().st_size < 10**6]
  hashes = [hashlib.sha256(f.read_bytes()).hexdigest()[:16] for f in small]
  said = [f'(sha256 {h})' for h in hashes]
  return ' '.join(filter(None, [command, score_key, *said]))
