"""Models on the Hugging Face hub, by their ids."""

import os
import pathlib
import re
from typing import Any

from jaxsoup.typing import PathLike

_ID = re.compile(r'(\w[\w.-]*)/(\w[\w.-]*)(?:@(.+))?')

# Files without weights that belong to a model. Others may be private.
OF_A_MODEL = (
    'config.json', '*_config.json', 'modules.json', 'LICENSE*', 'NOTICE*',
    'config_sentence_transformers.json',
    'tokenizer*.json', 'tokenizer.model', 'spiece.model', '*.tiktoken',
    'sentencepiece*.model', 'vocab.*', 'merges.txt', 'special_tokens_map.json',
    'added_tokens.json', 'chat_template*', 'configuration_*.py',
    'modeling_*.py', 'tokenization_*.py', '*processing_*.py',
)  # fmt: skip
# Modules of sentence-transformers, which are small.
_MODULES = '[0-9]*_[A-Z]*/*'
# The first of these that a model has are downloaded. The first row leaves out
# other dtypes and other frameworks' copies.
_WEIGHTS = (
    ('model.safetensors', 'model-*-of-*.safetensors', 'model.safetensors.*'),
    ('*.safetensors', '*.safetensors.index.json'),
    ('pytorch_model*.bin', 'pytorch_model.bin.index.json'),
    ('flax_model*.msgpack', 'flax_model.msgpack.index.json'),
)


def local(path: PathLike) -> Any:
  """The directory of a model on the hub, which is downloaded; or the path.

  `ORG/NAME` and `ORG/NAME@REVISION` are models, unless a folder ORG is here:
  then they are paths, which may be misspelled.
  """
  match = _ID.fullmatch(str(path))
  if match is None or os.path.lexists(path) or os.path.lexists(match[1]):
    return path
  try:
    import huggingface_hub
  except ImportError as e:
    raise ImportError(
        f'{path} is not a path here. If it is a model on the Hugging Face hub, '
        "install what downloads it: pip install 'jaxsoup[hub]'."
    ) from e
  name, revision = f'{match[1]}/{match[2]}', match[3]
  for weights in _WEIGHTS:
    patterns = [*OF_A_MODEL, _MODULES, *weights]
    try:
      folder = pathlib.Path(
          huggingface_hub.snapshot_download(
              name, revision=revision, allow_patterns=patterns
          )
      )
    except Exception as e:
      _explain(e, path, name)
      raise
    if any(file for pattern in weights for file in folder.glob(pattern)):
      return folder
  raise FileNotFoundError(
      f'{name} on the Hugging Face hub holds no weights that are read: '
      '.safetensors, pytorch_model.bin or flax_model.msgpack. Give another '
      'model.'
  )


def _explain(error: Exception, path: PathLike, name: str) -> None:
  """Raises an error of the hub in one line that says what to do."""
  from huggingface_hub import constants
  from huggingface_hub import errors

  log_in = 'log in (hf auth login, or HF_TOKEN)'
  if isinstance(error, errors.GatedRepoError):
    said = f'is gated: ask for access on {constants.ENDPOINT}, and {log_in}'
  elif isinstance(error, errors.RepositoryNotFoundError):
    said = (
        'is neither a path here nor a model on the Hugging Face hub that you '
        f'may read. Correct the name; for a private model, {log_in}'
    )
  elif isinstance(error, errors.RevisionNotFoundError):
    said = 'has no such revision. Give a branch, a tag or a commit after the @'
  elif getattr(error, 'errno', None):  # Of the system, as a full disk.
    return
  else:
    reason = str(error.__cause__ or error).strip().split('\n')[0].rstrip('.')
    said = (
        f'is not a path here, and was not downloaded from {constants.ENDPOINT} '
        f'({reason}). Check the connection, or download it where there is one: '
        f'hf download {name}'
    )
  raise FileNotFoundError(f'{path} {said}.') from error
