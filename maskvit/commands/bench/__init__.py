"""How fast it is, and what cheap guidance is worth: `python -m maskvit bench [step|loader|guidance|distillation]`.

`step` times whole train steps of MultiMAE on synthetic batches that lie on the device: random masks, attention-guided
masks, and (where torch is installed) a torch model of the same sizes, in turns inside one run, so that a ratio holds
even where other work slows the machine. It needs JAX, flax and optax, no data library and no plotting. `loader` times
the input pipeline alone. `guidance` times the step with every option of cheap guidance and measures how far the option
agrees with the exact scores on pictures. `distillation` times iBOT's step against AttMask's.

A line of JSON per measurement goes to standard output; the table for the eye goes to standard error.
"""
