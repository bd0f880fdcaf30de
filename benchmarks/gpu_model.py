"""What a step of GPT-2's size must cost on a GPU at the least: counted, and nothing measured.

    python benchmarks/gpu_model.py [--tiny] [--out benchmarks/results/gpu_model.json]

The step that `fit` takes is traced with shapes alone, so that none of its arrays is made. Its
operations are counted, those of a loop as often as it turns. Memory traffic is counted at products
of matrices, at arrays that the program itself tells XLA to write, and at parameters and moments;
what lies between is taken to be fused. So the time of the roofline, the larger of arithmetic and
traffic at the data sheet's rates, operation by operation, is a bound for this program.
"""

import argparse
import json
import math
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any
from unittest import mock

import jax
import jax.numpy as jnp
from harness import environment
from jax.extend.core import ClosedJaxpr, Jaxpr  # type: ignore[attr-defined]

from probattn.blocks import determinants
from probattn.inference.config import FitConfig, RunConfig
from probattn.inference.fitting.svi import Trainer
from probattn.models import LanguageModelConfig, ObjectiveConfig, transformer

# NVIDIA's data sheet of the H200 SXM, without sparsity. Products of float32 keep its precision.
PEAK = {"bfloat16": 989e12, "float32": 67e12}  # operations in a second
BANDWIDTH = 4.8e12  # bytes in a second

VOCABULARY = 50_257
TINY_VOCABULARY = 101
MODEL = LanguageModelConfig(layers=12, heads=12, width=768, block=1024)
TINY = LanguageModelConfig(layers=2, heads=2, width=16, block=64)
RANKS = 32, 64

# fmt: off
_ARITHMETIC = {
    "abs", "add", "add_any", "asinh", "cos", "div", "erf", "erf_inv", "exp", "exp2", "expm1",
    "integer_pow", "log", "log1p", "logistic", "max", "min", "mul", "neg", "pow", "rsqrt",
    "select_n", "sign", "sin", "sqrt", "square", "sub", "tanh",
}
# fmt: on
_REDUCTIONS = {"argmax", "argmin", "reduce_max", "reduce_min", "reduce_prod", "reduce_sum"}
_KERNEL = "attention_kernel"


@dataclass
class Count:
    """What a program does.

    Attributes:
        products: operations of matrix products, by the dtype that they are multiplied in.
        others: all other arithmetic.
        bytes: traffic that no fusion avoids.
        seconds: the roofline's time.
        largest: bytes and type of the largest array.
    """

    products: Counter = field(default_factory=Counter)
    others: int = 0
    bytes: int = 0
    seconds: float = 0.0
    largest: tuple[int, str] = (0, "")

    def add(self, other: "Count", times: int = 1) -> None:
        """Add another program that runs so many times."""
        for dtype, number in other.products.items():
            self.products[dtype] += times * number
        self.others += times * other.others
        self.bytes += times * other.bytes
        self.seconds += times * other.seconds
        self.largest = max(self.largest, other.largest)

    def moved(self, size: int, operations: int = 0, dtype: str = "float32") -> None:
        """Add traffic, and arithmetic that goes on beside it."""
        self.bytes += size
        self.seconds += max(size / BANDWIDTH, operations / PEAK[dtype])


def count(jaxpr: Jaxpr, *, kernel: bool = False) -> Count:
    """Count the operations of a program.

    Of a condition the cheaper side counts, which is the one that most steps take: the other takes
    back a step, or computes anew what was not accurate. Loops whose length depends on data are of
    that kind too, and count nothing.

    Args:
        jaxpr: the program.
        kernel: whether all of it is one kernel, whose arrays are never written.
    """
    total = Count()
    for equation in _used(jaxpr):
        name, inner = equation.primitive.name, [*_programs(equation.params)]
        if name == "cond":
            sides = [count(side, kernel=kernel) for side in inner]
            total.add(min(sides, key=lambda side: side.seconds))
        elif name == "while":
            pass
        elif inner:
            fused = kernel or equation.params.get("name") == _KERNEL
            times = equation.params["length"] if name == "scan" else 1
            for part in inner:
                total.add(count(part, kernel=fused), times)
            if fused and not kernel:  # what the kernel reads and writes
                arrays = [v for v in (*equation.invars, *equation.outvars) if v.aval.ndim == 4]
                widths = sorted(v.aval.shape[-1] for v in arrays)
                total.moved(sum(_size(v) for v in arrays if v.aval.shape[-1] == widths[0]))
        else:
            total.add(_operation(equation, kernel))
        if not kernel and equation.params.get("name") != _KERNEL:
            for variable in equation.outvars:
                total.largest = max(total.largest, (_size(variable), str(variable.aval)))
    return total


def _used(jaxpr: Jaxpr) -> list[Any]:
    """Return the operations on which a result depends: XLA drops the others."""
    wanted = {id(variable) for variable in jaxpr.outvars}
    kept = []
    for equation in reversed(jaxpr.eqns):
        if equation.effects or any(id(variable) in wanted for variable in equation.outvars):
            kept.append(equation)
            wanted |= {id(variable) for variable in equation.invars}
    return kept[::-1]


def _operation(equation: Any, kernel: bool) -> Count:
    total, name = Count(), equation.primitive.name
    [*outputs], [*inputs] = equation.outvars, equation.invars
    size = sum(map(_size, outputs))
    if name == "dot_general":
        (contracted, _), _ = equation.params["dimension_numbers"]
        length = math.prod(inputs[0].aval.shape[axis] for axis in contracted)
        operations = 2 * length * outputs[0].aval.size
        dtypes = {str(each.aval.dtype) for each in inputs}
        dtype = "bfloat16" if dtypes == {"bfloat16"} or kernel else "float32"
        if kernel:
            operations //= 2  # it leaves out what lies in the future
        total.products[dtype] += operations
        traffic = 0 if kernel else size + sum(map(_size, inputs))
        total.moved(traffic, operations, dtype)
    elif name == "optimization_barrier" and not kernel:
        total.moved(2 * size)
    elif name in _ARITHMETIC | _REDUCTIONS:
        operations = (inputs if name in _REDUCTIONS else outputs)[0].aval.size
        total.others += operations
        total.seconds += operations / PEAK["float32"]
    return total


def _programs(params: dict[str, Any]) -> Iterator[Jaxpr]:
    for value in params.values():
        for each in value if isinstance(value, tuple | list) else [value]:
            if isinstance(each, ClosedJaxpr):
                yield each.jaxpr
            elif isinstance(each, Jaxpr):
                yield each


def _size(variable: Any) -> int:
    aval = variable.aval
    return aval.size * aval.dtype.itemsize if hasattr(aval, "size") else 0


class _Traced(Trainer):
    """A trainer whose steps are never compiled."""

    def _compiled(self, steps: Any) -> Any:
        self.program = steps.jaxpr.jaxpr
        return steps


@contextmanager
def as_on_a_gpu() -> Iterator[None]:
    """Trace what a GPU would be given: its kernel of attention, its sizes of parts."""
    formula = jax.nn.dot_product_attention

    def attention_kernel(query: Any, key: Any, value: Any) -> Any:
        return formula(query, key, value, is_causal=True, implementation="xla")

    # Its derivative computes the weights anew, as the kernel does.
    kernel = jax.checkpoint(jax.jit(attention_kernel))
    with (
        mock.patch.object(transformer, "attends_by_cudnn", return_value=True),
        mock.patch.object(jax.nn, "dot_product_attention", lambda q, k, v, **_: kernel(q, k, v)),
        mock.patch.object(determinants, "AT_ONCE", determinants.AT_ONCE_ELSEWHERE),
    ):
        yield


def step(config: RunConfig, vocabulary: int) -> Jaxpr:
    """Trace one step of a fit."""
    with as_on_a_gpu():
        tokens = jnp.zeros(2 * config.fit.batch * config.model.block + 1, jnp.int32)
        program = _Traced(config, tokens, vocabulary).program
    [steps] = [each for each in program.eqns if each.primitive.name == "while"]
    return steps.params["body_jaxpr"].jaxpr


def row(config: RunConfig, vocabulary: int) -> dict[str, Any]:
    """Count one step and say what it comes to."""
    jaxpr = step(config, vocabulary)
    found = count(jaxpr)
    found.moved(sum(map(_size, [*jaxpr.invars, *jaxpr.outvars])))
    model = config.model
    return {
        "objective": config.objective.name,
        "rank": model.prior_rank if config.objective.has_barrier else None,
        "rematerialise": config.fit.rematerialise,
        "operations_of_products": dict(found.products),
        "other_operations": found.others,
        "bytes": found.bytes,
        "roofline_seconds": found.seconds,
        "largest_array_bytes": found.largest[0],
        "largest_array": found.largest[1],
        "bytes_of_all_logits": 4 * config.fit.batch * model.block * vocabulary,
    }


def gpu_model(*, tiny: bool = False) -> dict[str, Any]:
    """Return the rows: ce, margin at both ranks, and ce with its layers computed anew."""
    vocabulary, model, batch = (TINY_VOCABULARY, TINY, 2) if tiny else (VOCABULARY, MODEL, 32)
    fit = FitConfig(batch=batch, precision="bfloat16")
    ce = RunConfig(model=model, objective=ObjectiveConfig("ce"), fit=fit)
    barriers = [
        replace(ce, model=replace(model, prior_rank=rank), objective=ObjectiveConfig("margin"))
        for rank in RANKS
    ]
    anew = replace(ce, fit=replace(fit, rematerialise=True))
    rows = [row(config, vocabulary) for config in (ce, *barriers, anew)]
    for each in rows:
        each["ratio"] = each["roofline_seconds"] / rows[0]["roofline_seconds"]
    return {
        "device": "NVIDIA H200 SXM, by its data sheet: counted, not measured",
        "peak": PEAK,
        "bandwidth": BANDWIDTH,
        "model": {"layers": model.layers, "heads": model.heads, "width": model.width}
        | {"block": model.block, "batch": batch, "vocabulary": vocabulary},
        "rows": rows,
    }


def report(found: dict[str, Any]) -> None:
    """Print a line for every row."""
    for each in found["rows"]:
        products = ", ".join(
            f"{number / 1e12:.2f} T in {dtype}"
            for dtype, number in each["operations_of_products"].items()
        )
        print(
            f"{each['objective']:6} r = {each['rank']!s:4} anew {each['rematerialise']!s:5} "
            f"{products}, {each['other_operations'] / 1e12:.3f} T other, "
            f"{each['bytes'] / 1e9:.1f} GB, {1e3 * each['roofline_seconds']:.1f} ms at least, "
            f"x {each['ratio']:.3f}, largest {each['largest_array_bytes'] / 2**30:.2f} GiB "
            f"{each['largest_array']}"
        )


def main() -> None:
    """Count the rows that the command line asks for."""
    parser = argparse.ArgumentParser(description="the least cost of a step on a GPU, by count")
    parser.add_argument("--tiny", action="store_true", help="a network that a test can trace")
    results = Path(__file__).parent / "results"
    parser.add_argument("--out", type=Path, default=results / "gpu_model.json")
    options = parser.parse_args()
    found = {"environment": environment()} | gpu_model(tiny=options.tiny)
    report(found)
    options.out.write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")
    print("wrote", options.out)


if __name__ == "__main__":
    main()
