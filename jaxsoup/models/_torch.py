"""Rules of the layers of torch, for tables of names.

```
rules = _torch.layers(
    'block_0/', 'blocks.0.', {'norm_mlp': 'norm2', 'mlp/dense_in': 'mlp.fc1'}
)
```
"""

from collections.abc import Mapping

from jaxsoup.models import _names

QKV = 'query', 'key', 'value'
# Layers that are one in the file.
_FUSED = {
    'qkv': QKV,
    'kv': QKV[1:],
    'dense_gate_in': ('dense_gate', 'dense_in'),
}
# A dense layer that the file holds as a convolution of size 1, [out, in, 1, 1].
pointwise = _names.Layout(
    lambda x, shape: x.T.reshape(shape), lambda x: x.T[..., None, None]
)
# A counter, which with a momentum has no influence.
IGNORED = (r'(.*\.)?num_batches_tracked',)


def layers(
    ours: str,
    theirs: str,
    names: Mapping[str, str],
    *,
    dense: _names.Layout | None = None,
    has_bias: bool = True,
    has_statistics: bool = False,
) -> list[_names.Rule]:
  """The rules of layers; our name of a layer tells what it is.

  Args:
    ours: beginning of our paths.
    theirs: beginning of the names in the file.
    names: by our name of a layer that in the file, to which `.weight` is added,
      or `weight` after an underscore. Ours begin with `norm`, `conv` (without a
      bias) or `scale` (one array by itself); all others are dense, `out` with
      two axes of inputs.
    dense: layout of the kernels of dense layers, if it is not that of torch.
    has_bias: whether dense layers and norms have biases.
    has_statistics: whether norms are BatchNorms.
  """
  rules = []
  for name, their_name in names.items():
    parent, _, last = f'/{ours}{name}'.rpartition('/')
    paths = [f'{parent}/{x}'[1:] for x in _FUSED.get(last, (last,))]
    kind = last.partition('_')[0]
    leaves = {'kernel': ('weight', dense or _names.dense(1 + (last == 'out')))}
    if kind == 'norm':
      leaves = {'scale': ('weight', _names.same)}
    elif kind == 'conv':
      leaves = {'kernel': ('weight', _names.conv)}
    if has_bias and kind != 'conv':
      leaves['bias'] = 'bias', _names.flat
    if has_statistics and kind == 'norm':
      leaves['mean'] = 'running_mean', _names.same
      leaves['var'] = 'running_var', _names.same
    if kind == 'scale':
      rules.append(_names.Rule(paths[0], theirs + their_name))
      continue
    separator = '' if their_name.endswith('_') else '.'
    rules += [
        _names.Rule(
            tuple(f'{path}/{leaf}' for path in paths),
            f'{theirs}{their_name}{separator}{their_leaf}',
            layout,
        )
        for leaf, (their_leaf, layout) in leaves.items()
    ]
  return rules
