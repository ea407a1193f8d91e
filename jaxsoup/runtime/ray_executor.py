"""Workers of Ray as an executor.

```
import ray

ray.init('auto')
with ray_executor.RayExecutor(8, num_gpus=1) as executor:
  soup = jaxsoup.greedy(ingredients, eval_fn, executor=executor)
```
"""

from collections.abc import Callable
from concurrent import futures
import threading
from typing import Any


class RayExecutor(futures.ThreadPoolExecutor):
  """A `concurrent.futures.Executor` of actors, which keep what they have read.

  A thread for each actor waits for it. After one that died comes another.
  """

  def __init__(self, num_workers: int, **options: Any):
    """Starts an actor when a call needs one.

    Args:
      num_workers: how many actors.
      **options: of an actor, such as `num_cpus`, `num_gpus`, `resources`
        (`{'TPU': 4}`) and `runtime_env`.

    Raises:
      ImportError: ray is not installed.
    """
    try:
      import ray
    except ImportError as e:
      raise ImportError(
          'ray is not installed: pip install "jaxsoup[ray]".'
      ) from e
    super().__init__(num_workers, 'jaxsoup-ray')
    self._engine, self._here = ray, threading.local()
    self._actor = ray.remote(_Actor).options(**options)

  def submit(
      self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any
  ) -> futures.Future[Any]:
    """As of every executor; arguments are pickled."""
    return super().submit(self._run, fn, args, kwargs)

  def _run(self, *call: Any) -> Any:
    if not hasattr(self._here, 'actor'):
      self._here.actor = self._actor.remote()
    try:
      return self._engine.get(self._here.actor.run.remote(*call))
    except self._engine.exceptions.RayTaskError as e:
      raise e.cause from e
    except self._engine.exceptions.RayActorError:
      del self._here.actor
      raise


class _Actor:

  def run(self, fn: Callable[..., Any], args: Any, kwargs: Any) -> Any:
    return fn(*args, **kwargs)
