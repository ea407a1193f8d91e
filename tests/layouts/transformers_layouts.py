"""Folders of transformers with shards, and of sentence-transformers."""

import pathlib

import _common
import numpy as np
import sentence_transformers
from sentence_transformers import models
import tokenizers
import torch
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


def _fill(model: torch.nn.Module, seed: int) -> None:
  rng = np.random.default_rng(seed)
  with torch.no_grad():
    for parameter in model.parameters():
      parameter.copy_(
          torch.from_numpy(_common.numbers(rng, tuple(parameter.shape)))
      )


def _save(run: pathlib.Path, seed: int, **options) -> None:
  model = transformers.BertForSequenceClassification(_CONFIG)
  _fill(model, seed)
  model.save_pretrained(run, max_shard_size='1KB', **options)


def _restore(run: pathlib.Path):
  model = transformers.BertForSequenceClassification.from_pretrained(run)
  return dict(model.state_dict())


def _save_sentences(run: pathlib.Path, seed: int) -> None:
  """With a dense layer, whose weights lie in a folder of their own."""
  base = run.parent / f'{run.name}-base'
  transformers.BertModel(_CONFIG).save_pretrained(base)
  vocabulary = {x: i for i, x in enumerate(['[PAD]', '[UNK]', *'abcdef'])}
  tokenizer = tokenizers.Tokenizer(
      tokenizers.models.WordLevel(vocabulary, '[UNK]')
  )
  transformers.PreTrainedTokenizerFast(
      tokenizer_object=tokenizer, pad_token='[PAD]', unk_token='[UNK]'
  ).save_pretrained(base)
  words = models.Transformer(str(base))
  pooling = models.Pooling(words.get_word_embedding_dimension())
  model = sentence_transformers.SentenceTransformer(
      modules=[words, pooling, models.Dense(4, 3)], device='cpu'
  )
  _fill(model, seed)
  model.save(str(run), create_model_card=False)


def _restore_sentences(run: pathlib.Path):
  model = sentence_transformers.SentenceTransformer(str(run), device='cpu')
  return dict(model.state_dict())


LAYOUTS = {
    'sharded_bin': _common.Layout(
        lambda run, seed: _save(run, seed, safe_serialization=False), _restore
    ),
    'sharded_safetensors': _common.Layout(_save, _restore),
    'sentence': _common.Layout(_save_sentences, _restore_sentences),
}

if __name__ == '__main__':
  _common.main(LAYOUTS)
