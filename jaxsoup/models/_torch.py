"""Rules of the layers of torch, for tables of names.

```
rules = [
    *_torch.norm('block_0/norm_mlp', 'blocks.0.norm2'),
    *_torch.dense('block_0/mlp/dense_in', 'blocks.0.mlp.fc1'),
]
```
"""

from collections.abc import Sequence

from jaxsoup.models import _names

QKV = 'query', 'key', 'value'


def norm(ours: str, theirs: str) -> list[_names.Rule]:
  """Scale and bias of a LayerNorm."""
  return [
      _names.Rule(f'{ours}/scale', f'{theirs}.weight'),
      _names.Rule(f'{ours}/bias', f'{theirs}.bias'),
  ]


def dense(
    ours: str | Sequence[str],
    theirs: str,
    num_in: int = 1,
    *,
    separator: str = '.',
) -> list[_names.Rule]:
  """Kernel and bias of a dense layer, or of several fused into one.

  Args:
    ours: path of the layer, or of those that are concatenated.
    theirs: name of the layer in the file.
    num_in: how many axes of our kernel are inputs.
    separator: before `weight`; torch's own attention has `in_proj_weight`.

  Returns:
    The two rules.
  """

  def paths(leaf):
    if isinstance(ours, str):
      return f'{ours}/{leaf}'
    return tuple(f'{path}/{leaf}' for path in ours)

  return [
      _names.Rule(
          paths('kernel'), f'{theirs}{separator}weight', _names.dense(num_in)
      ),
      _names.Rule(paths('bias'), f'{theirs}{separator}bias', _names.flat),
  ]


def qkv(attention: str) -> list[str]:
  """Paths of the three layers of an attention, in the order of fused ones."""
  return [f'{attention}/{name}' for name in QKV]
