"""Folders of transformers' Flax models: `flax_model.msgpack`.

Versions before 5 have those models.
"""

import pathlib

import _common
import transformers

_CONFIG = transformers.BertConfig(
    vocab_size=8,
    hidden_size=4,
    num_hidden_layers=2,
    num_attention_heads=2,
    intermediate_size=4,
    max_position_embeddings=4,
    num_labels=3,
)


def _save(run: pathlib.Path, seed: int, **options) -> None:
  model = transformers.FlaxBertForSequenceClassification(_CONFIG, seed=0)
  model.params = _common.fill(model.params, seed)
  model.save_pretrained(run, **options)


def _restore(run: pathlib.Path):
  model = transformers.FlaxBertForSequenceClassification.from_pretrained(run)
  return model.params


LAYOUTS = {
    'msgpack': _common.Layout(_save, _restore),
    'msgpack_sharded': _common.Layout(
        lambda run, seed: _save(run, seed, max_shard_size='1KB'), _restore
    ),
}

if __name__ == '__main__':
  _common.main(LAYOUTS)
