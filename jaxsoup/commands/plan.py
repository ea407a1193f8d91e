"""`jaxsoup plan`: what an experiment needs on machines you do not have."""

import json
import os
import pathlib
from typing import Annotated

import typer

import jaxsoup
from jaxsoup import _files
from jaxsoup.commands import _common

# What a plan of ours begins with.
_MARKER = '"jaxsoup": '
_READ_RATE = 1.0


def plan(
    config: Annotated[
        str,
        typer.Option(metavar='FILE[:ARG]', help='Config of the experiment.'),
    ],
    topology: Annotated[
        str | None,
        typer.Option(
            metavar='KIND:SHAPE',
            help='TPUs to compile for, such as v5e:8x8, v5p:4x4x4, v6e:8x8. '
            'No TPU is needed.',
        ),
    ] = None,
    devices: Annotated[
        int | None,
        typer.Option(
            min=1,
            max=4096,
            help='Instead of --topology: number of virtual CPU devices.',
        ),
    ] = None,
    ingredients: Annotated[
        int | None,
        typer.Option(
            min=1,
            help='Number of ingredients. Default: the runs of the sweep.',
        ),
    ] = None,
    chip: Annotated[
        str | None,
        typer.Option(
            metavar='NAME',
            help='With --devices: predict for this chip, such as H100, of its '
            'memory and peak rates. The compiler remains that of CPUs.',
        ),
    ] = None,
    read_rate: Annotated[
        float | None,
        typer.Option(
            metavar='GB/S',
            help='What one host reads from storage, for predicted seconds. '
            f'Default: {_READ_RATE:g} for a chip, none for CPUs.',
        ),
    ] = None,
    utilisation: Annotated[
        float,
        typer.Option(
            max=1.0,
            help='Share of the peak rate of a chip that programs reach, for '
            'predicted seconds.',
        ),
    ] = 0.4,
    json_file: Annotated[
        pathlib.Path | None,
        _common.path_option(
            '--json',
            help='Also write the plan to this file, as JSON.',
        ),
    ] = None,
) -> None:
  """Compiles an experiment for machines you do not have: what would fit?"""
  if (topology is None) == (devices is None):
    raise typer.BadParameter(
        'give either --topology or --devices.', param_hint='--topology'
    )
  if topology is not None and chip is not None:
    raise typer.BadParameter(
        'the topology names the chip: leave it out.', param_hint='--chip'
    )
  for name, value in ('--read-rate', read_rate), ('--utilisation', utilisation):
    if value is not None and not 0 < value < float('inf'):
      raise typer.BadParameter(
          f'{value} is not a rate: give a number above 0.', param_hint=name
      )
  if json_file is not None and not json_file.absolute().parent.is_dir():
    raise typer.BadParameter(
        f'the directory {json_file.parent} does not exist.', param_hint='--json'
    )
  # Before jax looks for devices. There is no TPU, only its compiler.
  flag = '--xla_force_host_platform_device_count'
  os.environ['XLA_FLAGS'] = (
      f'{os.environ.get("XLA_FLAGS", "")} {flag}={devices or 1}'.strip()
  )
  with _common.failures():
    if json_file is not None:
      _files.require_ours(json_file, _MARKER)
    import jax

    jax.config.update('jax_platforms', 'cpu')
    # The seconds are those of the compiler, and jax 0.7 cannot cache programs
    # for machines that it does not have.
    jax.config.update('jax_enable_compilation_cache', False)
    from jaxsoup import _json
    from jaxsoup import plan as plan_lib
    from jaxsoup.experiments import configs
    from jaxsoup.plan import machines
    from jaxsoup.plan import text

    experiment = configs.load(config)
    if topology is not None:
      mesh, device_bytes = machines.topology_mesh(topology)
      chip = topology.partition(':')[0]
    else:
      mesh, device_bytes = machines.cpu_mesh(devices or 1, chip)
    if read_rate is None and chip is not None:
      read_rate = _READ_RATE
    made = plan_lib.make(
        experiment,
        mesh,
        device_bytes,
        num_ingredients=ingredients or len(experiment.runs),
        machine=topology or chip or 'CPU',
        rates=machines.Rates(chip or '', utilisation, read_rate),
        on_program=lambda p: _common.echo(
            f'{p.name}: compiled in {p.seconds:.1f} s', err=True
        ),
    )
    if json_file is not None:
      content = {'jaxsoup': jaxsoup.__version__, **_json.plain(made)}
      with _files.replaced(json_file, _MARKER) as unfinished:
        unfinished.write_text(json.dumps(content, indent=1))
  _common.echo(text.as_text(made))
