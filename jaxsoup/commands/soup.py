"""`jaxsoup soup RECIPE`: makes one soup from checkpoints.

Each recipe is a command, with its own options and those that all share.
"""

from collections.abc import Callable
from collections.abc import Iterator
import contextlib
import functools
import inspect
import logging
import math
from typing import Annotated
from typing import Any

import typer
from typer import core

from jaxsoup.commands import _along
from jaxsoup.commands import _common
from jaxsoup.commands import _cook
from jaxsoup.commands import _options
from jaxsoup.runtime import user_code


class _Recipes(core.TyperGroup):
  """Says what to type if the first word is no recipe."""

  def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
    known = [*self.commands, *ctx.help_option_names]
    if args and args[0] not in known:
      named = (word.replace('_', '-') for word in args)
      recipe = next(
          (name for name in named if name in self.commands), 'uniform'
      )
      ctx.fail(
          f'{args[0]!r} is not a recipe. The recipe comes first: jaxsoup soup '
          f'{recipe} RUN... --out OUT. Recipes: {", ".join(self.commands)}.'
      )
    return super().parse_args(ctx, args)


app = typer.Typer(
    name='soup',
    cls=_Recipes,
    help='Makes a soup from checkpoints, and saves it with its provenance.',
    epilog='If in doubt, make a uniform and a greedy soup, and compare them on '
    'data that selected nothing. Options: jaxsoup soup RECIPE --help.',
    no_args_is_help=True,
    subcommand_metavar='RECIPE RUN... --out OUT',
)
Asked = dict[str, Any]


def _command(function: Callable[..., Asked]) -> None:
  """A command with the options of a recipe, and of `_options.Order`.

  The function takes its own options, and groups of options, such as the order,
  if it asks for them; it returns further arguments of `_cook.cook`, and perhaps
  another order.
  """
  own = inspect.signature(function).parameters
  fields = lambda group: list(inspect.signature(group).parameters.values())
  is_group = lambda p: inspect.isclass(p.annotation)  # Others are Annotated.
  groups = {name: p.annotation for name, p in own.items() if is_group(p)}
  runs, out, *others = fields(_options.Order)
  parameters = [runs, out]
  for name, parameter in own.items():
    if name != 'order':
      parameters += fields(groups[name]) if name in groups else [parameter]
  parameters += others

  @functools.wraps(function)
  def command(**given):
    made = lambda group: group(**{name: given[name] for name in group._fields})
    order = made(_options.Order)
    if given.get('workers', 1) > 1 and (order.shard or order.distributed):
      raise typer.BadParameter(
          'each worker has a whole model on its own device. Choose one.',
          param_hint='--workers with --shard or --distributed',
      )
    options = {n: made(groups[n]) if n in groups else given[n] for n in own}
    asked = {'order': order, **function(**options)}
    _cook.cook(recipe=function.__name__, **asked)

  # Where typer looks.
  vars(command)['__signature__'] = inspect.Signature(parameters)
  command.__annotations__ = {p.name: p.annotation for p in parameters}
  app.command(rich_help_panel='Recipes')(command)


@_command
def uniform(plan: _options.Plan = None) -> Asked:
  """Mean of all runs. Start here: it needs no data."""
  return {'num_hosts': plan}


@_command
def average(alpha: _options.Alpha, plan: _options.Plan = None) -> Asked:
  """Weighted mean, if you know the mixing coefficients."""
  if abs(sum(alpha) - 1) > 1e-3:
    _common.echo(
        f'Warning: alpha sums to {sum(alpha):g}, not 1. It is not normalized: '
        'all parameters are scaled by this sum.',
        err=True,
    )
  return {'alpha': alpha, 'num_hosts': plan}


@_command
def trajectory(
    order: _options.Order,
    steps: _options.Steps = None,
    last: _options.Last = (),  # type: ignore[assignment]
    curves: _options.Curves = (_options.Curve.mean,),  # type: ignore
    best: _options.Best = None,
    metric: _options.Metric = None,
    eval_name: _options.EvalOrNot = None,
    plan: _options.Plan = None,
) -> Asked:
  """Averages the steps of one run: RUN is its directory."""
  with _common.failures():
    if order.whole and eval_name is not None:
      raise ValueError(
          '--eval scores models, and --whole averages all that trains them. '
          'Choose with --eval first, then average that window with --whole.'
      )
    numbers, paths = _along.steps_of_run(order.runs, steps, best, metric)
    alphas = _along.alphas(numbers, last, curves, eval_name is not None)
  used = sum(abs(alpha) for alpha in alphas.values()) > 0
  alphas = {name: alpha[used] for name, alpha in alphas.items()}
  details: dict[str, Any] = {'steps': numbers[used].tolist()}
  paths = [path for path, is_used in zip(paths, used) if is_used]
  order = order._replace(runs=paths)
  asked: Asked = {'order': order, 'details': details, 'num_hosts': plan}
  if eval_name is None:
    ((details['average'], alpha),) = alphas.items()
    return {**asked, 'alpha': alpha.tolist()}

  def recipe_fn(ingredients):
    import jaxsoup

    eval_fn = user_code.load(eval_name)
    best_score, best_soup = -math.inf, None
    for name, alpha in alphas.items():
      soup = jaxsoup.average(ingredients, alpha)
      score = float(eval_fn(soup.params))
      _common.echo(f'{score:8.4f}  {name}', err=True)
      if score > best_score:
        best_score, best_soup = score, soup
        details.update(average=name, score=score)
    if best_soup is None:
      raise ValueError(f'{eval_name} returned no score that is a number.')
    return best_soup

  return {**asked, 'recipe_fn': recipe_fn}


@_command
def model_stock(
    init: Annotated[
        Any,
        typer.Option(
            metavar='PATH',
            parser=_common.checkpoint,
            help='Checkpoint that all runs were fine-tuned from.',
        ),
    ],
    stacks: _options.Stacks = (),  # type: ignore[assignment]
) -> Asked:
  """Mean, pulled to the start where runs disagree. For few runs, no data."""

  def recipe_fn(ingredients):
    import jaxsoup

    # As the last of them, because of what is taken from the first, or left out.
    theta_0 = ingredients.of([*ingredients.paths, init])[-1]
    return jaxsoup.model_stock(ingredients, theta_0, stacks=dict(stacks))

  return {'recipe_fn': recipe_fn}


@_command
def greedy(
    scored: _options.Scored,
    strict: _options.Strict = False,
    seed: Annotated[
        int | None,
        typer.Option(
            min=0,
            max=2**32 - 1,
            help='Seed of a random order. Default: best score first.',
        ),
    ] = None,
) -> Asked:
  """Adds runs while the held-out score does not drop. The safe choice."""

  def recipe_fn(ingredients, **arguments):
    import jax

    import jaxsoup

    key = None if seed is None else jax.random.key(seed)
    return jaxsoup.greedy(ingredients, key=key, strict=strict, **arguments)

  return {**_searched(recipe_fn, scored), 'seed': seed}


@_command
def pruned(scored: _options.Scored, strict: _options.Strict = False) -> Asked:
  """Removes runs while the score does not drop. For mostly good runs."""

  def recipe_fn(ingredients, **arguments):
    import jaxsoup

    return jaxsoup.pruned(ingredients, strict=strict, **arguments)

  return _searched(recipe_fn, scored)


@_command
def search(
    scored: _options.Scored,
    evaluations: Annotated[
        int | None,
        typer.Option(min=1, help='How many candidates are scored.'),
    ] = None,
    minutes: Annotated[
        float | None,
        typer.Option(min=0, help='No candidate is begun later than this.'),
    ] = None,
    method: Annotated[
        _options.Method,
        typer.Option(
            help='cma: CMA-ES. coordinates: more or less of one run at a time. '
            'random: random coefficients, for comparison.'
        ),
    ] = _options.Method.cma,
    space: Annotated[
        _options.Space,
        typer.Option(
            help='simplex: they sum to 1, and none is negative. hyperplane: '
            'they sum to 1.'
        ),
    ] = _options.Space.simplex,
    start: Annotated[
        _options.Start,
        typer.Option(
            help='uniform; greedy: the greedy soup; categories: of several '
            'scores, the best run for each group of those that go together. '
            'The last two score all runs first, in addition to --evaluations.'
        ),
    ] = _options.Start.uniform,
    depth: Annotated[
        int,
        typer.Option(
            min=0,
            help='Arrays whose names begin with the same so many parts share '
            'one coefficient a run. 0: all arrays.',
        ),
    ] = 0,
    seed: Annotated[
        int, typer.Option(min=0, max=2**32 - 1, help='Seed of the search.')
    ] = 0,
    val_objective: _options.ValObjective = None,
    patience: Annotated[
        int | None,
        typer.Option(
            min=0,
            help='Stop after so many rounds without a better --val-objective.',
        ),
    ] = None,
    stacks: _options.Stacks = (),  # type: ignore[assignment]
) -> Asked:
  """Searches the coefficients without a gradient. For any score."""

  def recipe_fn(ingredients, **arguments):
    import jax

    import jaxsoup
    from jaxsoup import black_box

    alpha = None
    if start == _options.Start.greedy:
      alpha = jaxsoup.greedy(ingredients, **arguments).alpha
    elif start == _options.Start.categories:
      # All singles, and no more.
      singles = jaxsoup.greedy(ingredients, max_ingredients=1, **arguments)
      num = len(ingredients)
      alpha = black_box.category_experts(singles.info.metrics, num)
    methods: dict[str, Any] = {
        'cma': black_box.cma_es,
        'random': black_box.random_search,
        'coordinates': black_box.coordinate_search,
    }
    return jaxsoup.search(
        ingredients,
        num_evaluations=evaluations,
        minutes=minutes,
        method=methods[method],
        start=alpha,
        alpha_fn=getattr(jaxsoup, space),
        group_fn=lambda path: path[:depth],
        stacks=dict(stacks),
        key=jax.random.key(seed),
        val_objective=_options.objective_of(val_objective),
        patience=patience,
        **arguments,
    )

  if evaluations is None and minutes is None:
    hint = '--evaluations or --minutes'
    raise typer.BadParameter('give one, or both.', param_hint=hint)
  return {**_searched(recipe_fn, scored), 'seed': seed}


def _searched(recipe_fn: Callable[..., Any], scored: _options.Scored) -> Asked:
  """A recipe that scores candidates, and what a SIGTERM leaves of it."""
  if (scored.eval_name is None) == (scored.command is None):
    hint = '--eval or --score-command'
    raise typer.BadParameter('give one of the two.', param_hint=hint)
  saved = f'{_cook.NOTHING_SAVED} (--scores FILE keeps the scores)'
  if scored.scores is not None:
    saved = f'{scored.scores} holds the scores so far'

  def made(ingredients):
    with scored.arguments(ingredients) as arguments:
      return recipe_fn(ingredients, **arguments)

  return {'recipe_fn': made, 'saved': saved}


@_command
def learned(
    loss_name: Annotated[
        str,
        typer.Option(
            '--loss',
            metavar='MODULE:FUNCTION',
            help='FUNCTION() returns loss_fn, batches of held-out data, and '
            'optionally val_batches. loss_fn(params, batch, beta) gets nested '
            'dicts; beta multiplies the logits.',
        ),
    ],
    per_tensor: Annotated[
        bool, typer.Option('--per-tensor', help='Learn one alpha per tensor.')
    ] = False,
    learning_rate: Annotated[
        float, typer.Option(min=0, help='Learning rate of AdamW.')
    ] = 0.05,
    epochs: Annotated[int, typer.Option(min=1, help='Number of epochs.')] = 5,
    memory: Annotated[
        _options.Memory,
        typer.Option(
            help='resident: keep all models in memory. streamed: read them in '
            'every step. cached: read 16-bit copies in host memory. auto: '
            'resident if they fit, else streamed.'
        ),
    ] = _options.Memory.auto,
    stacks: _options.Stacks = (),  # type: ignore[assignment]
) -> Asked:
  """Learns the coefficients. For a differentiable loss on held-out data."""

  def recipe_fn(ingredients):
    import jax
    import optax

    import jaxsoup

    loss_fn, batches, *val_batches = _problem(loss_name)
    with contextlib.nullcontext() if jax.process_index() else _log_on_stderr():
      return jaxsoup.learned(
          ingredients,
          loss_fn,
          ingredients.stopping(user_code.Guarded(batches, loss_name)),
          tx=optax.adamw(learning_rate, weight_decay=0.0),
          num_epochs=epochs,
          group_fn=lambda path: path if per_tensor else (),
          stacks=dict(stacks),
          val_batches=user_code.Guarded(val_batches[0], loss_name)
          if val_batches
          else None,
          memory=memory.value,  # type: ignore[arg-type]
      )

  return {'recipe_fn': recipe_fn}


def _problem(loss_name: str) -> tuple[Any, ...]:
  """What the function of --loss returns: loss_fn, batches, val_batches."""
  made = user_code.load(loss_name, '--loss')()
  parts = made if isinstance(made, (list, tuple)) else ()
  if len(parts) not in (2, 3) or not callable(parts[0]):
    raise ValueError(
        f'--loss {loss_name} returned {made!r:.80}: expected loss_fn, batches '
        'and perhaps val_batches.'
    )
  file = user_code.file_of(loss_name)
  loss_fn = user_code.guarded(parts[0], file, f'loss_fn of {loss_name}')
  return loss_fn, *parts[1:]


@contextlib.contextmanager
def _log_on_stderr() -> Iterator[None]:
  logger, handler = logging.getLogger('jaxsoup'), logging.StreamHandler()
  level, propagate = logger.level, logger.propagate
  logger.addHandler(handler)
  logger.setLevel(logging.INFO)
  logger.propagate = False  # Or the handler of absl would show it once more.
  try:
    yield
  finally:
    logger.removeHandler(handler)
    logger.setLevel(level)
    logger.propagate = propagate
