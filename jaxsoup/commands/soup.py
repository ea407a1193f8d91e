"""`jaxsoup soup`: makes one soup from checkpoints."""

import contextlib
import json
import pathlib
import re
from typing import Annotated
from typing import Any

import typer

from jaxsoup.commands import _common
from jaxsoup.experiments import user_code

RECIPES = (
    'uniform', 'greedy', 'pruned', 'learned', 'model_stock', 'average'
)  # fmt: skip


def soup(
    runs: _common.Runs,
    recipe: Annotated[
        str, typer.Option(help=f'How alpha is chosen: {" | ".join(RECIPES)}.')
    ],
    out: Annotated[
        pathlib.Path,
        typer.Option(
            help='New file NAME.safetensors, or new directory: in Hugging Face '
            'format if all runs are (config.json next to the weights), '
            'otherwise Orbax.'
        ),
    ],
    eval_name: Annotated[
        str | None,
        typer.Option(
            '--eval',
            metavar='PACKAGE.MODULE:FUNCTION',
            help=(
                'greedy, pruned: FUNCTION(params) returns the score on held-out'
                ' data, higher is better. learned: FUNCTION() returns loss_fn,'
                ' batches and optionally val_batches. params are nested dicts.'
            ),
        ),
    ] = None,
    init: Annotated[
        pathlib.Path | None,
        typer.Option(
            help='model_stock: checkpoint that all runs were fine-tuned from.'
        ),
    ] = None,
    alpha: Annotated[
        str | None,
        typer.Option(
            metavar='A,B,...', help='average: mixing coefficient of each run.'
        ),
    ] = None,
    max_shard_size: Annotated[
        str,
        typer.Option(
            metavar='SIZE',
            help='Hugging Face format: largest size of a file, such as 5GB or '
            '500MB; larger soups are split.',
        ),
    ] = '5GB',
    strict: Annotated[
        bool,
        typer.Option(
            '--strict', help='greedy, pruned: reject ties. Default: accept.'
        ),
    ] = False,
    seed: Annotated[
        int | None,
        typer.Option(
            help='greedy: seed of a random order. Default: best score first.'
        ),
    ] = None,
    per_tensor: Annotated[
        bool,
        typer.Option('--per-tensor', help='learned: one alpha per tensor.'),
    ] = False,
    learning_rate: Annotated[
        float, typer.Option(help='learned: learning rate of AdamW.')
    ] = 0.05,
    epochs: Annotated[
        int, typer.Option(min=1, help='learned: number of epochs.')
    ] = 5,
    stream: Annotated[
        bool | None,
        typer.Option(
            '--stream/--no-stream',
            help='learned: read the models in every step, or keep them in '
            'memory. Default: keep them if they fit.',
            show_default=False,
        ),
    ] = None,
    cache_dtype: Annotated[
        str | None,
        typer.Option(
            metavar='DTYPE',
            help='learned, streamed: keep copies in host memory in this dtype,'
            ' such as bfloat16.',
        ),
    ] = None,
    scores: Annotated[
        pathlib.Path | None,
        typer.Option(
            help='greedy, pruned: file of scores, from which a repeated '
            'command resumes.'
        ),
    ] = None,
    item: _common.Item = None,
    shard: Annotated[
        bool, typer.Option('--shard', help='Shard each model over all devices.')
    ] = False,
    distributed: Annotated[
        bool,
        typer.Option(
            '--distributed',
            help='Join the other processes of a TPU pod or Slurm job.',
        ),
    ] = False,
    coordinator: Annotated[
        str | None,
        typer.Option(
            metavar='HOST:PORT',
            help='Join processes elsewhere: address of process 0.',
        ),
    ] = None,
    num_processes: Annotated[
        int | None,
        typer.Option(min=1, help='With --coordinator: number of processes.'),
    ] = None,
    process: Annotated[
        int | None,
        typer.Option(
            min=0, help='With --coordinator: index of this process, from 0.'
        ),
    ] = None,
    timeout: Annotated[
        int,
        typer.Option(min=1, help='Seconds to wait for the other processes.'),
    ] = 300,
    as_json: _common.Json = False,
) -> None:
  """Makes a soup from checkpoints, and saves it with its provenance."""
  if recipe not in RECIPES:
    raise typer.BadParameter(
        f'{recipe!r} is not one of {", ".join(RECIPES)}.', param_hint='--recipe'
    )
  if recipe in ('greedy', 'pruned', 'learned') and eval_name is None:
    raise typer.BadParameter(
        f'{recipe} needs held-out data: --eval package.module:function.',
        param_hint='--eval',
    )
  if recipe == 'model_stock' and init is None:
    raise typer.BadParameter(
        'model_stock needs the initialization.', param_hint='--init'
    )
  if (recipe == 'average') != (alpha is not None):
    raise typer.BadParameter(
        'average needs mixing coefficients; no other recipe takes them.',
        param_hint='--alpha',
    )
  weights, max_shard_bytes = _weights(alpha), _num_bytes(max_shard_size)
  if out.exists():
    raise typer.BadParameter(
        f'{out} exists: give another path.', param_hint='--out'
    )
  if coordinator and (num_processes is None or process is None):
    raise typer.BadParameter(
        'needs --num-processes and --process.', param_hint='--coordinator'
    )
  with _common.failures():
    if distributed or coordinator:
      from jaxsoup.experiments import distributed as distributed_lib

      distributed_lib.start(
          coordinator, num_processes, process, timeout=timeout
      )
      typer.echo(distributed_lib.banner(out), err=True)
    import jax

    from jaxsoup import checkpoints
    from jaxsoup.experiments import locking
    from jaxsoup.experiments import preemption

    is_main = jax.process_index() == 0
    # Next to it, because it exists only when it is complete.
    lock = out.absolute().parent / f'.{out.name}.lock'
    held = locking.locked(lock, out) if is_main else contextlib.nullcontext()
    with preemption.handled() as stop, held:
      if out.exists():  # Since the first look.
        raise FileExistsError(f'{out} exists. Give another path.')
      _refuse_adapters(runs)
      saved = _what_is_saved(recipe, scores)
      ingredients = preemption.Ingredients(
          runs, item=item, stop=stop, saved=saved
      )
      if shard or distributed or coordinator:
        ingredients = ingredients.onto(_sharded(ingredients.abstract_params))
      cook_fn = lambda: _cook(
          recipe,
          ingredients,
          user_code.load(eval_name or ''),
          eval_name=eval_name,
          stop=stop,
          saved=saved,
          theta_0=init and checkpoints.Ingredients([init], item=item)[0],
          alpha=weights,
          strict=strict,
          seed=seed,
          group_fn=(lambda path: path) if per_tensor else None,
          learning_rate=learning_rate,
          epochs=epochs,
          stream=stream,
          cache_dtype=_float_dtype(cache_dtype),
          scores=scores,
      )
      made = _cook_and_save(
          out,
          ingredients,
          cook_fn,
          is_average=recipe in ('uniform', 'average'),
          # As the directories are that come in.
          is_directory=all(map(checkpoints.is_directory, runs)),
          alpha=weights,
          max_shard_bytes=max_shard_bytes,
          metadata={'recipe': recipe, 'seed': seed},
      )
    if is_main:
      _show_soup(made, ingredients, out, recipe, as_json)


def _weights(text: str | None) -> list[float] | None:
  try:
    return None if text is None else [float(x) for x in text.split(',')]
  except ValueError as e:
    raise typer.BadParameter(
        f'{text!r} is not a list of numbers: write 0.5,0.3,0.2.',
        param_hint='--alpha',
    ) from e


def _num_bytes(text: str) -> int:
  match = re.fullmatch(r'(\d+)\s*([KMGT]?)B?', text.strip().upper())
  if match is None or not int(match[1]):
    raise typer.BadParameter(
        f'{text!r} is not a size: write 5GB or 500MB.',
        param_hint='--max-shard-size',
    )
  return int(match[1]) * 1000 ** ' KMGT'.index(match[2] or ' ')


def _refuse_adapters(runs: list[pathlib.Path]) -> None:
  """The average of LoRA factors is not the average of their products."""
  for run in runs:
    if (run / 'adapter_config.json').exists():
      raise ValueError(
          f'{run} is a LoRA adapter. Average adapters with jaxsoup.lora, or '
          'merge each into its base model first.'
      )


def _what_is_saved(recipe: str, scores: pathlib.Path | None) -> str:
  if scores is None or recipe not in ('greedy', 'pruned'):
    return (
        'nothing is saved, and the command starts from scratch (greedy and '
        'pruned keep their scores with --scores)'
    )
  return f'{scores} holds the scores so far'


def _sharded(abstract_params):
  """The same shapes, sharded over all devices of all processes."""
  import jax
  from jax.sharding import AxisType

  from jaxsoup import sharding

  mesh = jax.make_mesh(
      (jax.device_count(),), ('fsdp',), axis_types=(AxisType.Auto,)
  )
  return sharding.fsdp(abstract_params, mesh)


def _float_dtype(name: str | None) -> Any:
  import jax.numpy as jnp

  if name is None:
    return None
  dtype = getattr(jnp, name, None)
  if dtype is None or not jnp.issubdtype(dtype, jnp.floating):
    raise ValueError(
        f'--cache-dtype {name} is not a float dtype: choose bfloat16, float16 '
        'or float32.'
    )
  return dtype


def _cook_and_save(
    out,
    ingredients,
    cook_fn,
    *,
    is_average,
    is_directory,
    alpha,
    max_shard_bytes,
    metadata,
):
  """Makes a soup and saves it, from file to file where that is possible."""
  import jaxsoup
  from jaxsoup import checkpoints

  is_file = out.suffix == '.safetensors'
  is_streamed = is_average and (is_file or is_directory)
  made = None if is_streamed else cook_fn()
  if is_directory and not is_file:
    checkpoints.save_directory(
        out,
        ingredients,
        made,
        alpha=alpha,
        max_shard_bytes=max_shard_bytes,
        metadata=metadata,
    )
  elif is_streamed:
    checkpoints.save_average(
        out,
        ingredients,
        alpha,
        metadata=metadata,
    )
  else:
    checkpoints.save(out, made, ingredients=ingredients, metadata=metadata)
  if is_streamed:
    own = checkpoints.provenance(out)
    made = jaxsoup.Soup(None, own['alpha'], own['info'])
  return made


def _show_plan(plan) -> None:
  mode = 'streamed' if plan.is_streamed else 'resident'
  reads = f'{plan.reads_per_step} reads per step'
  typer.echo(f'learned: {mode}, {reads}; {plan.reason}.', err=True)


def _cook(
    recipe,
    ingredients,
    function,
    *,
    eval_name,
    stop,
    saved,
    theta_0,
    alpha,
    strict,
    seed,
    group_fn,
    learning_rate,
    epochs,
    stream,
    cache_dtype,
    scores,
):
  """The soup of a recipe."""
  import jax
  import optax

  import jaxsoup
  from jaxsoup import checkpoints
  from jaxsoup.experiments import preemption

  log = None
  if scores is not None and recipe in ('greedy', 'pruned'):
    evaluation = user_code.identity(eval_name)
    log = checkpoints.ScoreLog(scores, ingredients, evaluation)
  if recipe == 'uniform':
    return jaxsoup.uniform(ingredients)
  if recipe == 'average':
    return jaxsoup.average(ingredients, alpha)
  if recipe == 'greedy':
    return jaxsoup.greedy(
        ingredients,
        function,
        key=None if seed is None else jax.random.key(seed),
        strict=strict,
        scores=log,
    )
  if recipe == 'pruned':
    return jaxsoup.pruned(
        ingredients,
        function,
        strict=strict,
        scores=log,
    )
  if recipe == 'learned':
    loss_fn, batches, *val_batches = function()
    return jaxsoup.learned(
        ingredients,
        loss_fn,
        preemption.Batches(batches, stop, saved),
        tx=optax.adamw(learning_rate, weight_decay=0.0),
        num_epochs=epochs,
        group_fn=group_fn,
        val_batches=val_batches[0] if val_batches else None,
        stream=stream,
        cache_dtype=cache_dtype,
        on_start=_show_plan if jax.process_index() == 0 else None,
    )
  return jaxsoup.model_stock(ingredients, theta_0)


def _show_soup(made, ingredients, out, recipe, as_json) -> None:
  import numpy as np

  import jaxsoup

  alpha = made.alpha
  if isinstance(alpha, dict):
    import jax

    alpha = np.mean(jax.tree.leaves(alpha), axis=0)
  score = getattr(made.info, 'score', None)
  if as_json:
    rows = dict(zip(ingredients.paths, map(float, alpha)))
    content = {'out': str(out), 'recipe': recipe, 'alpha': rows, 'score': score}
    typer.echo(json.dumps(content))
    return
  for path, value in zip(ingredients.paths, alpha):
    typer.echo(f'{value:8.4f}  {path}')
  if isinstance(made.alpha, dict):
    typer.echo('(alpha: the mean over the tensors)')
  if score is not None:
    singles = [v for m, v in made.info.scores.items() if len(m) == 1]
    # In a random order not every model is scored alone.
    is_known = len(singles) == len(made.alpha)
    best = f', best single {max(singles):.4f}' if is_known else ''
    typer.echo(f'held-out score {score:.4f}{best}')
    rejected = [t.score for t in made.info.trials if not t.accepted]
    num_early = sum(isinstance(s, jaxsoup.AtMost) for s in rejected)
    typer.echo(
        f'{len(made.info.trials)} trials, {len(rejected)} rejections, '
        f'{num_early} of them early'
    )
  typer.echo(f'Soup: {out}')
