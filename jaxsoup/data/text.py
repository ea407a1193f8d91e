"""Temporary."""
import pathlib
import numpy as np
def tokenizer(path, length):
  import tokenizers
  tok = tokenizers.Tokenizer.from_file(str(pathlib.Path(path, 'tokenizer.json')))
  tok.enable_truncation(length); tok.enable_padding(length=length)
  def fn(texts):
    enc = tok.encode_batch(list(texts))
    return {'input_ids': np.array([e.ids for e in enc], np.int32), 'attention_mask': np.array([e.attention_mask for e in enc], np.int32)}
  return fn
