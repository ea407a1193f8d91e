"""Networks on digits, many runs at a time: the pools of `diagnosis.py`.

```
world = made('mlp', seed=0, folder='/tmp/pools')
world.runs['good'], world.theta_0, world.score(params, 'test')
```
"""

import functools
import pathlib
import pickle
from typing import Any
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jaxsoup import evaluation
from jaxsoup.data import digits

tree = jax.tree.map
NETS = ('mlp', 'cnn', 'vit')
SIZES = dict(pretrain=300, train=300, held_out=400, test=797)
BATCH, STEPS = 40, 60
# What trains well, by network; sweeps are multiples of it.
RATES = {'mlp': 3e-3, 'cnn': 5e-3, 'vit': 2e-3}
MOST_STEPS, NUM_HEADS, WIDTH = 3 * STEPS, 4, 32
# Runs by the name of their group: rates, as multiples; how many.
SPREAD = (0.7, 0.9, 1.1, 1.4, 2.0, 1.0)
GROUPS: dict[str, dict[str, Any]] = {
    'good': dict(rates=SPREAD),
    'many': dict(rates=(0.5, 1.0, 1.5) * 4),
    'low': dict(rates=(0.1,) * 5),
    'high': dict(rates=(2.0, 2.5, 3.0, 2.5, 2.0)),
    'wild': dict(rates=(40.0, 100.0)),
    'hot': dict(rates=(15.0, 20.0, 25.0, 30.0)),
    'long': dict(rates=(1.0, 2.0), steps=3),
    'other': dict(rates=(1.0, 1.4, 0.7), start=1),
    'own heads': dict(rates=SPREAD, head='own'),
    'new head': dict(rates=(1.0,) * 5, head='new'),
    'probes': dict(rates=(4.0,) * 4, trains='head'),
    'bodies': dict(rates=SPREAD[:5], trains='body'),
    'labels': dict(rates=(1.0, 2.0), labels='turned'),
    'noise': dict(rates=(1.0,), labels='noise'),
    'brief': dict(rates=(0.5,) * 2, steps=0.1),
}


def _dense(key, *shape):
  scale = np.prod(shape[:-1]) ** -0.5
  return {
      'kernel': scale * jax.random.normal(key, shape),
      'bias': jnp.zeros(shape[-1]),
  }


def _norm():
  return {'scale': jnp.ones(WIDTH), 'bias': jnp.zeros(WIDTH)}


def _init(net, key):
  keys = iter(jax.random.split(key, 40))
  if net == 'mlp':
    return {
        'first': _dense(next(keys), 64, 64),
        'second': _dense(next(keys), 64, 64),
        'third': _dense(next(keys), 64, 64),
        'head': _dense(next(keys), 64, 10),
    }
  if net == 'cnn':
    params = {
        'conv_0': _dense(next(keys), 3, 3, 1, 16),
        'norm_0': {'scale': jnp.ones(16), 'bias': jnp.zeros(16)},
        'conv_1': _dense(next(keys), 3, 3, 16, 32),
        'norm_1': {'scale': jnp.ones(32), 'bias': jnp.zeros(32)},
        'conv_2': _dense(next(keys), 3, 3, 32, 32),
        'norm_2': {'scale': jnp.ones(32), 'bias': jnp.zeros(32)},
        'head': _dense(next(keys), 32, 10),
    }
    stats = {
        f'norm_{i}': {'mean': jnp.zeros(n), 'var': jnp.ones(n)}
        for i, n in enumerate((16, 32, 32))
    }
    return {'params': params, 'batch_stats': stats}
  size = WIDTH // NUM_HEADS
  attention = lambda: {
      name: {'kernel': _dense(next(keys), WIDTH, WIDTH)['kernel'].reshape(
          (WIDTH, NUM_HEADS, size)), 'bias': jnp.zeros((NUM_HEADS, size))}
      for name in ('query', 'key', 'value')
  } | {'out': _dense(next(keys), WIDTH, WIDTH)}  # fmt: skip
  block = lambda: {
      'norm_1': _norm(), 'attention': attention(), 'norm_2': _norm(),
      'up': _dense(next(keys), WIDTH, 64),
      'down': _dense(next(keys), 64, WIDTH),
  }  # fmt: skip
  return {
      'embed': _dense(next(keys), 4, WIDTH),
      'position': 0.3 * jax.random.normal(next(keys), (16, WIDTH)),
      'block_0': block(),
      'block_1': block(),
      'block_2': block(),
      'norm': _norm(),
      'head': _dense(next(keys), WIDTH, 10),
  }


def _linear(p, x):
  return jnp.tensordot(x, p['kernel'], 1) + p['bias']


def _convolved(p, x, stride):
  """3 x 3, as a product of matrices: side by side, convolutions are slow."""
  size = x.shape[1]
  x = jnp.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)))
  cut = lambda i, j: x[:, i : i + size : stride, j : j + size : stride]
  patches = jnp.stack([cut(i, j) for i in range(3) for j in range(3)], -2)
  return jnp.tensordot(
      patches.reshape(*patches.shape[:3], -1),
      p['kernel'].reshape(-1, p['kernel'].shape[-1]), 1,
  ) + p['bias']  # fmt: skip


def _layer_norm(p, x):
  x = x - x.mean(-1, keepdims=True)
  return (
      p['scale'] * x * jax.lax.rsqrt((x**2).mean(-1, keepdims=True) + 1e-6)
      + p['bias']
  )


def _attend(p, x):
  q, k, v = (_linear(p[name], x) for name in ('query', 'key', 'value'))
  scores = jnp.einsum('bqhd,bkhd->bhqk', q, k) / np.sqrt(q.shape[-1])
  mixed = jnp.einsum('bhqk,bkhd->bqhd', jax.nn.softmax(scores), v)
  return _linear(p['out'], mixed.reshape(x.shape))


def apply(net, params, image, is_training=False):
  """Logits [B, 10], and the statistics of the batch (a CNN's, else {})."""
  if net == 'mlp':
    x = image.reshape(len(image), -1)
    for name in ('first', 'second', 'third'):
      x = jax.nn.relu(_linear(params[name], x))
    return _linear(params['head'], x), {}
  if net == 'cnn':
    x, seen, stats = image, {}, params['batch_stats']
    params = params['params']
    for i in range(3):
      x = _convolved(params[f'conv_{i}'], x, 1 + i % 2)
      own = stats[f'norm_{i}']
      if is_training:
        own = {'mean': x.mean((0, 1, 2)), 'var': x.var((0, 1, 2))}
      seen[f'norm_{i}'] = own
      norm = params[f'norm_{i}']
      x = (x - own['mean']) * jax.lax.rsqrt(own['var'] + 1e-5)
      x = jax.nn.relu(norm['scale'] * x + norm['bias'])
    return _linear(params['head'], x.mean((1, 2))), seen
  x = image[..., 0].reshape(-1, 4, 2, 4, 2).transpose(0, 1, 3, 2, 4)
  x = _linear(params['embed'], x.reshape(-1, 16, 4)) + params['position']
  for i in range(3):
    block = params[f'block_{i}']
    x = x + _attend(block['attention'], _layer_norm(block['norm_1'], x))
    h = jax.nn.gelu(_linear(block['up'], _layer_norm(block['norm_2'], x)))
    x = x + _linear(block['down'], h)
  return _linear(params['head'], _layer_norm(params['norm'], x).mean(1)), {}


def _is_head(path):
  return 'head' in jax.tree_util.keystr(path)


@functools.partial(jax.jit, static_argnums=0)
@functools.partial(jax.vmap, in_axes=(None, 0, 0, 0, 0, 0, 0, None))
def _train(net, start, rate, seed, steps, trains, labels, data):
  """One run: its end, its moving average, half-way, and Adam's moments."""
  tx = optax.scale_by_adam()
  keys = jax.random.split(jax.random.key(seed), MOST_STEPS)
  has_stats = net == 'cnn'
  split = lambda p: (p['params'], p['batch_stats']) if has_stats else (p, {})
  joined = lambda p, s: {'params': p, 'batch_stats': s} if has_stats else p

  def loss_fn(params, stats, batch):
    logits, seen = apply(net, joined(params, stats), batch['image'], True)
    picked = labels[batch['row'], batch['label']]
    loss = optax.softmax_cross_entropy_with_integer_labels(logits, picked)
    return loss.mean(), seen

  def step(carry, key_and_t):
    (params, stats, opt, average, half), (key, t) = carry, key_and_t
    rows = jax.random.randint(key, (BATCH,), 0, len(data['label']))
    batch = {k: x[rows] for k, x in data.items()} | {'row': rows}
    grads, seen = jax.grad(loss_fn, has_aux=True)(params, stats, batch)
    updates, new = tx.update(grads, opt)
    is_on = t < steps
    now = rate * 0.5 * (1 + jnp.cos(jnp.pi * t / steps)) * is_on
    moves = lambda path: jnp.where(_is_head(path), trains[0], trains[1])
    params = jax.tree_util.tree_map_with_path(
        lambda path, p, u: p - now * moves(path) * u, params, updates
    )
    keep = lambda share: lambda old, x: jnp.where(
        is_on, share * old + (1 - share) * x, old
    )
    stats = tree(keep(0.8), stats, seen)
    whole = joined(params, stats)
    average = tree(keep(0.95), average, whole)
    half = tree(lambda h, x: jnp.where(t < steps // 2, x, h), half, whole)
    opt = tree(lambda new, old: jnp.where(is_on, new, old), new, opt)
    return (params, stats, opt, average, half), None

  params, stats = split(start)
  carry = params, stats, tx.init(params), start, start
  carry, _ = jax.lax.scan(step, carry, (keys, jnp.arange(MOST_STEPS)))
  params, stats, opt, average, half = carry
  return {
      'end': joined(params, stats), 'average': average, 'half': half,
      'mu': joined(opt.mu, stats), 'nu': joined(opt.nu, stats),
  }  # fmt: skip


def rows_of(stacked, num):
  return [tree(lambda x, k=k: np.asarray(x[k]), stacked) for k in range(num)]


def train(net, seed, data, starts, runs):
  """Runs side by side: dicts of `rate` and perhaps steps, trains, labels."""
  num = len(runs)
  same = np.tile(np.arange(10), (num, len(data['label']), 1))
  rng = np.random.default_rng(seed)
  for k, run in enumerate(runs):
    if run.get('labels') == 'turned':
      same[k] = (same[k] + 3) % 10
    if run.get('labels') == 'noise':
      same[k] = rng.integers(0, 10, same[k].shape)
  trains = {'head': (1.0, 0.0), 'body': (0.0, 1.0)}
  ends = _train(
      net,
      tree(lambda *x: np.stack(x), *starts),
      np.array([r['rate'] * RATES[net] for r in runs], np.float32),
      np.arange(num) + 1000 * seed + 17,
      np.array([int(STEPS * r.get('steps', 1)) for r in runs]),
      np.array([trains.get(r.get('trains'), (1.0, 1.0)) for r in runs]),
      same,
      data,
  )
  return {k: rows_of(jax.device_get(x), num) for k, x in ends.items()}


class World(NamedTuple):
  """A network, its starts and runs, and data to score them."""

  net: str
  seed: int
  starts: list[Any]
  runs: dict[str, list[Any]]
  extra: dict[str, list[Any]]
  rates: dict[str, list[float]]
  data: dict[str, Any]

  @property
  def theta_0(self):
    return self.starts[0]

  def logits(self, params, batch):
    return apply(self.net, params, batch['image'])[0]

  def correct(self, params, batch):
    return self.logits(params, batch).argmax(-1) == batch['label']

  def eval_fn(self, part='held_out', size=100):
    batches = evaluation.batched(self.data[part], size)
    return evaluation.mean_of(self.correct, batches)

  def logits_fn(self, part='held_out'):
    return evaluation.logits_of(
        self.logits, evaluation.batched(self.data[part], 100)
    )

  def recalibrated(self, params):
    """With the statistics of the training images (of a CNN)."""
    seen = apply(self.net, params, self.data['train']['image'], True)[1]
    return {**params, 'batch_stats': tree(np.asarray, seen)}


def _with_head(net, params, seed, scale=1.0):
  fresh = _init(net, jax.random.key(seed))
  head = (fresh['params'] if net == 'cnn' else fresh)['head']
  head = tree(lambda x: scale * x, head)
  if net == 'cnn':
    return {**params, 'params': {**params['params'], 'head': head}}
  return {**params, 'head': head}


def made(net, seed, folder, groups=None):
  """The world of a network and a seed, from the folder if it is there."""
  data = digits.load(seed, SIZES)
  # Half of them shifted: a related task, which leaves much to learn.
  before = {**data['pretrain']}
  half = before['image'][::2]
  before['image'] = before['image'].copy()
  before['image'][::2] = np.roll(half, 1, (1, 2))
  path = pathlib.Path(folder) / f'{net}_{seed}.pickle'
  if path.exists():
    starts, runs, extra, rates = pickle.loads(path.read_bytes())
    return World(net, seed, starts, runs, extra, rates, data)
  inits = [_init(net, jax.random.key(100 * seed + i)) for i in range(2)]
  pre = train(net, seed, before, inits, [dict(rate=1.0, steps=3)] * 2)
  starts = pre['end']
  runs, first = [], []
  for name, group in (groups or GROUPS).items():
    for i, rate in enumerate(group['rates']):
      start = starts[group.get('start', 0)]
      if 'head' in group:
        own = 7 + i if group['head'] == 'own' else 7
        start = _with_head(net, start, 1000 * seed + own)
      settings = {k: v for k, v in group.items() if k not in ('rates', 'start')}
      runs.append({**settings, 'rate': rate, 'group': name})
      first.append(start)
  ends = train(net, seed, data['train'], first, runs)
  of = lambda kind: {
      name: [x for x, r in zip(ends[kind], runs) if r['group'] == name]
      for name in groups or GROUPS
  }
  # Each fine-tuned from the one before.
  chain = [of('end')['good'][0]]
  for k in range(3):
    run = [dict(rate=0.7, steps=0.5)]
    chain += train(net, seed + 31 * k, data['train'], chain[-1:], run)['end']
  extra = {k: of(k)['good'] for k in ('average', 'half', 'mu', 'nu')}
  extra['chain'] = chain
  extra['new head start'] = [_with_head(net, starts[0], 1000 * seed + 7)]
  rates = {
      name: list(group['rates']) for name, group in (groups or GROUPS).items()
  }
  path.parent.mkdir(parents=True, exist_ok=True)
  path.write_bytes(pickle.dumps((starts, of('end'), extra, rates)))
  return World(net, seed, starts, of('end'), extra, rates, data)
