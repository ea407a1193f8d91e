"""The script of the HTML report, in Chromium."""

import functools
import json
import re
import shutil
import subprocess

import numpy as np
import pytest

from jaxsoup import report
from jaxsoup.report import _sections

CHROMIUM = shutil.which('chromium') or shutil.which('google-chrome')
pytestmark = pytest.mark.skipif(
    CHROMIUM is None, reason='Chromium is not installed: apt install chromium.'
)
NAMES = [r'$\alpha$ <b>', *map(str, range(1, 30)), 'greedy', 'ensemble']


@functools.cache
def rows_and_settings():
  rng = np.random.default_rng(0)
  rows, settings = [], []
  for name in NAMES:
    held_out, test, blur, fog = rng.uniform(0.5, 0.9, 4)
    kind = name if name == 'ensemble' else 'soup' if name == 'greedy' else ''
    shifts = {'blur': blur, 'fog': fog}
    rows.append(
        report.Row(name, kind or 'single', held_out, test, shifts, 0.5, 0.1, 1)
    )
    run = {'rate': float(rng.uniform()), 'augment': f'm{rng.integers(28)}-std'}
    settings.append({} if kind else run)
  return rows, settings


# Runs behind the script of the page; what it returns is printed.
DRIVER = """<script>
const svg = document.querySelector('svg[data-points]');
const points = JSON.parse(svg.dataset.points);
const at = ([, x, y], of = svg) => {
  const p = new DOMPoint(x, y).matrixTransform(of.getScreenCTM());
  return {clientX: p.x, clientY: p.y, bubbles: true};
};
const event = (name, options, target = svg) =>
  target.dispatchEvent(new PointerEvent(name, options));
const rows = () => [...document.querySelectorAll('.models tbody tr')];
const shown = () => rows().filter((x) => x.checkVisibility())
  .map((x) => x.cells[0].textContent);
const head = (name) => [...document.querySelectorAll('.models thead th')]
  .find((x) => x.textContent === name);
const marked = () => [...document.querySelectorAll('tr.selected')]
  .map((x) => x.cells[0].textContent);
const fill = (element, value, name) => {
  element.value = value;
  element.dispatchEvent(new Event(name, {bubbles: true}));
};
const result = (() => { %s })();
const out = document.createElement('pre');
out.id = 'result';
out.textContent = JSON.stringify({result, errors});
document.body.append(out);
</script>"""
CATCH = """<script>
const errors = [];
addEventListener('error', (x) => errors.push(x.message));
console.error = console.warn = (...x) => errors.push(x.join(' '));
</script>"""


@pytest.fixture
def run(tmp_path):
  """Runs a script on the page of all models, at a width in pixels."""
  rows, settings = rows_and_settings()
  pairs = report.Table(
      ['pair', 'steps'], [['2 and 11', '400'], ['1 and 12', '1,797']]
  )
  sections = [
      *_sections.scatter_sections(rows),
      _sections.models_section(rows, settings),
      *_sections.setting_sections(rows, settings),
      report.Section('Pairs', [pairs]),
  ]
  text = report.page('Soups', sections)

  def run_fn(script, width=1000):
    page = text.replace('<head>', f'<head>{CATCH}')
    page = page.replace('</body>', DRIVER % script + '</body>')
    (tmp_path / 'page.html').write_text(page, encoding='utf-8')
    dumped = subprocess.run(
        [
            CHROMIUM,
            '--headless',
            '--no-sandbox',
            '--disable-gpu',
            f'--user-data-dir={tmp_path}/profile',
            f'--window-size={width},900',
            '--dump-dom',
            (tmp_path / 'page.html').as_uri(),
        ],
        capture_output=True,
        timeout=120,
        check=True,
        encoding='utf-8',
    ).stdout
    (found,) = re.findall(r'<pre id="result">(.*)</pre>', dumped)
    found = json.loads(found.replace('&lt;', '<').replace('&gt;', '>'))
    assert not found['errors']
    return found['result']

  return run_fn


def test_hover_click_filter_and_sort(run):
  rows, settings = rows_and_settings()
  got = run("""
    svg.scrollIntoView();
    const hits = points.map((p) => {
      const {clientX, clientY} = at(p);
      const hit = document.elementFromPoint(clientX, clientY);
      return hit.closest('g[id*=PathCollection]') !== null;
    });
    const tips = points.map((p) => {
      event('pointermove', at(p));
      return document.getElementById('tip').innerText;
    });
    event('pointermove', {clientX: 1, clientY: 1, bubbles: true});
    const isHidden = document.getElementById('tip').hidden;
    event('click', at(points[12]));
    const chosen = marked();
    const rings = [...document.querySelectorAll('circle.selected')].length;
    event('click', at(points[12]));
    const none = marked();
    rows()[0].click();
    const byRow = marked();

    const [of, how] = document.querySelectorAll('.filter select');
    const [value] = document.querySelectorAll('.filter input');
    const filter = (column, comparison, text) => {
      of.value = column;
      how.value = comparison;
      fill(value, text, 'input');
      return shown();
    };
    const atLeast = filter('rate', '≥', '0.25');
    const atMost = filter('rate', '≤', '0.75');
    const out = svg.querySelectorAll('circle.out').length;
    filter('augment', '=', '');
    const first = document.getElementById('values').options[0].value;
    const ofKind = [first, filter('augment', '=', first)];
    const all = filter('augment', '=', '');

    const orders = ['fog', 'fog', 'model', 'model'].map((name) => {
      head(name).click();
      return [head(name).ariaSort, shown()];
    });
    const table = [...document.querySelectorAll('table')]
      .find((x) => x.tHead?.textContent.includes('steps'));
    table.tHead.rows[0].cells[1].click();
    const steps = [...table.tBodies[0].rows].map((x) => x.cells[1].textContent);
    return {hits, tips, isHidden, chosen, rings, none, byRow, atLeast, atMost,
      out, all, ofKind, orders, steps};
  """)
  assert len(got['hits']) == len(rows) and all(got['hits'])
  for row, setting, tip in zip(rows, settings, got['tips']):
    name, *lines = tip.split('\n')
    assert name == row.name
    assert f'test: {100 * row.test:.1f}' in lines
    assert f'fog: {100 * row.shifts["fog"]:.1f}' in lines
    assert (f'rate: {setting["rate"]:.4g}' in lines) if setting else True
  assert got['isHidden']
  # In the table of all models, and in that of pairs; not '2 and 11'.
  assert got['chosen'] == ['12', '1 and 12'] and not got['none']
  # In the scatter, and against both hyper-parameters.
  assert got['rings'] == 3
  assert got['byRow'] == [NAMES[0]]
  for key, fn in (
      ('atLeast', lambda rate: round(rate, 4) >= 0.25),
      ('atMost', lambda rate: round(rate, 4) <= 0.75),
  ):
    passes = [not x or fn(x['rate']) for x in settings]
    assert got[key] == [n for n, x in zip(NAMES, passes) if x]
  assert got['out'] == passes.count(False) > 0
  assert got['all'] == NAMES
  kind, names = got['ofKind']
  assert names == [
      n for n, x in zip(NAMES, settings) if not x or x['augment'] == kind
  ]
  fog = {row.name: round(100 * row.shifts['fog'], 1) for row in rows}
  (way, down), (other, up), _, (_, by_name) = got['orders']
  assert (way, other) == ('descending', 'ascending')
  assert [fog[n] for n in down] == sorted(fog.values(), reverse=True)
  assert [fog[n] for n in up] == sorted(fog.values())
  assert [n for n in by_name if n.isdigit()] == NAMES[1:30]
  assert got['steps'] == ['1,797', '400']  # The largest first.


def test_a_phone(run):
  """What is wide scrolls by itself, and the tip stays on the screen."""
  got = run(
      """
      const frame = document.body;
      frame.style.width = '390px';
      svg.scrollIntoView();
      const last = points.toSorted((a, b) => b[1] - a[1])[0];
      event('click', at(last));
      const tip = document.getElementById('tip').getBoundingClientRect();
      const right = innerWidth - tip.right;
      return {width: frame.scrollWidth, left: tip.left, right};
      """,
      width=390,
  )
  assert got['width'] <= 390 and got['left'] >= 0 and got['right'] >= 0
