"""A self-contained page: sections as one HTML file.

```
table = report.Table(['model', 'score'], [['greedy', '0.91']])
section = report.Section('Scores', [table, 'Higher is better.'])
report.write_page('out/report.html', 'My soups', [section])
```

Pictures are inline SVG in the colours of the page, so that they follow a dark
mode. Nothing is loaded; the one script, `page.js`, is part of the page, which
says the same without it.
"""

from collections.abc import Callable
from collections.abc import Mapping
from collections.abc import Sequence
import csv
import html
import io
import itertools
import json
import pathlib
import re
from typing import TYPE_CHECKING
from typing import Any
from typing import NamedTuple

import numpy as np

from jaxsoup import _files
from jaxsoup.report import _plots
from jaxsoup.typing import Config
from jaxsoup.typing import PathLike

if TYPE_CHECKING:
  from matplotlib.axes import Axes

# Matplotlib's black, white and grid: the colours of the page, in either mode.
_INK = {
    '#000000': 'currentColor',
    '#ffffff': 'var(--page)',
    '#e6e6e6': 'var(--grid)',
}


_SCRIPT = pathlib.Path(__file__).with_name('page.js')
# What a page of ours begins with.
_MARKER = '<meta name="generator" content="jaxsoup">'


class Strong(str):
  """A cell that matters."""


class Code(str):
  """A shell command, shown verbatim."""


class Labelled(NamedTuple):
  """A paragraph that begins with a bold word.

  Attributes:
    label: that word, or a few.
    text: the rest.
    is_indented: whether it belongs to the one before.
  """

  label: str
  text: str
  is_indented: bool = False


class Table(NamedTuple):
  """A table; numbers are aligned by column.

  Attributes:
    header: a title for each column.
    rows: cells, all of them texts; a `Strong` one is bold.
    caption: what it shows, printed above it.
    is_folded: whether it is collapsed until a reader opens it.
    has_models: whether each row is a model, which `Picture.points` are about.
  """

  header: Sequence[str]
  rows: Sequence[Sequence[str]]
  caption: str = ''
  is_folded: bool = False
  has_models: bool = False


DrawFn = Callable[['Axes'], None]


class Picture(NamedTuple):
  """A picture, with a description in words.

  Attributes:
    name: of its files, without a suffix.
    draw: is called with a matplotlib Axes. Black and white become the ink and
      the background of the page; what has to stay, such as numbers on a heat
      map, is '#010101' or '#fefefe'.
    alt: a description for readers who cannot see it.
    caption: below the picture.
    size: width and height in inches; narrow, so that its text is legible on a
      phone.
    points: where models lie on its first axes, in the units of these: (row of
      the table with `has_models`, x, y).
  """

  name: str
  draw: DrawFn
  alt: str
  caption: str = ''
  size: tuple[float, float] = (4.8, 3.6)
  points: Sequence[tuple[int, float, float]] = ()


Part = str | Labelled | Table | Picture


class Section(NamedTuple):
  """A part of a page.

  Attributes:
    title: its heading.
    parts: paragraphs (`str`, `Labelled`), `Table`, `Picture`, `Code`, in their
      order.
      Pictures that follow one another stand side by side where there is room.
    data: the numbers behind it, a list of records by file name: each becomes
      a CSV file.
  """

  title: str
  parts: Sequence[Part]
  data: Mapping[str, Sequence[Config]] = {}


def write_page(
    path: PathLike, title: str, sections: Sequence[Section], *, intro: str = ''
) -> list[pathlib.Path]:
  """Writes a page, and next to it its pictures and the numbers behind them.

  Args:
    path: of the HTML file. The pictures (SVG and PNG) and the numbers (CSV) go
      into the directory of that name without its suffix.
    title: of the page.
    sections: in their order.
    intro: a paragraph below the title.

  Returns:
    All files, the page first.

  Raises:
    ValueError: a path without a suffix; two pictures or tables of one name.
  """
  path = pathlib.Path(path)
  if not path.suffix:
    raise ValueError(
        f'{path} has no suffix, and the directory of that name is for its '
        f'pictures: call it {path / "report" if path.is_dir() else path}.html.'
    )
  folder = path.with_suffix('')
  pictures = [
      part for s in sections for part in s.parts if isinstance(part, Picture)
  ]
  data = [item for s in sections for item in s.data.items()]
  for names in ([p.name for p in pictures], [name for name, _ in data]):
    if twice := {name for name in names if names.count(name) > 1}:
      raise ValueError(
          f'{sorted(twice)} would be written twice into {folder}: give each '
          'picture and each table of numbers its own name.'
      )
  check_out(path)
  with _files.room_for(path):
    return _write(path, page(title, sections, intro=intro), pictures, data)


def _write(path, text, pictures, data) -> list[pathlib.Path]:
  """The page comes first: whole without the folder, which it marks as ours."""
  folder = path.with_suffix('')
  folder.mkdir(parents=True, exist_ok=True)
  with _files.replaced(path, _MARKER) as unfinished:
    unfinished.write_text(text, encoding='utf-8')
  files = [path]
  for picture in pictures:
    for ending in ('svg', 'png'):
      files.append(folder / f'{picture.name}.{ending}')
      _plots.save(picture.draw, files[-1], size=picture.size)
  for name, records in data:
    files.append(folder / f'{name}.csv')
    _write_csv(files[-1], records)
  return files


def check_out(path: pathlib.Path) -> None:
  """Raises if a page at `path` would take the place of something else."""
  _files.require_ours(path, _MARKER)
  folder = path.with_suffix('')
  if folder.exists() and not path.exists() and any(folder.iterdir()):
    raise FileExistsError(
        f'{folder} is not empty, and the pictures and numbers of {path} would '
        'go into it. Give another path.'
    )


def _write_csv(path: pathlib.Path, records) -> None:
  names = list(dict.fromkeys(name for record in records for name in record))
  with path.open('w', encoding='utf-8', newline='') as f:
    writer = csv.DictWriter(f, names)
    writer.writeheader()
    writer.writerows(records)


def page(title: str, sections: Sequence[Section], *, intro: str = '') -> str:
  """The HTML of a page.

  Args:
    title: of the page.
    sections: in their order.
    intro: a paragraph below the title.

  Returns:
    A whole document.

  Example:
    >>> text = page('Soups', [Section('Scores', ['1 < 2'])])
    >>> '<p>1 &lt; 2</p>' in text
    True
  """
  links = ''.join(
      f'<li><a href="#{_slug(s.title)}">{html.escape(s.title)}</a></li>'
      for s in sections
  )
  lines = [
      '<!DOCTYPE html>',
      '<html lang="en">',
      '<head>',
      '<meta charset="utf-8">',
      _MARKER,
      '<meta name="viewport" content="width=device-width, initial-scale=1">',
      '<meta name="color-scheme" content="light dark">',
      f'<title>{html.escape(title)}</title>',
      f'<style>{_STYLE}</style>',
      '</head>',
      '<body>',
      '<main>',
      f'<h1>{html.escape(title)}</h1>',
      *([f'<p>{html.escape(intro)}</p>'] if intro else []),
      *([f'<nav><ul>{links}</ul></nav>'] if len(sections) > 1 else []),
      *(_section(section) for section in sections),
      '</main>',
      f'<script>\n{_SCRIPT.read_text(encoding="utf-8")}</script>',
      '</body>',
      '</html>',
  ]
  return '\n'.join(lines) + '\n'


def _slug(title: str) -> str:
  return re.sub(r'\W+', '-', title.lower()).strip('-')


def _section(section: Section) -> str:
  title = html.escape(section.title)
  lines = ['<section>', f'<h2 id="{_slug(section.title)}">{title}</h2>']
  is_picture = lambda part: isinstance(part, Picture)
  for are_pictures, group in itertools.groupby(section.parts, is_picture):
    if are_pictures:
      figures = [_figure(part) for part in group if isinstance(part, Picture)]
      lines += ['<div class="pictures">', *figures, '</div>']
    else:
      lines += map(_part, group)
  return '\n'.join([*lines, '</section>'])


def _part(part: Any) -> str:
  if isinstance(part, Table):
    return _table(part)
  if isinstance(part, Labelled):
    label, text = html.escape(part.label), html.escape(part.text)
    opened = '<p class="indented">' if part.is_indented else '<p>'
    return f'{opened}<b>{label}</b> {text}</p>'
  if isinstance(part, Code):
    return f'<pre tabindex="0"><code>{html.escape(part)}</code></pre>'
  return f'<p>{html.escape(part)}</p>'


def _table(table: Table) -> str:
  caption = html.escape(table.caption)
  head = ''.join(f'<th scope="col">{html.escape(x)}</th>' for x in table.header)
  body = '\n'.join(
      f'<tr><th scope="row">{html.escape(row[0])}</th>'
      + ''.join(map(_cell, row[1:]))
      + '</tr>'
      for row in table.rows
  )
  # What is wider than the screen scrolls, also by keyboard.
  kind = ' class="models"' if table.has_models else ''
  text = (
      f'<div class="scroll" tabindex="0" role="region" aria-label="'
      f'{html.escape(table.caption or "table")}"><table{kind}>\n'
      f'<thead><tr>{head}</tr></thead>\n<tbody>\n{body}\n</tbody>'
      '</table></div>'
  )
  if table.is_folded:
    return f'<details><summary>{caption}</summary>\n{text}\n</details>'
  return f'<p class="caption">{caption}</p>\n{text}' if caption else text


def _cell(text: str) -> str:
  escaped = html.escape(text)
  if isinstance(text, Strong):
    return f'<td><strong>{escaped}</strong></td>'
  return f'<td>{escaped}</td>'


def _figure(picture: Picture) -> str:
  caption = html.escape(picture.caption)
  below = f'\n<figcaption>{caption}</figcaption>' if caption else ''
  width = f'style="max-width: {1.4 * picture.size[0]:.1f}in"'
  return f'<figure {width}>\n{svg(picture)}{below}\n</figure>'


def svg(picture: Picture) -> str:
  """A picture as an inline SVG element, in the colours of the page."""
  file = io.StringIO()
  nothing = dict.fromkeys(('Date', 'Creator', 'Format', 'Type'))
  # With a salt, equal pictures are equal files.
  with _plots.drawn(picture.draw, picture.size, picture.name) as fig:
    fig.savefig(file, format='svg', transparent=True, metadata=nothing)
    to_figure = fig.axes[0].transData + fig.transFigure.inverted()
    places = to_figure.transform(
        [(x, y) for _, x, y in picture.points] or [(0, 0)]
    )
  text = file.getvalue()
  text = text[text.index('<svg') :].strip()
  # Ids on one page must be unique.
  name = _slug(picture.name)
  text = re.sub(r'\bid="', f'id="{name}-', text)
  text = re.sub(r'(href="|url\()#', rf'\g<1>#{name}-', text)
  for colour, variable in _INK.items():
    text = text.replace(colour, variable)
  _, _, rest = text.partition('>')
  width, height = (72 * x for x in picture.size)
  alt = html.escape(picture.alt)
  points = [
      [row, round(width * x, 1), round(height * (1 - y), 1)]
      for (row, *_), (x, y) in zip(picture.points, places)
      if np.isfinite((x, y)).all()
  ]
  data = f'data-points="{json.dumps(points)}" ' if points else ''
  return (
      '<svg xmlns="http://www.w3.org/2000/svg" '
      'xmlns:xlink="http://www.w3.org/1999/xlink" role="img" '
      f'aria-label="{alt}" {data}viewBox="0 0 {width:g} {height:g}">{rest}'
  )


# A shade at the right edge shows that a table can be scrolled.
# Okabe and Ito's colours in the pictures have at least a contrast of three to
# one with both backgrounds, but for yellow and sky blue on white, which carry
# marks of different shapes, too.
_STYLE = """
:root { color-scheme: light dark; --page: #ffffff; --ink: #1c2024;
  --soft: #59626b; --grid: #e3e6e9; --link: #0b5fa5; --band: #f5f7f8; }
@media (prefers-color-scheme: dark) {
  :root { --page: #14181c; --ink: #e4e8eb; --soft: #a3adb6; --grid: #343b42;
    --link: #7cc0f5; --band: #1b2126; } }
* { box-sizing: border-box; }
html { -webkit-text-size-adjust: 100%; text-size-adjust: 100%; }
body { margin: 0; background: var(--page); color: var(--ink);
  font: 16px/1.5 system-ui, sans-serif; }
main { max-width: 75rem; margin: 0 auto; padding: 1rem; }
h1 { font-size: 1.6rem; line-height: 1.2; margin: .5rem 0; }
h2 { font-size: 1.25rem; margin: 2.2rem 0 .6rem;
  border-bottom: 1px solid var(--grid); padding-bottom: .2rem; }
p { max-width: 46rem; margin: .5rem 0; overflow-wrap: anywhere; }
p.indented { margin: .15rem 0 .15rem 1.2rem; }
a { color: var(--link); }
nav ul { display: flex; flex-wrap: wrap; gap: .3rem 1.1rem; padding: 0;
  list-style: none; }
.scroll { overflow-x: auto; margin: .6rem 0; max-width: fit-content;
  background:
  linear-gradient(var(--page), var(--page)) right -1px top / .8rem 100% local
  no-repeat,
  linear-gradient(to left, var(--soft), transparent) right / .6rem 100% scroll
  no-repeat; }
table { border-collapse: collapse; font-size: .9rem;
  font-variant-numeric: tabular-nums; }
th, td { padding: .3rem .65rem; text-align: right; white-space: nowrap; }
thead th { color: var(--soft); font-weight: 600;
  border-bottom: 1px solid var(--soft); vertical-align: bottom; }
tbody tr > * { border-bottom: 1px solid var(--grid); }
th:first-child { text-align: left; position: sticky; left: 0; font-weight: 600;
  background: var(--page); max-width: 60vw; overflow: hidden;
  text-overflow: ellipsis; }
.caption, figcaption, summary { color: var(--soft); font-size: .9rem; }
summary { cursor: pointer; padding: .3rem 0; }
.pictures { display: flex; flex-wrap: wrap; gap: 1.2rem 2rem;
  align-items: flex-start; }
figure { margin: .5rem 0; width: 100%; }
@media (min-width: 60rem) { figure { width: calc(50% - 1rem); } }
svg { display: block; width: 100%; height: auto; fill: currentColor; }
pre { background: var(--band); padding: .7rem; overflow-x: auto;
  font-size: .85rem; }
tr.selected > * { background: var(--band); }
tr.selected > th { color: var(--link); }
thead th[tabindex], tr[tabindex], svg[data-points] { cursor: pointer; }
.scroll:has(.models) { overflow: auto; max-height: 70vh; }
.models thead th { position: sticky; top: 0; background: var(--page); }
.models thead th:first-child { z-index: 1; }
th[aria-sort=ascending]::after { content: ' \25B2'; }
th[aria-sort=descending]::after { content: ' \25BC'; }
circle.out { fill: var(--page); opacity: .85; }
circle.in { fill: var(--link); }
circle.ring { fill: none; stroke: var(--ink); stroke-width: 1.2;
  filter: drop-shadow(0 0 1px var(--page)); }
circle.selected { stroke: var(--link); stroke-width: 2.4; }
#tip { position: fixed; z-index: 9; max-width: 20rem; padding: .4rem .6rem;
  background: var(--band); border: 1px solid var(--soft); font-size: .8rem;
  line-height: 1.35; pointer-events: none; overflow-wrap: anywhere; }
.filter > * { font: inherit; max-width: 9rem; margin: 0 .2rem; }
@media print { details::details-content { content-visibility: visible; }
  .filter, #tip { display: none; }
  .scroll { overflow: visible !important; max-height: none !important; }
  table { font-size: .7rem; }
  table.models { font-size: .5rem; }
  th, td { padding: .1rem .25rem; }
  thead th { white-space: normal; }
  .pictures { display: block; }
  h2 { break-after: avoid; } }
"""
