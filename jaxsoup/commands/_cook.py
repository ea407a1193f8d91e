"""How one soup is made, saved and shown, whatever the recipe."""

from collections.abc import Callable
import contextlib
import json
import pathlib
from typing import Any

import typer

from jaxsoup.commands import _common
from jaxsoup.commands import _options

NOTHING_SAVED = 'nothing is saved, and the command starts from scratch'


def cook(
    order: _options.Order,
    recipe: str,
    recipe_fn: Callable[[Any], Any] | None = None,
    *,
    alpha: list[float] | None = None,
    seed: int | None = None,
    saved: str = NOTHING_SAVED,
    num_hosts: int | None = None,
    details: dict[str, Any] | None = None,
) -> None:
  """Makes a soup, saves it with its provenance, and shows it.

  Args:
    recipe: its name in Python.
    recipe_fn: `ingredients -> Soup`; None for an average by `alpha` (None: the
      mean), which is computed from file to file where possible.
    saved: what a SIGTERM leaves.
    details: like `seed`, for the provenance; a recipe may still add to it.
    num_hosts: only tell what an average takes on so many.
  """
  with _common.failures():
    if order.distributed:
      from jaxsoup.runtime import distributed

      distributed.start()
      _common.echo(distributed.banner(order.out), err=True)
    import jax

    from jaxsoup.checkpoints import _hub
    from jaxsoup.experiments import stopping
    from jaxsoup.runtime import preemption

    if recipe_fn is None:
      saved = f'what is written so far is kept next to {order.out}'
    is_main = jax.process_index() == 0
    held = _common.held(order.out) if is_main else contextlib.nullcontext()
    with preemption.handled() as stop, held:
      order = order._replace(runs=list(map(_hub.local, order.runs)))
      _refuse_adapters(order.runs)
      options: Any = {
          'item': order.item,
          'whole': order.whole,
          'dtype': order.dtype and order.dtype.value,
          'ignore': order.ignore or (),
          'intersect': order.intersect,
          'align_tokens': order.align_tokens,
          'stop': stop,
          'saved': saved,
      }
      ingredients = stopping.Ingredients(order.runs, **options)
      # All have to fit, which their metadata tell before anything is read. The
      # template below would hide what only others have.
      average = ingredients.streamed(range(len(ingredients)), None, 1)
      if num_hosts is not None:
        _show_cost(average.cost(num_hosts), len(ingredients), num_hosts, order)
        return
      if order.shard or order.distributed:
        from jaxsoup import sharding
        from jaxsoup.train import loop

        mesh = loop.all_devices()
        shapes = sharding.fsdp(ingredients.abstract_params, mesh)
        ingredients = stopping.Ingredients(ingredients.paths, shapes, **options)
      metadata = {} if details is None else details
      metadata |= {'recipe': recipe, 'seed': seed}
      soup = _make_and_save(order, ingredients, recipe_fn, alpha, metadata)
    if is_main:
      _show(soup, ingredients, order, recipe, details or {})


# What a host reads or writes in a second.
_RATE = 1e9


def _show_cost(cost, num_ingredients, num_hosts, order) -> None:
  from jaxsoup import _memory

  if order.as_json:
    typer.echo(json.dumps(cost._asdict()))
    return
  amount = _memory.amount
  seconds = cost.of_a_host / _RATE
  _common.echo(
      f'reads {amount(cost.read)} of {num_ingredients} checkpoints, writes '
      f'{amount(cost.written)}, holds at most {amount(cost.held)} a process\n'
      f'{num_hosts} host{"s" * (num_hosts > 1)}: at most '
      f'{amount(cost.of_a_host)} each, {seconds:.3g} s at 1 GB/s a host'
  )


def _refuse_adapters(runs: list[pathlib.Path]) -> None:
  """The average of LoRA factors is not the average of their products."""
  for run in runs:
    if (run / 'adapter_config.json').exists():
      raise ValueError(
          f'{run} is a LoRA adapter. Average adapters with jaxsoup.lora, or '
          'merge each into its base model first.'
      )


def _make_and_save(order, ingredients, recipe_fn, alpha, metadata):
  """Makes a soup and saves it, from file to file where that is possible."""
  import jaxsoup
  from jaxsoup import checkpoints

  out = order.out
  # As the directories are that come in.
  is_directory = out.suffix != '.safetensors' and all(
      map(checkpoints.is_directory, order.runs)
  )
  soup = recipe_fn(ingredients) if recipe_fn else None
  if is_directory:
    checkpoints.save_directory(
        out,
        ingredients,
        soup,
        alpha=alpha,
        max_shard_bytes=order.max_shard_size,
        metadata=metadata,
        resume=True,
    )
  elif soup is None:
    checkpoints.save_average(
        out, ingredients, alpha, metadata=metadata, resume=True
    )
  else:
    checkpoints.save(out, soup, ingredients=ingredients, metadata=metadata)
  if soup is None:
    own = checkpoints.provenance(out)
    soup = jaxsoup.Soup(None, own['alpha'], own['info'])
  return soup


def _show(soup, ingredients, order, recipe, details) -> None:
  import jax
  import numpy as np

  alpha = soup.alpha
  if isinstance(alpha, dict):
    alpha = np.mean(jax.tree.leaves(alpha), axis=0)
  score = getattr(soup.info, 'score', None)
  if order.as_json:
    rows = dict(zip(ingredients.paths, map(float, alpha)))
    content = {
        'out': str(order.out), 'recipe': recipe, 'alpha': rows, 'score': score,
        'left_out': ingredients.left_out(), **details,
    }  # fmt: skip
    typer.echo(json.dumps(content))
    return
  left_out = ingredients.left_out()
  if left_out:
    is_copy = ingredients.file_at(order.out.absolute()) is not None
    said = 'As in the first run' if is_copy else 'Left out'
    _common.echo(f'{said}: {", ".join(left_out)}. --whole averages them.')
  for path, value in zip(ingredients.paths, alpha):
    _common.echo(f'{value:8.4f}  {path}')
  if isinstance(soup.alpha, dict):
    _common.echo('(alpha: the mean over the tensors)')
  if score is not None:
    _show_search(soup.info, len(ingredients))
  _common.echo(f'Soup: {order.out}')


def _show_search(info, num) -> None:
  import jaxsoup

  if hasattr(info, 'chosen'):  # Of alpha, where nothing is accepted.
    first, made = info.trials[0].score, info.trials[info.chosen]
    _common.echo(f'held-out score {info.score:.4f}, start {first:.4f}')
    _show_metrics(made.metrics)
    _common.echo(f'{len(info.trials)} trials, this one is {info.chosen + 1}')
    return
  singles = [v for m, v in info.scores.items() if len(m) == 1]
  # In a random order not every model is scored alone.
  best = f', best single {max(singles):.4f}' if len(singles) == num else ''
  _common.echo(f'held-out score {info.score:.4f}{best}')
  _show_metrics(info.metrics.get(tuple(sorted(info.accepted)), {}))
  rejected = [t.score for t in info.trials if not t.accepted]
  num_early = sum(isinstance(s, jaxsoup.AtMost) for s in rejected)
  _common.echo(
      f'{len(info.trials)} trials, {len(rejected)} rejections, '
      f'{num_early} of them early'
      + (f'; {info.stale} stale evaluations' if info.stale else '')
  )


def _show_metrics(metrics) -> None:
  if metrics:
    _common.echo(', '.join(f'{name} {x:.4f}' for name, x in metrics.items()))
