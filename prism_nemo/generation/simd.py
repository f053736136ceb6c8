"""Vectors of sixteen fp32 numbers for code that numba compiles.

numba leaves it to LLVM to find loops that can run on vectors, and of the loops of attention it finds few: sums that
stay in registers over a loop of unknown length, exponentials, numbers of half the width. Here a vector is a value, and
an operation on it is the instruction that it says, which LLVM cuts to the width of the machine.

Arrays are one-dimensional; ``uint16`` ones hold bf16 numbers, which numba has no type for. Indices are not checked.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic, models, register_model

from prism_nemo.compiled import kept_on_disk

LANES = 16
# Numbers of the right type: numba would compute with a plain one in fp64.
ZERO, ONE, NONE = np.float32(0.0), np.float32(1.0), np.float32(-np.inf)

_FLOAT, _WORD, _HALF = (ir.VectorType(kind, LANES) for kind in (ir.FloatType(), ir.IntType(32), ir.IntType(16)))
# Cephes' expf: e^x = 2^n e^r with |r| <= ln 2 / 2, ln 2 in two parts so that n times the first is exact; relative error
# 2e-7. Outside of the limits the result would be no normal number.
_LOWEST, _HIGHEST, _LOG2E = -87.0, 88.0, 1.44269504088896341
_LN2 = (0.693359375, -2.12194440e-4)
_SERIES = (1.9875691500e-4, 1.3981999507e-3, 8.3334519073e-3, 4.1665795894e-2, 1.6666665459e-1, 5.0000001201e-1)
# Adding 1.5 * 2^23 rounds to a whole number, which is then in the sum's lowest bits.
_ROUNDS = 12582912.0


class VectorType(types.Type):
    """numba's type of a vector."""

    def __init__(self) -> None:
        super().__init__(name="float32x16")


@register_model(VectorType)
class _VectorModel(models.PrimitiveModel):
    def __init__(self, manager: Any, kind: Any) -> None:
        super().__init__(manager, kind, _FLOAT)


vector = VectorType()


def compiled(function: Callable[..., Any]) -> Any:
    """See `prism_nemo.compiled`; what is compiled with these vectors is out of date when this file has changed too."""
    return kept_on_disk(function, made_with=Path(__file__))


def _instruction(function: Callable[..., Any]) -> Any:
    """numba's intrinsic, which has in compiled code other arguments than in Python."""
    return intrinsic(function)


def _constant(value: float) -> ir.Constant:
    return ir.Constant(_FLOAT, [float(np.float32(value))] * LANES)


def _bits(value: int) -> ir.Constant:
    return ir.Constant(_WORD, [value] * LANES)


def _call(builder: Any, name: str, result: ir.Type, *operands: Any, fastmath: tuple[str, ...] = ()) -> Any:
    """An instruction of LLVM's that has the form of a function."""
    kind = ir.FunctionType(result, [operand.type for operand in operands])
    function = cgutils.get_or_insert_function(builder.module, kind, f"llvm.{name}")
    return builder.call(function, operands, fastmath=fastmath)


def _multiply_add(builder: Any, a: Any, b: Any, c: Any) -> Any:
    """``a * b + c``, in one rounding where the machine has it."""
    return _call(builder, f"fmuladd.v{LANES}f32", _FLOAT, a, b, c)


def _pointer(context: Any, builder: Any, kind: types.Array, array: Any, index: Any) -> Any:
    data = context.make_array(kind)(context, builder, array).data
    wide = _HALF if kind.dtype == types.uint16 else _FLOAT
    return builder.bitcast(builder.gep(data, [index]), wide.as_pointer())


def _usable(array: Any) -> bool:
    return (
        isinstance(array, types.Array)
        and array.ndim == 1
        and array.layout == "C"
        and array.dtype in (types.float32, types.uint16)
    )


def _widen(builder: Any, half: Any) -> Any:
    """bf16 to fp32: its bits are the upper ones."""
    return builder.bitcast(builder.shl(builder.zext(half, _WORD), _bits(16)), _FLOAT)


def _lane(number: int = 0) -> ir.Constant:
    return ir.Constant(ir.IntType(32), number)


def _spread(builder: Any, number: Any, wide: ir.VectorType) -> Any:
    """A number in every lane."""
    one = builder.insert_element(ir.Constant(wide, ir.Undefined), number, _lane())
    return builder.shuffle_vector(one, ir.Constant(wide, ir.Undefined), _bits(0))


def _narrow(builder: Any, value: Any) -> Any:
    """fp32 to the nearest bf16, of two the even one; what is no number stays so, where rounding could make it 0."""
    word = builder.bitcast(value, _WORD)
    even = builder.and_(builder.lshr(word, _bits(16)), _bits(1))
    rounded = builder.add(builder.add(word, _bits(0x7FFF)), even)
    none = builder.fcmp_unordered("uno", value, value)
    return builder.trunc(builder.lshr(builder.select(none, _bits(0x7FC00000), rounded), _bits(16)), _HALF)


@_instruction
def load(typingctx: Any, array: Any, index: Any) -> Any:
    """``array[index : index + 16]``."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        kind = signature.args[0]
        found = builder.load(_pointer(context, builder, kind, *arguments), align=kind.dtype.bitwidth // 8)
        return _widen(builder, found) if kind.dtype == types.uint16 else found

    return (vector(array, types.intp), generate) if _usable(array) else None


@_instruction
def store(typingctx: Any, array: Any, index: Any, value: Any) -> Any:
    """``array[index : index + 16] = value``, rounded to the array's type."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        kind = signature.args[0]
        value = _narrow(builder, arguments[2]) if kind.dtype == types.uint16 else arguments[2]
        builder.store(value, _pointer(context, builder, kind, *arguments[:2]), align=kind.dtype.bitwidth // 8)
        return context.get_dummy_value()

    return (types.void(array, types.intp, vector), generate) if _usable(array) else None


@_instruction
def rounded(typingctx: Any, array: Any, value: Any) -> Any:
    """The value as `store` and `load` would give it back."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        half = signature.args[0].dtype == types.uint16
        return _widen(builder, _narrow(builder, arguments[1])) if half else arguments[1]

    return (vector(array, vector), generate) if _usable(array) else None


@_instruction
def number(typingctx: Any, array: Any, index: Any) -> Any:
    """``array[index]`` in fp32."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        kind = signature.args[0]
        data = context.make_array(kind)(context, builder, arguments[0]).data
        found = builder.load(builder.gep(data, [arguments[1]]))
        if kind.dtype == types.float32:
            return found
        wide = builder.shl(builder.zext(found, ir.IntType(32)), ir.Constant(ir.IntType(32), 16))
        return builder.bitcast(wide, ir.FloatType())

    return (types.float32(array, types.intp), generate) if _usable(array) else None


@_instruction
def put(typingctx: Any, array: Any, index: Any, value: Any) -> Any:
    """``array[index] = value``, rounded to the array's type."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        kind = signature.args[0]
        data = context.make_array(kind)(context, builder, arguments[0]).data
        value = arguments[2]
        if kind.dtype == types.uint16:
            value = builder.extract_element(_narrow(builder, _spread(builder, value, _FLOAT)), _lane())
        builder.store(value, builder.gep(data, [arguments[1]]))
        return context.get_dummy_value()

    return (types.void(array, types.intp, types.float32), generate) if _usable(array) else None


@_instruction
def copy(typingctx: Any, target: Any, to: Any, source: Any, at: Any) -> Any:
    """``target[to] = source[at]``, of arrays of one type."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        target, source = (
            context.make_array(kind)(context, builder, array).data
            for kind, array in ((signature.args[0], arguments[0]), (signature.args[2], arguments[2]))
        )
        builder.store(builder.load(builder.gep(source, [arguments[3]])), builder.gep(target, [arguments[1]]))
        return context.get_dummy_value()

    usable = _usable(target) and _usable(source) and target.dtype == source.dtype
    return (types.void(target, types.intp, source, types.intp), generate) if usable else None


@_instruction
def splat(typingctx: Any, number: Any) -> Any:
    """A number in every lane."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return _spread(builder, arguments[0], _FLOAT)

    return vector(types.float32), generate


@_instruction
def fma(typingctx: Any, a: Any, b: Any, c: Any) -> Any:
    """``a * b + c``."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return _multiply_add(builder, *arguments)

    return vector(vector, vector, vector), generate


def _binary(name: str, doc: str) -> Any:
    def operation(typingctx: Any, a: Any, b: Any) -> Any:
        def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            return getattr(builder, name)(*arguments)

        return vector(vector, vector), generate

    operation.__doc__ = doc
    return _instruction(operation)


add = _binary("fadd", "``a + b``.")
sub = _binary("fsub", "``a - b``.")
mul = _binary("fmul", "``a * b``.")
div = _binary("fdiv", "``a / b``.")


@_instruction
def exp(typingctx: Any, value: Any) -> Any:
    """``e^value``; 0 for values below -87, and those above 88 count as 88. Of what is no number, no number."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        (x,) = arguments
        x = builder.select(builder.fcmp_ordered(">", x, _constant(_HIGHEST)), _constant(_HIGHEST), x)
        shifted = _multiply_add(builder, x, _constant(_LOG2E), _constant(_ROUNDS))
        whole = builder.fsub(shifted, _constant(_ROUNDS))
        rest = _multiply_add(builder, whole, _constant(-_LN2[0]), x)
        rest = _multiply_add(builder, whole, _constant(-_LN2[1]), rest)
        series = _constant(_SERIES[0])
        for factor in _SERIES[1:]:
            series = _multiply_add(builder, series, rest, _constant(factor))
        series = _multiply_add(builder, series, builder.fmul(rest, rest), rest)
        series = builder.fadd(series, _constant(1.0))
        exponent = builder.shl(builder.bitcast(shifted, _WORD), _bits(23))
        result = builder.bitcast(builder.add(builder.bitcast(series, _WORD), exponent), _FLOAT)
        result = builder.select(builder.fcmp_ordered("<", x, _constant(_LOWEST)), _constant(0.0), result)
        # The sum of bits could make a number of what is none.
        return builder.select(builder.fcmp_unordered("uno", x, x), x, result)

    return vector(vector), generate


@_instruction
def largest(typingctx: Any, value: Any) -> Any:
    """The largest lane, among those that are numbers."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return _call(builder, f"vector.reduce.fmax.v{LANES}f32", ir.FloatType(), arguments[0])

    return types.float32(vector), generate


@_instruction
def larger(typingctx: Any, a: Any, b: Any) -> Any:
    """The larger one in each lane; of what is no number and a number, the number."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return _call(builder, f"maxnum.v{LANES}f32", _FLOAT, *arguments)

    return vector(vector, vector), generate


@_instruction
def total(typingctx: Any, value: Any) -> Any:
    """The sum of the lanes, in pairs."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        zero = ir.Constant(ir.FloatType(), -0.0)
        name = f"vector.reduce.fadd.v{LANES}f32"
        return _call(builder, name, ir.FloatType(), zero, arguments[0], fastmath=("reassoc",))

    return types.float32(vector), generate


@_instruction
def within(typingctx: Any, value: Any, first: Any, end: Any, other: Any) -> Any:
    """The lanes from `first` to before `end`, and the number `other` in those outside."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        value, first, end, other = arguments
        lanes = ir.Constant(_WORD, list(range(LANES)))
        bounds = [_spread(builder, builder.trunc(bound, ir.IntType(32)), _WORD) for bound in (first, end)]
        inside = builder.and_(builder.icmp_signed(">=", lanes, bounds[0]), builder.icmp_signed("<", lanes, bounds[1]))
        return builder.select(inside, value, _spread(builder, other, _FLOAT))

    return vector(vector, types.intp, types.intp, types.float32), generate
