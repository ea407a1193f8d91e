"""Plans an experiment before it runs: memory, work, communication, seconds.

```
mesh, device_bytes = machines.topology_mesh('v5e:8x8')   # no TPU is needed
made = plan.make(
    experiment,
    mesh,
    device_bytes,
    num_ingredients=58,
    machine='v5e:8x8',
    rates=machines.Rates('v5e', read=1.0),
)
print(text.as_text(made))
```

Lowers what the library runs, at full size, from the shapes and batches of the
run itself, without data, and compiles it with the compiler of the device: that
of TPUs is in the package libtpu, and works on any machine. Seconds are
predicted from rates, see `machines.Rates`.
"""

from jaxsoup.plan.recipes import Plan as Plan
from jaxsoup.plan.recipes import make as make
