"""The HTML report: whole, safe, readable, and with the numbers it is about."""

import collections
import csv
import functools
import html
from html import parser
import json
import re

import numpy as np
import pytest
from scipy import stats
from sklearn import calibration
from typer import testing

import jaxsoup
from jaxsoup import checkpoints
from jaxsoup import cli
from jaxsoup import metrics
from jaxsoup import report
from jaxsoup._soup import LearnedInfo
from jaxsoup.report import _page
from jaxsoup.report import _plots
from jaxsoup.report import _sections

VOID = {'meta', 'link', 'img', 'br', 'hr', 'input'}
# A name that would be read as HTML where it is not escaped.
WILD = 'rate <b>&"\'é'


class Page(parser.HTMLParser):
  """Walks through a page, and refuses tags that do not fit together."""

  def __init__(self, files):
    super().__init__(convert_charrefs=True)
    text = files[0].read_text(encoding='utf-8')
    self.open, self.tags, self.tables, self.texts = [], [], [], []
    self._cell = None
    self.feed(text)
    self.close()
    assert not self.open, self.open

  def handle_starttag(self, tag, attrs):
    self.tags.append((tag, dict(attrs)))
    if tag not in VOID:
      self.open.append(tag)
    if tag == 'table':
      self.tables.append([])
    if tag == 'tr':
      self.tables[-1].append([])
    if tag in ('td', 'th'):
      self.tables[-1][-1].append('')
      self._cell = self.tables[-1][-1]

  def handle_startendtag(self, tag, attrs):
    self.tags.append((tag, dict(attrs)))

  def handle_endtag(self, tag):
    assert self.open and self.open.pop() == tag, (tag, self.open)
    if tag in ('td', 'th'):
      self._cell = None

  def handle_data(self, data):
    if self._cell is not None:
      self._cell[-1] += data
    elif self.open and self.open[-1] not in ('style', 'title', 'script'):
      self.texts.append(data)

  def table(self, *header):
    """Cells by row name of the table whose header begins so."""
    (cells,) = (t for t in self.tables if t[0][: len(header)] == list(header))
    return {row[0]: dict(zip(cells[0][1:], row[1:])) for row in cells[1:]}

  @property
  def text(self):
    return ' '.join(' '.join(self.texts).split())

  def of(self, name):
    return [attrs for tag, attrs in self.tags if tag == name]


NUM_RUNS = 5
SIZES = {'held_out': 200, 'test': 300, 'blur': 300}


@functools.cache
def logits_and_labels():
  rng = np.random.default_rng(0)
  label = {k: rng.integers(3, size=n) for k, n in SIZES.items()}
  shared = {k: rng.normal(size=(n, 3)) for k, n in SIZES.items()}
  names = [f'{k:02d}' for k in range(NUM_RUNS)] + [
      'uniform',
      'greedy',
      'tensor',
  ]
  logits = {
      name: {
          k: (1 + 0.3 * i - (k == 'blur')) * np.eye(3)[label[k]]
          + shared[k]
          + 0.5 * rng.normal(size=(n, 3))
          for k, n in SIZES.items()
      }
      for i, name in enumerate(names)
  }
  return logits, label


@functools.cache
def rows_of_models():
  logits, label = logits_and_labels()
  rows = []
  for name, x in logits.items():
    score = {k: float(np.mean(x[k].argmax(-1) == label[k])) for k in SIZES}
    rows.append(
        report.Row(
            name,
            'single' if name.isdigit() else 'soup',
            score['held_out'],
            score['test'],
            {'blur': score['blur']},
            0.5,
            float(metrics.expected_calibration_error(x['test'], label['test'])),
            1,
        )
    )
  return report.with_gains(rows, list(logits.values()), label)


def curve(name):
  logits, label = logits_and_labels()
  reliability = metrics.reliability(logits[name]['test'], label['test'])
  return {k: np.asarray(x).tolist() for k, x in reliability._asdict().items()}


RUNS = [
    {'seed': k, WILD: 10.0**-k, 'augmented': k % 2 > 0, 'same': 1}
    for k in range(NUM_RUNS)
]
TREE = {'block': {'kernel': 1.0, 'bias': 2.0}, 'head': 3.0}


def soups_of(models):
  """A soup of each kind: from a search, uniform, one alpha a tensor."""
  greedy = jaxsoup.greedy(models, lambda p: -float(abs(p['head'] - 4.5).sum()))
  rng = np.random.default_rng(1)
  leaf = lambda: rng.dirichlet(np.ones(NUM_RUNS)).astype(np.float32)
  alpha = {'block': {'kernel': leaf(), 'bias': leaf()}, 'head': leaf()}
  info = LearnedInfo(1.25, np.ones(2), np.ones(2), 1, ())
  return {
      'uniform': jaxsoup.uniform(models),
      'greedy': greedy,
      'tensor': jaxsoup.Soup(models[0], alpha, info),
  }


@pytest.fixture(scope='module')
def workdir(tmp_path_factory):
  """What an experiment leaves behind, made by hand."""
  folder = tmp_path_factory.mktemp('runs') / 'digits'
  models = [
      {
          'block': {
              k: np.full(2, v + i, 'f') for k, v in TREE['block'].items()
          },
          'head': np.full(2, TREE['head'] + i, 'f'),
      }
      for i in range(NUM_RUNS)
  ]
  for name, soup in soups_of(models).items():
    metadata = {'recipe': name, 'seed': 0}
    checkpoints.save(folder / 'soups' / name, soup, metadata=metadata)
  results = {
      'config': {'seed': 0, 'sweep.num_runs': NUM_RUNS, 'note': WILD},
      'runs': RUNS,
      'data': {'train': {'num': 1234, 'sha256': 'f' * 64, 'rule': WILD}},
      'rows': [row._asdict() for row in rows_of_models()],
      'alpha': {},
      'roles': {'selected': {'held-out': 200}, 'reported': {'test': 300}},
      'calibration': {
          'best single': curve('04'),
          **{name: curve(name) for name in ('uniform', 'greedy')},
      },
      'stability': {
          'greedy ensemble': {
              'chosen': [0, 2],
              'frequency': [0.9, 0.1, 0.6, 0.0, 0.0],
              'overlap': 0.75,
              'sizes': [1, 2, 3],
              'num_evaluated': 4,
          }
      },
  }
  (folder / 'config.json').write_text('{}')
  (folder / 'results.json').write_text(json.dumps(results))
  return folder


@pytest.fixture(scope='module')
def written(workdir):
  files = report.write_report(workdir)
  return files, files[0].read_text(encoding='utf-8'), Page(files)


def test_the_page_is_whole_and_alone(written, workdir):
  files, text, page = written
  assert files[0] == workdir / 'report.html'
  assert page.of('script') == [{}] and not page.of('link')
  assert not page.of('img') and 'import(' not in text and 'fetch(' not in text
  loads = ('src', 'href', 'xlink:href', 'srcset', 'data', 'action')
  links = [a[k] for _, a in page.tags for k in loads if k in a]
  assert links and all(x.startswith(('#', 'data:image/png')) for x in links)
  assert '@import' not in text and '@font-face' not in text
  # Names of XML are no addresses that are loaded; there are no others.
  assert set(re.findall(r'https?://[^"\s]*', text)) == {
      'http://www.w3.org/2000/svg',
      'http://www.w3.org/1999/xlink',
  }
  ids = collections.Counter(a['id'] for _, a in page.tags if 'id' in a)
  assert ids.most_common(1)[0][1] == 1
  local = [x[1:] for x in links if x.startswith('#')]
  local += re.findall(r'url\(#([^)]*)\)', text)
  assert local and set(local) <= ids.keys()


def test_pictures_are_described_and_have_the_colours_of_the_page(written):
  _, text, page = written
  pictures = [a for a in page.of('svg')]
  # Scatter, one search, two of alpha, calibration, two settings, stability.
  assert len(pictures) == 8
  for picture in pictures:
    assert picture['role'] == 'img' and len(picture['aria-label']) > 40
  drawn = re.sub(r'<style>.*?</style>', '', text, count=1, flags=re.DOTALL)
  assert 'currentColor' in drawn and 'var(--page)' in drawn
  assert '#000000' not in drawn and '#ffffff' not in drawn
  assert 'width=device-width' in text
  assert len(page.of('h1')) == 1 and len(page.of('html')[0]['lang']) == 2


def luminance(colour):
  c = np.array([int(colour[i : i + 2], 16) for i in (1, 3, 5)]) / 255
  c = np.where(c <= 0.04045, c / 12.92, ((c + 0.055) / 1.055) ** 2.4)
  return float(c @ [0.2126, 0.7152, 0.0722])


def contrast(a, b):
  low, high = sorted((luminance(a), luminance(b)))
  return (high + 0.05) / (low + 0.05)


def test_contrasts():
  """WCAG 2.2: text 4.5 to 1, marks in pictures 3 to 1."""
  light, dark = (
      dict(re.findall(r'--(\w+): (#\w{6})', block))
      for block in re.findall(r':root \{(.*?)\}', _page._STYLE, re.DOTALL)
  )
  assert luminance(light['page']) > 0.9 and luminance(dark['page']) < 0.02
  for colours in (light, dark):
    for name in ('ink', 'soft', 'link'):
      assert contrast(colours[name], colours['page']) >= 4.5
    assert contrast(colours['ink'], colours['band']) >= 4.5
  assert all(contrast(c, dark['page']) >= 3 for c in _plots.COLOURS)
  # The marks of these differ in shape, too.
  weak = {c for c in _plots.COLOURS if contrast(c, light['page']) < 3}
  assert weak == {'#E69F00', '#56B4E9'}


def test_scores_are_those_of_the_results(written):
  _, _, page = written
  table = page.table('', 'held-out', 'test', 'gain')
  shown = report.summary(rows_of_models())
  assert list(table) == [row.name for row in shown]
  for row in shown:
    cells = table[row.name]
    assert cells['held-out'] == f'{100 * row.held_out:.1f}'
    assert cells['test'] == f'{100 * row.test:.1f}'
    assert cells['mean of shifts'] == f'{100 * row.mean_shift:.1f}'
    assert cells['ECE'] == f'{100 * row.ece:.1f}'
  markdown = report.markdown(shown, sets={'selected': {'held-out': 200}})
  # Every cell of the other table, the gains with their intervals included.
  for line in markdown.split('\n')[2 : 2 + len(shown)]:
    name, *cells = (x.strip(' *') for x in line.strip('|').split('|'))
    assert [name, *cells] in page.tables[0]
  assert 'Examples: selected on held-out (200); reported on test (300)' in (
      page.text
  )
  better = [r.name for r in shown if r.gains and r.gains['test'].is_significant]
  assert better
  assert (
      'On test data, significantly better than the best single model: '
      f'{", ".join(better)}' in page.text
  )
  bold = [a for tag, a in page.tags if tag == 'strong']
  assert len(bold) == sum(
      row.gains[k].is_significant and row.gains[k].gain > 0
      for row in shown
      for k in ('test', 'shifts')
      if row.gains
  )


def test_line_of_the_scatter(written):
  _, _, page = written
  singles = [row for row in rows_of_models() if row.kind == 'single']
  fit = stats.linregress(
      [row.test for row in singles], [row.mean_shift for row in singles]
  )
  assert f'R² = {fit.rvalue**2:.2f}, slope {fit.slope:.2f}' in page.text
  got = _plots.line_fit(rows_of_models())
  expected = (fit.slope, fit.intercept, fit.rvalue**2)
  np.testing.assert_allclose(got, expected, rtol=1e-6)
  assert _plots.line_fit(singles[:2]) is None
  assert _plots.line_fit([singles[0]] * 4) is None
  assert _plots.line_fit([r._replace(shifts={}) for r in singles]) is None


def read_csv(files, name):
  (path,) = (f for f in files if f.name == name)
  with path.open(encoding='utf-8', newline='') as f:
    return list(csv.DictReader(f))


def test_numbers_behind_the_page(written, workdir):
  files, _, page = written
  assert all(f.is_file() and f.stat().st_size for f in files)
  assert {f.parent for f in files[1:]} == {workdir / 'report'}
  pictures = [f.stem for f in files if f.suffix == '.svg']
  assert pictures == [f.stem for f in files if f.suffix == '.png']
  assert len(pictures) == len(page.of('svg'))
  greedy = checkpoints.load(workdir / 'soups/greedy')
  trials = read_csv(files, 'trials.csv')
  assert [float(t['score']) for t in trials] == [
      t.score for t in greedy.info.trials
  ]
  assert [t['accepted'] == 'True' for t in trials] == [
      t.accepted for t in greedy.info.trials
  ]
  alpha = read_csv(files, 'alpha.csv')
  assert len(alpha) == NUM_RUNS * (1 + 1 + 3)
  tensor = checkpoints.load(workdir / 'soups/tensor').alpha
  got = [float(x['alpha']) for x in alpha if x['tensor'] == 'block/bias']
  np.testing.assert_allclose(got, tensor['block']['bias'], rtol=1e-6)
  table = page.table('soup', 'models', 'effective number')
  assert table['uniform']['effective number'] == f'{NUM_RUNS:.1f}'
  assert table['greedy']['models'] == str(len(greedy.info.accepted))
  # The soups in the order of the rows, not of the alphabet.
  assert list(table) == ['uniform', 'greedy', 'tensor']
  often = read_csv(files, 'stability_greedy_ensemble.csv')
  assert [float(x['frequency']) for x in often] == [0.9, 0.1, 0.6, 0.0, 0.0]
  assert 'it chooses 1 to 3 models (mean 2.0); the overlap' in page.text


def test_calibration_is_that_of_the_table(written):
  files, _, page = written
  rows = {row.name: row for row in rows_of_models()}
  table = page.table('', 'confidence', 'accuracy', 'ECE')
  assert list(table) == ['best single', 'uniform', 'greedy']
  for name, row in (('best single', '04'), ('greedy', 'greedy')):
    assert table[name]['ECE'] == f'{100 * rows[row].ece:.1f}'
    assert table[name]['accuracy'] == f'{100 * rows[row].test:.1f}'
  assert sum(int(r['num']) for r in read_csv(files, 'calibration.csv')) == 900


def test_calibration_weighs_bins():
  bins = {'confidence': [0.5, 0.9], 'accuracy': [0.0, 1.0], 'num': [1, 3]}
  (section,) = _sections.calibration_sections({'a': bins})
  # (0.5 + 3 x 0.9) / 4, (0 + 3 x 1) / 4, (0.5 + 3 x 0.1) / 4.
  assert section.parts[0].rows == [['a', '80.0', '75.0', '20.0']]


def test_reliability_of_two_classes_is_that_of_sklearn():
  rng = np.random.default_rng(3)
  logits = rng.normal(size=(120, 2)).astype(np.float32)
  label = rng.integers(2, size=120)
  probability = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
  right = (logits.argmax(-1) == label).astype(int)
  expected = calibration.calibration_curve(
      right, probability.max(-1), n_bins=6, strategy='quantile'
  )
  got = metrics.reliability(logits, label, num_bins=6)
  np.testing.assert_allclose(got.accuracy, expected[0], rtol=1e-5)
  np.testing.assert_allclose(got.confidence, expected[1], rtol=1e-5)
  assert got.num.tolist() == [20] * 6


def test_provenance(written):
  _, text, page = written
  assert page.table('', 'value')['note']['value'] == json.dumps(WILD)
  assert page.table('data set')['train']['rule'] == WILD
  assert '<b>' not in text
  assert (
      page.table('soup', 'temperature β')['tensor']['temperature β'] == '1.250'
  )
  assert f'jaxsoup {jaxsoup.__version__}' in page.text
  assert page.of('pre')


def test_all_models_with_all_scores(written):
  _, _, page = written
  table = page.table('model', 'kind', 'held-out')
  assert list(table) == [row.name for row in rows_of_models()]
  for row in rows_of_models():
    assert table[row.name]['blur'] == f'{100 * row.shifts["blur"]:.1f}'
    assert table[row.name]['test'] == f'{100 * row.test:.1f}'
  assert table['02'][WILD] == '0.01' and table['03']['augmented'] == 'True'
  assert table['greedy'][WILD] == ''


def test_constant_settings_and_seeds_are_not_drawn(written):
  files, _, _ = written
  drawn = [f.stem for f in files if f.name.startswith('setting_')]
  assert len(drawn) == 4 and not any('seed' in x or 'same' in x for x in drawn)


@pytest.mark.slow
def test_further_sections_come_before_the_last(workdir, tmp_path):
  drawn = []
  further = report.Section(
      'Barriers & more',
      [
          report.Picture('barriers', drawn.append, 'Nothing is to be seen.'),
          report.Code('jaxsoup diagnose <run>'),
      ],
      {'barriers': [{'a': 1}, {'a': 2, 'b': 3}]},
  )
  files = report.write_report(workdir, tmp_path / 'x.html', further=[further])
  page = Page(files)
  links = [a['href'] for a in page.of('a')]
  assert links[-2:] == ['#barriers-more', '#provenance']
  assert len(drawn) == 3 and 'jaxsoup diagnose <run>' in page.text
  assert read_csv(files, 'barriers.csv')[1] == {'a': '2', 'b': '3'}
  again = report.write_report(workdir, tmp_path / 'x.html', further=[further])
  assert again == files


@pytest.mark.slow
def test_several_splits(workdir, tmp_path):
  """The table has the means over the splits, as table.md has them."""
  results = json.loads((workdir / 'results.json').read_text())
  other = [
      row._replace(test=row.test - 0.02)._asdict() for row in rows_of_models()
  ]
  results['splits'] = [results['rows'], other]
  tables = [report.summary(report.rows_of(x)) for x in results['splits']]
  results['summary'] = [
      [row._asdict() for row in rows] for rows in report.mean_rows(tables)
  ]
  (tmp_path / 'results.json').write_text(json.dumps(results))
  soups = tmp_path / 'splits/0/soups'
  soups.parent.mkdir(parents=True)
  soups.symlink_to(workdir / 'soups')
  files = report.write_report(tmp_path, tmp_path / 'out.html')
  page = Page(files)
  cell = page.table('', 'held-out', 'test')['greedy']['test']
  mean = 100 * (rows_of_models()[6].test - 0.01)
  assert cell == f'{mean:.1f} ± {2 / np.sqrt(2):.1f}'
  assert 'Means ± deviations over splits.' in page.text
  assert 'trials_greedy.png' in [f.name for f in files]


def test_least_of_an_experiment(tmp_path):
  """No soups on the disk, nothing shifted, nothing of what is left out."""
  rows = [r._replace(shifts={}, gains={})._asdict() for r in rows_of_models()]
  (tmp_path / 'results.json').write_text(json.dumps({'rows': rows}))
  page = Page(report.write_report(tmp_path))
  assert [a['href'] for a in page.of('a')] == [
      '#scores', '#all-models', '#provenance'
  ]  # fmt: skip
  assert not page.of('svg') and 'Scores: accuracy, in per cent.' in page.text
  assert 'mean of shifts' not in page.tables[0][0]


# --- charts -------------------------------------------------------------------


def drawn(draw):
  from matplotlib import figure

  ax = figure.Figure().add_subplot()
  draw(ax)
  return ax


def test_bars_of_alpha():
  alpha = {'a': np.array([0.5, 0.25, 0.25]), 'b': np.array([0.0, -0.5, 1.5])}
  ax = drawn(lambda ax: _plots.alphas(ax, alpha))
  heights = [p.get_height() for p in ax.patches]
  # From below: b, then a, each by its own scale.
  expected = [0, -0.8 / 3, 0.8, 0.8, 0.4, 0.4]
  np.testing.assert_allclose(heights, expected, atol=1e-12)
  assert [t.get_text() for t in ax.get_yticklabels()] == ['b', 'a']


def test_map_of_alpha_names_blocks_where_there_is_no_room():
  few = [f'block_{i}/kernel' for i in range(3)]
  alpha = np.arange(6.0).reshape(3, 2)
  ax = drawn(lambda ax: _plots.alpha_map(ax, few, alpha))
  assert [t.get_text() for t in ax.get_yticklabels()] == few
  np.testing.assert_array_equal(ax.images[0].get_array(), alpha)
  many = [f'block_{i}/{j}' for i in range(40) for j in range(3)]
  ax = drawn(lambda ax: _plots.alpha_map(ax, many, np.ones((120, 2))))
  labels = [t.get_text() for t in ax.get_yticklabels()]
  assert labels == [f'block_{i}' for i in range(0, 40, 2)]
  np.testing.assert_array_equal(ax.get_yticks(), np.arange(0, 120, 6))
  # In the order of their numbers; what is too close to the last has no name.
  mixed = [f'block_{i}/{j}' for i in (10, 2) for j in range(20)] + ['a', 'b']
  ax = drawn(lambda ax: _plots.alpha_map(ax, mixed, np.ones((42, 1))))
  names = dict(zip(ax.get_yticks(), ax.get_yticklabels()))
  assert {y: t.get_text() for y, t in names.items()} == {
      0: 'a', 2: 'block_2', 22: 'block_10'
  }  # fmt: skip


def test_settings_are_numbers_or_kinds():
  y = [0.5, 0.6, 0.7]
  ax = drawn(lambda ax: _plots.against(ax, 'x', [1e-4, 1e-3, 1.0], y, [1]))
  assert ax.get_xscale() == 'log'
  hollow, filled = ax.collections
  np.testing.assert_allclose(filled.get_offsets(), [[1e-3, 60]])
  assert not len(hollow.get_facecolors()) and len(filled.get_facecolors())
  ax = drawn(lambda ax: _plots.against(ax, 'x', [0, 1, 30], y))
  assert ax.get_xscale() == 'linear'
  ax = drawn(lambda ax: _plots.against(ax, 'x', ['sgd', 'adam', 'sgd'], y))
  assert [t.get_text() for t in ax.get_yticklabels()] == ['adam', 'sgd']
  np.testing.assert_allclose(
      ax.collections[0].get_offsets(), [[50, 1], [60, 0], [70, 1]]
  )


def test_many_kinds_have_a_row_each():
  kinds = [f'rand-m{i}-mstd0.5-inc{i % 2}' for i in range(28)]
  values, y = kinds + kinds[:2], np.linspace(0.5, 0.8, 30)
  rows = [
      report.Row(str(i), 'single', x, x, {}, 0.5, 0.1, 1)
      for i, x in enumerate(y)
  ]
  (section,) = _sections.setting_sections(rows, [{'aug': v} for v in values])
  (picture,) = (x for x in section.parts if isinstance(x, report.Picture))
  with _plots.drawn(picture.draw, picture.size) as fig:
    fig.canvas.draw()
    (ax,) = fig.axes
    labels = ax.get_yticklabels()
    assert [t.get_text() for t in labels] == sorted(kinds)
    boxes = sorted((t.get_window_extent() for t in labels), key=lambda b: b.y0)
    assert all(a.y1 <= b.y0 for a, b in zip(boxes, boxes[1:]))
    # The place of a model is that of its mark.
    marks = ax.collections[0].get_offsets().tolist()
    assert marks == [[x, y] for _, x, y in picture.points]


def test_a_dollar_is_a_dollar(tmp_path):
  r"""`$\alpha$` would be a letter, and `$_$` an error of mathematics."""
  name = r'$\notacommand$ <b>'
  rows = [
      report.Row(name, 'soup', 0.9, 0.8, {'$_$': 0.7}, 0.5, 0.1, 1),
      report.Row('$_$', 'single', 0.8, 0.7, {'$_$': 0.6}, 0.5, 0.1, 1),
      report.Row('$^$', 'single', 0.7, 0.6, {'$_$': 0.5}, 0.5, 0.1, 1),
  ]
  settings = [{}, {'$x_$': '$_$', 'lr': 1e-5}, {'$x_$': '$^$', 'lr': 1e-3}]
  for section in (
      *_sections.scatter_sections(rows),
      *_sections.setting_sections(rows, settings),
      *_sections.alpha_sections({name: np.array([0.5, 0.5])}),
  ):
    for picture in section.parts:
      if isinstance(picture, report.Picture):
        with _plots.drawn(picture.draw, picture.size) as fig:
          fig.savefig(tmp_path / 'x.svg')
          (ax,) = fig.axes
          texts = [t.get_text() for t in ax.get_xticklabels()]
          assert not any('mathdefault' in text for text in texts)
        comments = re.findall(r'<!-- (.*) -->', _page.svg(picture))
        assert comments and not any('mathdefault' in x for x in comments)
  assert name in map(html.unescape, comments)


def test_one_model_twice_is_named():
  rows = list(rows_of_models())
  again = rows[1]._replace(name='05', nll=0.1)
  parts, *_ = [_sections.table_section([*rows, again]).parts]
  (text,) = (x for x in parts if 'Equal' in str(x))
  assert text == (
      'Equal scores on all 3 data sets: 01, 05. If that is one model, it '
      'counts 2 times.'
  )
  assert not any('Equal' in str(x) for x in _sections.table_section(rows).parts)


# --- tables of scores ---------------------------------------------------------

SCORES = """name,kind,held_out,test,shifts.v2,shifts.r,lr,optimizer
00,,0.80,0.78,0.66,0.50,1e-4,adam
01,single,0.82,0.79,0.70,0.52,3e-5,adam
02,single,0.70,0.69,0.60,0.41,1e-3,sgd
greedy,soup,0.83,0.80,0.72,0.55,,
"""


def as_json_lines(text):
  out = []
  for row in csv.DictReader(text.split()):
    record = {'shifts': {}, 'config': {}}
    for name, cell in row.items():
      is_text = name in ('name', 'kind', 'optimizer')
      group, _, short = name.rpartition('.')
      group = group or ('config' if name in ('lr', 'optimizer') else '')
      if cell:
        part = record[group] if group else record
        part[short] = cell if is_text else float(cell)
    out.append(record)
  return out


@pytest.fixture
def scores(tmp_path):
  path = tmp_path / 'scores.csv'
  path.write_text(SCORES)
  return path


def test_csv_and_json_say_the_same(scores, tmp_path):
  rows, settings = report.read_scores(scores)
  assert [row.name for row in rows] == ['00', '01', '02', 'greedy']
  assert [row.kind for row in rows] == ['single'] * 3 + ['soup']
  assert rows[1].held_out == 0.82 and rows[1].test == 0.79
  assert rows[1].shifts == {'v2': 0.70, 'r': 0.52}
  assert rows[1].mean_shift == pytest.approx(0.61)
  assert np.isnan(rows[1].nll) and rows[1].cost == 1
  assert settings[0] == {'lr': 1e-4, 'optimizer': 'adam'} and not settings[3]
  records = as_json_lines(SCORES)
  texts = {
      'a.jsonl': '\n'.join(map(json.dumps, records)) + '\n\n',
      'a.json': json.dumps(records),
      'b.json': json.dumps({'rows': records}),
      'b.csv': '\ufeff' + SCORES.replace('\n', '\r\n'),
  }
  for name, text in texts.items():
    (tmp_path / name).write_text(text, encoding='utf-8')
    other_rows, other_settings = report.read_scores(tmp_path / name)
    assert repr(other_rows) == repr(rows)  # NaN is unlike NaN, but not here.
    assert other_settings == settings


def test_columns_of_others(tmp_path):
  """As the authors publish their models: names of data sets, no kinds."""
  records = [
      {'model_name': f'm{k}', 'ImageNet2p': x, 'ImageNet': x - 0.1, 'V2': x / 2}
      for k, x in enumerate((0.8, 0.9, 0.7))
  ]
  path = tmp_path / 'individual.jsonl'
  path.write_text('\n'.join(map(json.dumps, records)))
  columns = dict(held_out='ImageNet2p', test='ImageNet', shifts=['V2'])
  rows, settings = report.read_scores(path, **columns)
  assert [row.name for row in rows] == ['m0', 'm1', 'm2']
  assert rows[0].shifts == {'V2': 0.4} and settings == [{}] * 3
  files = report.write_report(path, **columns)
  assert files[0] == tmp_path / 'individual.html'
  unnamed = [{k: x for k, x in r.items() if k in 'ImageNet2p'} for r in records]
  path.write_text('\n'.join(map(json.dumps, unnamed)))
  rows, _ = report.read_scores(path, **columns | {'shifts': []})
  assert [row.name for row in rows] == ['row 1', 'row 2', 'row 3']
  page = Page(files)
  table = page.table('', 'held-out', 'test', 'mean of shifts')
  assert table['best single']['test'] == '80.0'
  assert 'NLL' not in table['best single']
  assert 'R² = 1.00' in page.text


def test_settings_that_are_no_names_of_files(tmp_path):
  """`lr` and `LR` would be one file, and no float holds the number."""
  path = tmp_path / 'scores.csv'
  path.write_text(
      'name,held_out,test,lr,LR,steps\n'
      f'00,0.9,0.8,inf,1,{10**400}\n'
      '01,0.8,0.7,0.1,2,3\n'
  )
  files = {path.name for path in report.write_report(path)}
  assert {'setting_lr.svg', 'setting_lr_1.svg', 'setting_steps.svg'} <= files


def test_report_of_scores_and_back(scores):
  files = report.write_report(scores)
  page = Page(files)
  assert page.table('', 'held-out')['greedy']['test'] == '80.0'
  links = [a['href'] for a in page.of('a')]
  assert links == [
      '#scores', '#test-and-shifted-data', '#all-models', '#hyper-parameters'
  ]  # fmt: skip
  # The numbers behind a report are a table of scores.
  (models,) = (f for f in files if f.name == 'models.csv')
  assert repr(report.read_scores(models)) == repr(report.read_scores(scores))


def test_numbers_of_an_experiment_are_a_table_of_scores(written):
  files, _, _ = written
  (models,) = (f for f in files if f.name == 'models.csv')
  rows, settings = report.read_scores(models)
  assert [r._replace(gains={}) for r in rows_of_models()] == rows
  assert settings[1][WILD] == 0.1 and not settings[-1]


@pytest.mark.parametrize(
    'name, text, options, message',
    [
        ('a.txt', '', {}, 'ends with .jsonl'),
        ('a.csv', '', {}, 'has no rows'),
        ('a.csv', 'name,test\n0,0.5\n', {},
         "has no column 'held_out', it has: name, test. Name it with"),
        ('a.csv', 'heldout,test\n0.5,0.5\n', {}, 'Did you mean heldout'),
        ('a.csv', SCORES, {'shifts': ['shifts.v']}, "no column 'shifts.v'"),
        ('a.csv', SCORES, {'test': 'held_out'},
         "column 'held_out' is used for more than one"),
        ('a.csv', SCORES.replace('0.69', '69'), {},
         'row 3: test is 69, and scores are in 0..1: divide'),
        ('a.csv', SCORES.replace('0.69', ''), {},
         "row 3: test is '': expected a number"),
        ('a.csv', SCORES.replace('0.69', 'nan'), {}, 'row 3: test is nan'),
        ('a.csv', SCORES.replace('soup', 'stew'), {},
         "row 4: kind is 'stew': choose from single, soup, ensemble"),
        ('a.csv', SCORES + '03,single\n', {}, 'more or fewer cells'),
        ('a.csv', SCORES.replace(',adam', ',adam,1'), {}, 'fewer cells'),
        ('a.jsonl', '{"test": 1}\n{"test"', {}, 'a.jsonl:2 is not valid JSON'),
        ('a.jsonl', '[1, 2]\n', {}, 'a.jsonl:1: expected an object'),
        ('a.json', '{"a": 1}', {}, 'expected a list of rows'),
        ('a.json', '[{"held_out": true, "test": 0.5}]', {},
         'row 1: held_out is True: expected a number'),
    ],
)  # fmt: skip
def test_scores_that_do_not_fit(name, text, options, message, tmp_path):
  path = tmp_path / name
  path.write_text(text)
  with pytest.raises(ValueError, match=re.escape(message)) as e:
    report.read_scores(path, **options)
  assert str(path) in str(e.value)


def test_pages_that_do_not_fit(tmp_path, workdir):
  picture = report.Picture('a', lambda ax: None, 'Nothing.')
  with pytest.raises(ValueError, match=r"\['a'\] would be written twice"):
    report.write_page(
        tmp_path / 'x.html', 'x', [report.Section('x', [picture, picture])]
    )
  with pytest.raises(ValueError, match='report has no suffix.*report.html'):
    report.write_page(tmp_path / 'report', 'x', [])
  assert not list(tmp_path.iterdir())
  with pytest.raises(TypeError, match=r"is a workdir.*\['test'\]"):
    report.write_report(workdir, test='ImageNet')


# --- the command --------------------------------------------------------------


def invoke(*args):
  return testing.CliRunner().invoke(cli.app, list(map(str, args)))


@pytest.mark.slow
def test_command(scores, tmp_path):
  result = invoke('report', scores, '--shifts', 'shifts.v2, shifts.r')
  assert result.exit_code == 0, (result.output, result.exception)
  assert f'Report: {tmp_path / "scores.html"}' in result.stdout
  out = tmp_path / 'other' / 'out.html'
  result = invoke('report', scores, '--out', out, '--test', 'shifts.r',
                  '--shifts', 'shifts.v2', '--json')  # fmt: skip
  printed = json.loads(result.stdout)
  assert printed['out'] == str(out) and out.is_file()
  assert str(out.with_suffix('') / 'models.csv') in printed['files']
  page = Page([out])
  assert page.table('', 'held-out')['greedy']['test'] == '55.0'


def test_command_with_wrong_input(tmp_path, workdir):
  begun = tmp_path / 'begun'
  begun.mkdir()
  cases = [
      (begun, 'is not the workdir of an experiment'),
      (tmp_path / 'no.csv', 'no.csv does not exist'),
  ]
  for source, text in cases:
    result = invoke('report', source)
    assert result.exit_code == 1 and result.stdout == ''
    assert result.stderr.startswith('Error: ') and text in result.stderr
    assert len(result.stderr.strip().split('\n')) == 1
  (begun / 'config.json').write_text('{}')
  assert 'is not finished' in invoke('report', begun).stderr
  (begun / 'results.json').write_text('{"rows": [{"name": 1}]}')
  assert 'results.json is unreadable' in invoke('report', begun).stderr
  result = invoke('report', workdir, '--held-out', 'x')
  assert result.exit_code == 2 and '--held-out' in result.stderr


@pytest.mark.parametrize('scale', [1e-7, 1e-5, 1.0, 1e6])
def test_numbers_of_a_setting_do_not_overlap(scale):
  from matplotlib import figure

  drawn = figure.Figure(figsize=(4.8, 3.2), layout='constrained')
  ax = drawn.subplots()
  _plots.against(ax, 'rate', [2.13 * scale, 9.87 * scale], [0.8, 0.9])
  drawn.draw_without_rendering()
  boxes = [t.get_window_extent() for t in ax.get_xticklabels() if t.get_text()]
  assert len(boxes) > 2
  assert all(a.x1 < b.x0 for a, b in zip(boxes, boxes[1:]))
