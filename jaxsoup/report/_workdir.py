"""The report of an experiment, from the files in its workdir.

```
files = report.write_report('runs/digits')
```
"""

from collections.abc import Mapping
from collections.abc import Sequence
import json
import pathlib
import shlex
from typing import Any
from typing import NamedTuple

from jaxsoup import _json
from jaxsoup import checkpoints
from jaxsoup._soup import LearnedInfo
from jaxsoup._soup import SearchInfo
from jaxsoup.report import _candidates
from jaxsoup.report import _landscape_sections
from jaxsoup.report import _page
from jaxsoup.report import _rows
from jaxsoup.report import _scores
from jaxsoup.report import _sections
from jaxsoup.report._page import Code
from jaxsoup.report._page import Section
from jaxsoup.report._page import Table
from jaxsoup.report._rows import Row
from jaxsoup.typing import Config
from jaxsoup.typing import Json
from jaxsoup.typing import PathLike


class Contents(NamedTuple):
  """What a workdir says about its experiment.

  Attributes:
    rows: a row a model.
    settings: hyper-parameters of each row, empty of soups and ensembles.
    summary: means and deviations over the splits; empty of one.
    soups: `checkpoints.provenance` by name, of the first split.
    results: `results.json`.
    landscape: by part, `landscape/*.json`: planes, lines, angles, diagnosis.
  """

  rows: list[Row]
  settings: list[Json]
  summary: list[list[Row]]
  soups: dict[str, Json]
  results: Json
  landscape: Json = {}


def write_report(
    source: PathLike,
    out: PathLike | None = None,
    *,
    further: Sequence[Section] = (),
    metrics: Sequence[str] | None = None,
    **columns: Any,
) -> list[pathlib.Path]:
  """Writes one HTML file of an experiment, a table of scores, or a score log.

  Args:
    source: a workdir, a file for `read_scores`, or a `checkpoints.ScoreLog`,
      of which all candidates are compared.
    out: the HTML file; by default `report.html` in the workdir, or a file
      of the same name next to the table. An existing file is overwritten.
    further: sections that come before the last, which says how the experiment
      was made; of a table of scores, at the end.
    metrics: of a score log with several scores each: those that are compared.
    **columns: of a table of scores, as in `read_scores`.

  Returns:
    All files: the page, then pictures and numbers behind it.

  Raises:
    FileNotFoundError: no such file, or an experiment that is not finished.
    TypeError: columns for a workdir.
    ValueError: as `read_scores`; a damaged `results.json`.
  """
  source = pathlib.Path(source)
  is_log = _candidates.is_score_log(source)
  if metrics is not None and not is_log or columns and is_log:
    raise ValueError(
        f'{source} is {"a" if is_log else "not a"} score log: '
        'metrics= (--metrics) is for those, and names of columns are for '
        'tables of scores.'
    )
  if columns and source.is_dir():
    raise TypeError(
        f'{source} is a workdir, whose data sets are known: leave out '
        f'{sorted(columns)}, which name columns of a file of scores.'
    )
  intro = ''
  if is_log:
    title = f'Searches in {source.name}'
    sections = [*_candidates.log_sections(source, metrics), *further]
  elif source.is_dir():
    contents = read_workdir(source)
    *made, origin = sections_of(contents)
    title, intro = f'Soups of {source.absolute().name}', _intro(contents.rows)
    sections = [*made, *further, origin]
  else:
    rows, settings = _scores.read_scores(source, **columns)
    title, intro = f'Scores of {source.name}', _intro(rows)
    sections = [
        _sections.table_section(rows, settings=settings),
        *_sections.scatter_sections(rows),
        _sections.models_section(rows, settings),
        *_sections.setting_sections(rows, settings),
        *further,
    ]
  if out is None:
    is_dir = source.is_dir()
    out = source / 'report.html' if is_dir else source.with_suffix('.html')
  return _page.write_page(out, title, sections, intro=intro)


def read_workdir(workdir: PathLike) -> Contents:
  """Reads what the report of an experiment is about; no parameters.

  Raises:
    FileNotFoundError: no `results.json`.
    ValueError: a damaged one.
  """
  workdir = pathlib.Path(workdir)
  path = workdir / 'results.json'
  if not path.is_file():
    begun = (workdir / 'config.json').is_file()
    raise FileNotFoundError(
        f'{workdir} has no results.json: '
        + (
            'the experiment is not finished. Run its command again to continue.'
            if begun
            else 'it is not the workdir of an experiment. A report needs one, '
            'or a file of scores: .jsonl, .json or .csv.'
        )
    )
  try:
    results = {'config': {}, 'runs': [], **_json.read(path)}
    rows = _rows.read_rows(path)
    if not rows:
      raise ValueError('it has no rows')
    summary = [_rows.rows_of(x) for x in results.get('summary', [])]
  except (AttributeError, KeyError, TypeError, ValueError) as e:
    raise ValueError(
        f'{path} is unreadable: {e}. Run the command of the experiment again, '
        'which writes a new one.'
    ) from e
  settings = _settings(rows, results['runs'])
  return Contents(
      rows,
      settings,
      summary,
      _soups(workdir, rows),
      results,
      _landscape_sections.read_landscape(workdir),
  )


def _settings(rows: Sequence[Row], runs) -> list[Json]:
  """Hyper-parameters of each row, by the number that its name begins with."""
  settings: list[Json] = [{} for _ in rows]
  for row, setting in zip(rows, settings):
    number, _, copy = row.name.partition('_')
    if row.kind == 'single' and number.isdecimal() and int(number) < len(runs):
      setting.update(runs[int(number)], **{'copy': copy} if copy else {})
  return settings


def _soups(workdir: pathlib.Path, rows: Sequence[Row]):
  folder = workdir / 'soups'
  if not folder.is_dir():
    folder = workdir / 'splits' / '0' / 'soups'
  soups = {}
  for path in sorted(folder.glob('*')) if folder.is_dir() else []:
    own = checkpoints.provenance(path)
    metadata = own.get('metadata', {})
    parts = (metadata.get('recipe', path.name), metadata.get('batch_norm'))
    soups[', '.join(part for part in parts if part)] = own
  order = [row.name for row in rows]
  place = lambda name: order.index(name) if name in order else len(order)
  return {name: soups[name] for name in sorted(soups, key=place)}


def sections_of(contents: Contents) -> list[Section]:
  """The sections of an experiment; the last says how it was made."""
  rows, settings = contents.rows, contents.settings
  results, models = contents.results, _sections.models_of(rows)
  soups = contents.soups.items()
  infos: Json = {name: own.get('info') for name, own in soups}
  infos = {k: x for k, x in infos.items() if isinstance(x, SearchInfo)}
  alphas = {name: own['alpha'] for name, own in soups if 'alpha' in own}
  greedy = next((x for name, x in infos.items() if 'greedy' in name), None)
  is_nll = results['config'].get('select_by') == 'nll'
  return [
      _sections.table_section(
          rows,
          settings=settings,
          summary=contents.summary,
          sets=results.get('roles'),
      ),
      *_sections.scatter_sections(rows),
      _sections.models_section(rows, settings),
      *_sections.trial_sections(
          _first_of_each(infos),
          label='held-out log-likelihood'
          if is_nll
          else f'held-out {rows[0].metric} (%)',
          scale=1 if is_nll else 100,
          models=models,
      ),
      *_sections.alpha_sections(_first_of_each(alphas), models),
      *_around(contents),
      *_sections.calibration_sections(results.get('calibration', {})),
      *_sections.setting_sections(
          rows, settings, chosen=greedy.accepted if greedy else ()
      ),
      *_sections.stability_sections(results.get('stability', {})),
      *_landscape_sections.diagnosis_sections(
          contents.landscape.get('diagnosis', {})
      ),
      _origin(contents),
  ]


def _around(contents: Contents) -> list[Section]:
  """The landscape between the models."""
  parts = contents.landscape
  singles, _ = _sections.singles_with(contents.settings, contents.rows)
  names = [row.name for row, _ in singles]
  settings = [setting for _, setting in singles]
  return [
      *_landscape_sections.plane_sections(
          parts.get('plane', {}), names, _sections.models_of(contents.rows)
      ),
      *_landscape_sections.barrier_sections(
          parts.get('lines', {}), names, settings
      ),
      *_landscape_sections.angle_sections(
          parts.get('angles', {}),
          parts.get('pairs', {}),
          names,
          settings,
          metric=contents.rows[0].metric,
      ),
  ]


def _first_of_each(soups: Mapping[str, Config]) -> Json:
  """One soup a recipe: those with other running statistics are one mixture."""
  first: Json = {}
  for name, value in soups.items():
    first.setdefault(name.partition(',')[0], value)
  return first


def _origin(contents: Contents) -> Section:
  """Command, versions, config, runs, data, soups."""
  results, soups = contents.results, contents.soups
  parts: list[_page.Part] = []
  owns = [own for own in soups.values() if own.get('command')]
  commands = dict.fromkeys(shlex.join(own['command']) for own in owns)
  if commands:
    parts += ['To reproduce it:', Code('\n'.join(commands))]
  versions = {
      f'{name} {number}': ''
      for own in owns
      for name, number in own.get('versions', {}).items()
  }
  if versions:
    times = sorted(own['time'][:19].replace('T', ' ') for own in owns)
    parts.append(
        f'The soups were made from {times[0]} to {times[-1]} UTC, with '
        f'{", ".join(versions)}.'
    )
  if results.get('diverged'):
    names = ', '.join(results['diverged'])
    parts.append(f'Left out, with NaN or infinite values: {names}.')
  if results.get('data'):
    parts.append(_data(results['data']))
  config = dict(results['config'])
  for part in contents.landscape.values():
    settings = part.get('settings', {})
    config |= {f'landscape.{k}': v for k, v in settings.items()}
  cells = [[k, json.dumps(v)] for k, v in config.items()]
  parts.append(Table(['', 'value'], cells, 'Config', is_folded=True))
  if soups:
    parts.append(_provenance(soups))
  return Section('Provenance', parts)


def _data(record: Mapping[str, Config]) -> Table:
  body = [
      [name, f'{x["num"]:,}', str(x.get('rule', '')), x.get('sha256', '')[:16]]
      for name, x in record.items()
  ]
  header = ['data set', 'examples', 'rule', 'SHA-256, first 16']
  return Table(header, body, 'Data', is_folded=True)


def _provenance(soups: Mapping[str, Config]) -> Table:
  body = []
  for name, own in soups.items():
    info = own.get('info')
    beta = f'{info.beta:.3f}' if isinstance(info, LearnedInfo) else ''
    body.append([name, beta, own.get('content_hash', '')[:16]])
  header = ['soup', 'temperature β', 'content hash, first 16']
  return Table(header, body, 'Soups', is_folded=True)


def _intro(rows: Sequence[Row]) -> str:
  names = {'single': 'fine-tuned model', 'soup': 'soup', 'ensemble': 'ensemble'}
  kinds = [row.kind for row in rows]
  counts = [(kinds.count(kind), name) for kind, name in names.items()]
  text = ', '.join(f'{n} {name}{"s" * (n != 1)}' for n, name in counts if n)
  best = _rows.best_single(rows)
  if best is None:
    return f'{text}.'
  return (
      f'{text}. The best single model on held-out data, which one would keep '
      f'without soups, is {rows[best].name}.'
  )
