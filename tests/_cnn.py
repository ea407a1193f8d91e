"""What the tests of convolutional networks share: weights, files, NumPy."""

import json
from typing import Any
from typing import NamedTuple

from _x64 import x64
from flax import nnx
import jax
import numpy as np
from safetensors import numpy as safetensors

from jaxsoup import checkpoints
from jaxsoup.models import _names
from jaxsoup.models.batch_norm import recalibrated

STATE = nnx.Any(nnx.Param, nnx.BatchStat)


def abstract(cls, arguments):
  """The graph of a model, and the shapes of what it holds as a nested dict."""
  model = nnx.eval_shape(lambda: cls(**arguments, rngs=nnx.Rngs(0)))
  return nnx.graphdef(model), nnx.to_pure_dict(nnx.state(model, STATE))


def random_params(shapes, seed=0):
  """Nothing as a constructor leaves it."""
  rng = np.random.default_rng(seed)

  def leaf(path, x):
    draw = rng.normal(size=x.shape)
    name = path[-1].key
    if name == 'kernel':
      draw /= np.sqrt(np.prod(x.shape[:-1]))
    else:
      draw = {'scale': 1 + 0.1 * draw, 'var': np.exp(0.3 * draw)}.get(
          name, 0.1 * draw
      )
    return draw.astype(np.float32)

  return jax.tree_util.tree_map_with_path(leaf, shapes)


def settled(graphdef, params, size=64, num_channels=3):
  """With the statistics of noise: else signals vanish or explode in depth."""
  names = {
      path[-1].key for path, _ in jax.tree_util.tree_leaves_with_path(params)
  }
  if 'var' not in names:
    return params
  batches = [images(size, 8, num_channels, seed=9)]
  return recalibrated(graphdef, params, batches)


def images(size, num=2, num_channels=3, seed=1):
  """Noise on colors that differ.

  Without colors all images look alike in the depth, and BatchNorm would blow up
  the rounding of what is left.
  """
  rng = np.random.default_rng(seed)
  noise = rng.normal(size=(num, *np.broadcast_to(size, 2), num_channels))
  color = 2 * rng.normal(size=(num, 1, 1, num_channels))
  return (color + noise).astype(np.float32)


def apply(graphdef, params, image):
  return np.asarray(
      jax.jit(lambda p, x: nnx.merge(graphdef, p)(x))(params, image)
  )


def train(graphdef, params, image):
  """Logits in training mode, and parameters with moved statistics."""

  @jax.jit
  def step(params):
    model = nnx.merge(graphdef, params)
    model.train()
    return model(image), nnx.to_pure_dict(nnx.state(model, STATE))

  return step(params)


def value_and_grad(graphdef, params, image):
  """A loss in training mode, moved statistics, and the loss's gradient."""

  def loss_fn(params):
    model = nnx.merge(graphdef, params)
    model.train()
    loss = (model(image) ** 2).mean()
    return loss, nnx.to_pure_dict(nnx.state(model, STATE))

  return jax.jit(jax.value_and_grad(loss_fn, has_aux=True))(params)


def num_rematerialized(graphdef, params, image):
  """How many parts of the forward pass keep only their input."""
  forward = lambda params: nnx.merge(graphdef, params)(image)
  equations = jax.make_jaxpr(forward)(params).eqns
  return sum(e.primitive.name in ('checkpoint', 'remat2') for e in equations)


class Stored(NamedTuple):
  """Arrays in memory, as `checkpoints.Arrays` shows those of a file."""

  arrays: dict[str, np.ndarray]
  path: str = 'memory'

  @property
  def shapes(self):
    return self.arrays

  def __getitem__(self, name):  # type: ignore[override]
    return self.arrays[name]


def load(module, cls, naming, stored, config):
  """As a user's loader does: graph, parameters and table of a file."""
  arguments = module.arguments(naming, stored.shapes, config)
  # They have to survive a config.json.
  arguments = json.loads(json.dumps(arguments))
  graphdef, shapes = abstract(cls, arguments)
  table = module.TABLES[naming](**arguments)
  return graphdef, _names.read(stored, shapes, table), table


def assert_trees_equal(actual, expected):
  jax.tree.map(np.testing.assert_array_equal, actual, expected)


def assert_close(actual, expected, atol=1e-5):
  """Of logits around one; of larger ones as much more."""
  atol = atol * max(1, np.abs(expected).max())
  # Else the images would not have reached the logits.
  assert np.ptp(expected, axis=0).max() > 0.02
  np.testing.assert_allclose(actual, expected, rtol=0, atol=atol)


def check_hf(module, cls, reference: Any, size, folder):
  """A model of transformers -> ours -> a file -> a model of transformers."""
  import torch

  randomize(reference)
  reference.save_pretrained(folder)
  config = json.loads((folder / 'config.json').read_text())
  stored = checkpoints.Arrays(folder)
  graphdef, params, table = load(module, cls, 'hf', stored, config)
  image = images(size)

  @torch.no_grad()
  def expected(model):
    x = torch.tensor(image, dtype=model.dtype).permute(0, 3, 1, 2)
    return model(x).logits.numpy()

  assert_close(apply(graphdef, params, image), expected(reference))
  for name, array in _names.write(params, table):
    np.testing.assert_array_equal(array, stored[name])

  params = settled(graphdef, random_params(params, seed=2))
  safetensors.save_file(
      dict(_names.write(params, table)),
      folder / 'model.safetensors',
      {'format': 'pt'},
  )
  loaded = type(reference).from_pretrained(folder).eval()
  assert_close(apply(graphdef, params, image), expected(loaded))
  assert_close_in_float64(graphdef, params, image, expected(loaded.double()))


def assert_close_in_float64(graphdef, params, image, expected):
  """Float32 rounds; the function is the same."""
  with x64():
    assert_close(apply(graphdef, *wide((params, image))), expected, 1e-9)


def wide(tree):
  return jax.tree.map(lambda x: np.asarray(x, np.float64), tree)


def assert_same_step(actual, expected, params, image):
  """Two models move alike: in float64, as BatchNorm blows up rounding."""
  with x64():
    actual, expected = (
        value_and_grad(graphdef, *wide((params, image)))
        for graphdef in (actual, expected)
    )
  for x, y in zip(jax.tree.leaves(actual), jax.tree.leaves(expected)):
    np.testing.assert_allclose(x, y, rtol=1e-6, atol=1e-9)


def randomize(model):
  """Moves every parameter and buffer of a model of torch, and settles it."""
  import torch

  generator = torch.Generator().manual_seed(0)
  draw = lambda shape: torch.randn(shape, generator=generator)
  with torch.no_grad():
    for module in model.modules():
      for name, x in module.named_parameters(recurse=False):
        x.copy_(draw(x.shape) * (0.1 if x.ndim < 2 else x[0].numel() ** -0.5))
        if isinstance(module, (torch.nn.BatchNorm2d, torch.nn.GroupNorm)):
          x.add_(1 if name == 'weight' else 0)
      if isinstance(module, torch.nn.BatchNorm2d):
        module.momentum = 1.0
    model.train()(torch.tensor(images(64, 8, seed=9)).permute(0, 3, 1, 2))
  model.eval()


def check_timm(
    module, cls, name, arguments, params, folder, *, config, atol=1e-5
):
  """Our weights -> a model of timm, strictly -> its own file -> ours."""
  import _timm

  given = dict(_names.write(params, module.TABLES['timm'](**arguments)))
  num_classes = arguments['num_classes']
  reference = _timm.run(name, folder, given=given, num_classes=num_classes)
  stored = checkpoints.Arrays(reference.file)
  graphdef, again, _ = load(module, cls, 'timm', stored, config)
  assert_trees_equal(again, params)
  image = reference.data['image'].transpose(0, 2, 3, 1)
  actual = apply(graphdef, again, image)
  assert_close(actual, reference.data['logits'], atol)
  logits = reference.data['logits_float64']
  assert_close_in_float64(graphdef, again, image, logits)


# --- NumPy, in float64 --------------------------------------------------------


def conv(kernel, x, stride=1, *, is_same_padded=False, is_depthwise=False):
  """A convolution, window by window."""
  size = kernel.shape[0]
  sides = []
  for n in x.shape[1:3]:
    if is_same_padded:
      total = max((-(-n // stride) - 1) * stride + size - n, 0)
      sides.append((total // 2, total - total // 2))
    else:
      sides.append((size // 2, size // 2))
  x = np.pad(x, ((0, 0), *sides, (0, 0)))
  windows = np.lib.stride_tricks.sliding_window_view(x, (size, size), (1, 2))
  windows = windows[:, ::stride, ::stride]
  if is_depthwise:
    return np.einsum('bhwcij,ijc->bhwc', windows, kernel[:, :, 0])
  return np.einsum('bhwcij,ijcd->bhwd', windows, kernel)


def batch_norm(p, x, epsilon):
  x = (x - p['mean']) / np.sqrt(p['var'] + epsilon)
  return x * p['scale'] + p['bias']


def dense(p, x):
  return x @ p['kernel'] + p['bias']


def relu(x):
  return np.maximum(x, 0)
