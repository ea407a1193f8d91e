"""Pictures of landscapes and studies show the numbers they are given."""

from matplotlib import figure
import numpy as np
import pytest

from jaxsoup import landscape
from jaxsoup import report
from jaxsoup import studies


@pytest.fixture
def ax():
  return figure.Figure(layout='constrained').add_subplot()


def drawn(ax):
  """Draws, since what cannot be drawn raises only then."""
  ax.figure.canvas.draw()
  return ax


def dots_of(ax):
  return np.concatenate([c.get_offsets() for c in ax.collections])


PAIRS = [
    landscape.Pair((0, 1), 60.0, (0.8, 0.7), 0.9, 0.85),
    landscape.Pair((0, 2), 90.0, (0.8, 0.6), 0.65, 0.75),
]


def grid(loss):
  x = np.linspace(-1, 2, 4)
  points = np.array([[0, 0], [1, 0], [0.5, 1], [0.4, 0.3]])
  return landscape.Plane(x, x[:3], loss, points, np.array([0, 0, 0, 5.0]))


def test_plane_shows_every_model_and_which_are_off(ax):
  surface = grid(np.arange(12.0).reshape(3, 4))
  report.plane(ax, surface, ['init', 'a', 'b', 'soup'], scale=100)
  drawn(ax)
  marks = [c for c in ax.collections if len(c.get_offsets()) == 1][-4:]
  np.testing.assert_allclose(
      np.concatenate([c.get_offsets() for c in marks]), surface.points
  )
  faces = [c.get_facecolor()[0, :3].round(1).tolist() for c in marks]
  assert faces == [[1, 1, 1]] * 3 + [[0.6, 0.6, 0.6]]
  assert [t.get_text() for t in ax.texts] == ['init', 'a', 'b']
  legend = [t.get_text() for t in ax.get_legend().get_texts()]
  assert legend == ['soup']
  assert ax.get_xlabel() == 'from init towards a'


def test_models_without_a_name_are_dots_on_the_plane(ax):
  report.plane(ax, grid(np.arange(12.0).reshape(3, 4)), ['init', 'a', 'b', ''])
  *_, corner, other = drawn(ax).collections
  assert other.get_sizes() < corner.get_sizes()
  assert ax.get_legend() is None


def test_plane_of_a_constant_loss(ax):
  report.plane(ax, grid(np.ones((3, 4))), ['init', 'a', 'b', 'soup'])
  drawn(ax)


def test_plane_with_a_loss_that_is_not_finite(ax):
  loss = np.linspace(1, 2, 12).reshape(3, 4)
  loss[2, 3], loss[0, 0] = np.nan, np.inf
  report.plane(ax, grid(loss), ['init', 'a', 'b', 'soup'])
  assert np.isfinite(drawn(ax).collections[0].levels).all()


def test_plane_keeps_colours_for_the_basin(ax):
  """One point in twelve is a cliff, and takes one colour, not most of them."""
  loss = np.linspace(1, 2, 12).reshape(3, 4)
  loss[2, 3] = 1e4
  report.plane(ax, grid(loss), ['init', 'a', 'b', 'soup'])
  levels = drawn(ax).collections[0].levels
  # Of 15 steps between 12 values the last two end beyond the eleventh.
  assert np.sum(levels <= 2) == 14


def test_lines_show_what_is_above_the_chord(ax):
  path = landscape.Path(np.array([0, 0.5, 1]), np.array([1.0, 5.0, 3.0]))
  report.lines(ax, {'a pair': path}, scale=10)
  drawn(ax)
  np.testing.assert_allclose(ax.lines[0].get_ydata(), [0, 30, 0])
  (name,) = [t.get_text() for t in ax.get_legend().get_texts()]
  assert name == 'a pair'


def test_lines_are_coloured_by_values(ax):
  path = landscape.Path(np.array([0, 1]), np.array([1.0, 1.0]))
  values = {(0, 1): 1e-5, (0, 2): 1e-3, (1, 2): 1e-3}
  report.lines(ax, dict.fromkeys(values, path), values=values)
  drawn(ax)
  colours = [line.get_color() for line in ax.lines[:3]]
  assert colours[0] != colours[1] and colours[1] == colours[2]
  assert ax.get_legend() is None


@pytest.mark.parametrize('values', [None, [1e-5, 1e-3]])
def test_pairs(ax, values):
  report.angles_and_gains(ax, PAIRS, values=values)
  drawn(ax)
  # (0.8 + 0.7) / 2 = 0.75, and 0.7.
  np.testing.assert_allclose(dots_of(ax), [[60, 15], [90, -5]])


def test_soups_against_ensembles(ax):
  report.against_ensembles(ax, PAIRS, values=[1.0, 1.0])
  drawn(ax)
  np.testing.assert_allclose(dots_of(ax), [[85, 90], [75, 65]])
  np.testing.assert_allclose(ax.lines[0].get_xdata(), [65, 90])


def test_theory(ax):
  terms = landscape.SoupMinusEnsemble(0.2, 1.0, 0.7, 1.0, 2.6)
  report.theory(ax, [terms])
  np.testing.assert_allclose(dots_of(drawn(ax)), [[0.3, 0.2]])


def test_growth(ax):
  scores = {'uniform': np.array([[0.5, 0.7], [0.7, 0.9], [0.6, 0.8]])}
  report.growth(ax, studies.Growth(np.array([1, 2]), scores))
  drawn(ax)
  np.testing.assert_allclose(ax.lines[0].get_ydata(), [60, 80])
  (band,) = ax.collections
  low, high = band.get_datalim(ax.transData).intervaly
  # A standard deviation of ten points, of three orders.
  np.testing.assert_allclose([low, high], [60 - 10 / 3**0.5, 80 + 10 / 3**0.5])


def test_contributions(ax):
  effects = [
      studies.Contribution('learning_rate', -0.8, 0.001, -0.5),
      studies.Contribution('mixup', 0.2, 0.4, float('nan')),
      studies.Contribution('fixed', float('nan'), float('nan'), float('nan')),
  ]
  report.contributions(ax, effects)
  drawn(ax)
  names = [t.get_text() for t in ax.get_yticklabels()]
  # matplotlib counts from below: the strongest is on top.
  assert dict(zip(ax.get_yticks(), names)) == {
      2: 'learning rate',
      1: 'mixup',
      0: 'fixed',
  }
  widths = [bar.get_width() for bar in ax.patches[:2]]
  np.testing.assert_allclose(widths, [-0.8, 0.2])
  np.testing.assert_allclose(dots_of(ax), [[-0.5, 2]])


def test_varied(ax):
  groups = [
      studies.Varied('learning_rate', (0, 1), (1e-4, 1e-3), 0.8, 0.7, 0.9),
      studies.Varied('seed', (2, 3), (1, 2), 0.6, 0.5, 0.55),
  ]
  report.varied(ax, groups)
  drawn(ax)
  # Soups, then the best, then the mean; the first group is on top.
  expected = [[90, 1], [55, 0], [80, 1], [60, 0], [70, 1], [50, 0]]
  np.testing.assert_allclose(dots_of(ax), expected)
  names = [t.get_text() for t in ax.get_yticklabels()]
  assert dict(zip(ax.get_yticks(), names)) == {1: 'learning rate', 0: 'seed'}


def test_compared(ax):
  scores = {
      'soup': {'test': [0.9, 0.7], 'shifts': [0.5, 0.5]},
      'single': {'test': [0.6, 0.8]},
  }
  report.compared(ax, scores)
  drawn(ax)
  means = [c.get_offsets() for c in ax.collections if c.get_label()[0] != '_']
  np.testing.assert_allclose(means[0], [[0.8, 1], [0.7, 0]])
  np.testing.assert_allclose(means[1], [[0.5, 1]])
  repeats = [c for c in ax.collections if c.get_label()[0] == '_']
  np.testing.assert_allclose(repeats[0].get_offsets(), [[0.9, 1], [0.7, 1]])
  legend = [t.get_text() for t in ax.get_legend().get_texts()]
  assert legend == ['test', 'shifts']


def test_wise_ft(ax):
  t = np.array([0, 0.5, 1])
  scores = {
      'test': np.array([0.5, 0.8, 0.9]),
      'noise': np.array([0.4, 0.6, 0.5]),
      'blur': np.array([0.2, 0.4, 0.3]),
  }
  report.wise_ft(ax, {'soup': studies.Curve(t, scores)})
  drawn(ax)
  np.testing.assert_allclose(ax.lines[0].get_xdata(), [50, 80, 90])
  np.testing.assert_allclose(ax.lines[0].get_ydata(), [30, 50, 40])
  np.testing.assert_allclose(dots_of(ax), [[50, 30], [90, 40]])


def test_matrix(ax):
  values = np.array([[0.0, 60, 70], [60, 0, 80], [70, 80, 0]])
  report.matrix(ax, values, ['a', 'b', 'c'], label='angle')
  drawn(ax)
  assert [t.get_text() for t in ax.texts] == [f'{x:.0f}' for x in values.flat]
  # The diagonal is left out of the colours.
  assert ax.images[0].get_clim() == (60, 80)


def test_matrix_with_gaps_and_zeros(ax):
  values = np.array([[np.nan, -0.01], [-0.01, np.nan]])
  report.matrix(ax, values, ['a', 'b'], label='drop', fmt='.1f')
  assert [t.get_text() for t in drawn(ax).texts] == ['0.0', '0.0']


def test_matrix_of_many_models_has_no_numbers(ax):
  report.matrix(
      ax, np.random.rand(20, 20), [str(k) for k in range(20)], label=''
  )
  assert not drawn(ax).texts
  # Every other name.
  names = [t.get_text() for t in ax.get_xticklabels()]
  assert names == [str(k) for k in range(0, 20, 2)]
