"""A checkpoint as one file that other programs run without maskvit, its weights inside.

    python -m maskvit export --checkpoint RUN --dst model.stablehlo [--function predict|features] [--weights ema]

The suffix of --dst says the format: .stablehlo, a program that JAX reads (`jax.export`) on CPU, CUDA and TPU; .onnx, for ONNX Runtime and
others, computed in float32 (by jax2onnx, and compared here with what the model says). The batch has any size.
It takes what `maskvit.load(RUN).predict` takes, in stored units, and gives a dictionary of arrays:

  predict   what a fine-tuned model says: "probabilities", "ids", or "values" (and "meters" where the unit is known)
  features  of the first input, as `python -m maskvit features` writes them: "mean" of the patch tokens, and the "global" token

FILE.json beside it says which inputs and outputs there are, the names of the classes, and the licence of the weights.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import logging
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

import maskvit
from maskvit.core.arguments import check_output
from maskvit.core.errors import add_debug, log_lines, run_command
from maskvit.core.modalities import Modality
from maskvit.core.types import Batch
from maskvit.features import WEIGHTS, LoadedModel, load, said

FUNCTIONS = ("predict", "features")
PLATFORMS = ("cpu", "cuda", "tpu")
LARGEST = 2**31 - 2**24  # bytes of weights: the file's format counts in signed 32 bits, and the program is some megabytes itself

Function = Callable[[Mapping[str, Any]], dict[str, Any]]


class Program(NamedTuple):
    """What is written: `function` of arrays by name, whose shapes behind the batch and dtypes `inputs` holds; `about` it, as JSON."""

    function: Function
    inputs: dict[str, jax.ShapeDtypeStruct]
    about: dict[str, Any]

    def outputs(self) -> dict[str, jax.ShapeDtypeStruct]:
        """By name, behind the batch."""
        forms = {name: jax.ShapeDtypeStruct((1, *form.shape), form.dtype) for name, form in self.inputs.items()}
        return {name: jax.ShapeDtypeStruct(x.shape[1:], x.dtype) for name, x in jax.eval_shape(self.function, forms).items()}


# What a checkpoint computes


def stored_dtype(spec: Modality) -> str:
    """Class ids are int32; numbers uint8 where they are those of pictures (0 to 255, each of which counts), else float32."""
    if spec.kind == "categorical":
        return "int32"
    return "uint8" if np.isclose(spec.scale, 1 / 255) and spec.missing is None else "float32"


def program_of(loaded: LoadedModel, function: str | None = None, compute_dtype: str | None = None) -> Program:
    """What `function` ("predict" or "features"; by default the first where the model was fine-tuned) computes, its weights inside.

    `compute_dtype`: in place of the model's own.
    Raises ValueError for "predict" of a model that was not fine-tuned.
    """
    chosen = function or ("features" if loaded.supervised is None else "predict")
    if chosen == "predict":
        loaded.check_fine_tuned()
    objective = _portable(loaded.supervised if chosen == "predict" else loaded.objective, compute_dtype)
    # On one device, as the program is.
    model, (params, state) = objective.model, jax.tree.map(jnp.asarray, jax.device_get((loaded.params, loaded.state)))
    names = model.inputs if chosen == "predict" else model.inputs[:1]
    call = _answers(objective, params, state) if chosen == "predict" else _features(objective, params)
    specs = {name: model.modality(name) for name in names}
    inputs = {}
    for name, spec in specs.items():
        shape = (*spec.size(model.image_size), *([spec.channels] if spec.kind == "continuous" else []))
        inputs[name] = jax.ShapeDtypeStruct(shape, jnp.dtype(stored_dtype(spec)))
    about = dict(
        function=chosen,
        inputs={name: dict(_form(inputs[name]), values=_values(spec)) for name, spec in specs.items()},
        classes=list(loaded.class_names) if chosen == "predict" else [],
        licence=loaded.metadata.get("licence"),
        compute_dtype=model.compute_dtype,
        versions=dict(maskvit=maskvit.__version__, jax=jax.__version__),
    )
    return Program(call, inputs, about)


def _portable(objective: Any, compute_dtype: str | None) -> Any:
    """With plain attention: a kernel for one kind of device has no form on the others."""
    model = dataclasses.replace(objective.model, attention_kernel="plain")
    model = dataclasses.replace(model, compute_dtype=compute_dtype) if compute_dtype else model
    return dataclasses.replace(objective, model=model)


def _answers(objective: Any, params: Any, state: Any) -> Function:
    model, target = objective.model, objective.task.target

    def answers(values: Mapping[str, Any]) -> dict[str, Any]:
        found = said(objective, model.inputs, params, state, dict(values))
        unit = model.modality(target).metres_per_count if "values" in found else None
        return found if unit is None else {**found, "meters": found["values"] * jnp.float32(unit)}

    return answers


def _features(objective: Any, params: Any) -> Function:
    return lambda values: objective.predict(params, (), Batch(dict(values)))


def _form(array: Any) -> dict[str, Any]:
    return dict(shape=["b", *array.shape], dtype=str(array.dtype))


def _listed(forms: Mapping[str, Mapping[str, Any]]) -> str:
    return ", ".join(f"{name} {form['dtype']} [{', '.join(map(str, form['shape']))}]" for name, form in forms.items())


def _values(spec: Modality) -> str:
    """What the numbers of an input mean, for a reader of the JSON file."""
    if spec.kind == "categorical":
        return f"class ids 0 to {spec.num_classes - 1}" + ("" if spec.missing is None else ", -1 where there is no label")
    units = "0 to 255" if stored_dtype(spec) == "uint8" else "as stored in the data set"
    return f"{units}; normalized inside" + ("" if spec.missing is None else "; NaN where nothing was measured")


# Formats


def as_stablehlo(program: Program) -> bytes:
    """The program for all of `PLATFORMS`, for `jax.export.deserialize`; the batch is the symbol b."""
    from jax import export

    (b,) = export.symbolic_shape("b")
    inputs = {name: jax.ShapeDtypeStruct((b, *form.shape), form.dtype) for name, form in program.inputs.items()}
    return bytes(export.export(jax.jit(program.function), platforms=PLATFORMS)(inputs).serialize())


def as_onnx(program: Program) -> bytes:
    """The program as an ONNX model, inputs and outputs by our names; the batch is the symbol b.

    Raises ImportError without jax2onnx, ValueError where ONNX Runtime computes something else from the result than the model does.
    """
    try:
        from jax2onnx import to_onnx
    except ImportError as error:
        raise ImportError("writing .onnx needs jax2onnx: pip install 'maskvit[onnx-export]'") from error
    from jax import export

    (b,), names, outputs = export.symbolic_shape("b"), list(program.inputs), list(program.outputs())
    forms = [jax.ShapeDtypeStruct((b, *form.shape), form.dtype) for form in program.inputs.values()]

    def in_order(*values: Any) -> tuple[Any, ...]:
        found = program.function(dict(zip(names, values, strict=True)))
        return tuple(found[name] for name in outputs)

    logging.disable(logging.WARNING)  # the library tells of every tensor whose shape it does not state
    try:
        content = to_onnx(in_order, forms, model_name="maskvit", input_names=names, output_names=outputs).SerializeToString()
    finally:
        logging.disable(logging.NOTSET)
    _compare(program, content)
    return content


def _compare(program: Program, content: bytes) -> None:
    """Raise ValueError unless ONNX Runtime says of random inputs what the program says, for two batch sizes."""
    import onnxruntime

    session, rng = onnxruntime.InferenceSession(content, providers=["CPUExecutionProvider"]), np.random.default_rng(0)
    for count in (1, 2):
        given = {name: rng.integers(0, 2, (count, *form.shape)).astype(form.dtype) for name, form in program.inputs.items()}
        expected = program.function(given)
        for name, found in zip(program.outputs(), session.run(list(program.outputs()), given), strict=True):
            ours = np.asarray(expected[name])
            if np.issubdtype(ours.dtype, np.integer):  # classes: where two are all but equal, either may be said
                wrong = ours.shape != found.shape or np.mean(ours != found) > 0.01
            else:
                wrong = ours.shape != found.shape or not np.abs(ours - found).max() <= 1e-3 * np.abs(ours).max()
            if wrong:
                raise ValueError(f"the ONNX model does not say what the checkpoint says ({name}, {count} samples): nothing was written")


FORMATS: dict[str, Callable[[Program], bytes]] = {".stablehlo": as_stablehlo, ".onnx": as_onnx}
FLOAT32 = (".onnx",)  # formats that are computed in float32: few programs have the operations in bfloat16


def write(path: Path, content: bytes) -> None:
    """A file that appears whole or not at all."""
    partial = path.with_name(path.name + ".partial")
    partial.write_bytes(content)
    os.replace(partial, path)


def beside(dst: Path) -> Path:
    """The JSON file about a program."""
    return dst.with_name(dst.name + ".json")


# The command


def main(argv: Sequence[str] | None = None) -> int:
    """The command; the exit status is 2 where nothing could be written."""
    parser = argparse.ArgumentParser(
        prog="python -m maskvit export", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--checkpoint", required=True, help="a run's workdir, WORKDIR/best, one step's directory, or a converted one")
    parser.add_argument("--dst", required=True, type=Path, help=f"file to write: {' or '.join(FORMATS)}")
    parser.add_argument("--function", choices=FUNCTIONS, help="what it computes (predict where the model was fine-tuned, else features)")
    parser.add_argument("--weights", choices=WEIGHTS, default="params", help="the run's weights, or the average that it kept of them")
    add_debug(parser)
    arguments = vars(parser.parse_args(argv))
    debug = arguments.pop("debug")
    log_lines(debug)
    return run_command(lambda: export_program(**arguments), debug)


def export_program(checkpoint: str, dst: Path, function: str | None, weights: str) -> int:
    """Do what the flags say; the exit status."""
    if dst.suffix not in FORMATS:
        raise ValueError(f"--dst is {str(dst)!r}; its suffix says the format: {' or '.join(FORMATS)}")
    for path in (dst, beside(dst)):
        check_output(path, "--dst")
    loaded = load(checkpoint, weights)
    size = sum(leaf.nbytes for leaf in jax.tree.leaves((loaded.params, loaded.state)))
    if size > LARGEST:
        raise ValueError(f"{checkpoint}: its weights take {size / 2**30:.1f} GiB, and a {dst.suffix} file holds less than 2 GiB")
    program = program_of(loaded, function, "float32" if dst.suffix in FLOAT32 else None)
    outputs = {name: _form(form) for name, form in program.outputs().items()}
    about = dict(program.about, outputs=outputs, checkpoint=str(checkpoint), weights=weights)
    if dst.suffix == ".stablehlo":
        about["platforms"] = list(PLATFORMS)
    content = FORMATS[dst.suffix](program)
    write(dst, content)
    write(beside(dst), (json.dumps(about, indent=2) + "\n").encode())
    print(f"{about['function']}: {_listed(about['inputs'])} to {_listed(outputs)}; {len(content) / 2**20:.1f} MiB written to {dst}")
    print(f"what it takes and gives is told in {beside(dst)}")
    if about["licence"]:
        print(f"licence of these weights: {about['licence']}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
