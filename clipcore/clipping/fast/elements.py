"""LLVM instructions for the elements of arrays: those of two bytes too, with which Numba cannot compute."""

from __future__ import annotations

import functools
from typing import Any


class Elements:
    """Instructions for `lanes` neighbours in an array like one of `compiler.LIKE`, which `name` is the dtype of."""

    def __init__(self, builder: Any, name: str, lanes: int) -> None:
        from llvmlite import ir

        self._builder, self._lanes, self._ir = builder, lanes, ir
        self._half, self._bfloat = name == "uint16", name == "int16"
        self._float, self._double, self._word = map(self._wide, (ir.FloatType(), ir.DoubleType(), ir.IntType(32)))
        self._bits = {"float32": 32, "float64": 64}.get(name, 16)
        self._stored = {"float32": ir.FloatType(), "float64": ir.DoubleType()}.get(name, ir.IntType(16))
        # Where a square is exact in float64, an instruction that multiplies and adds at once changes no bit.
        self._flags = () if name == "float64" else ("contract",)

    def view(self, array: Any, address: Any, count: Any) -> Any:
        from numba.np.arrayobj import populate_array

        data = self._builder.inttoptr(address, self._stored.as_pointer())
        size = address.type(self._bits // 8)
        populate_array(array, data=data, shape=[count], strides=[size], itemsize=size, meminfo=None)
        return array._getvalue()

    def load(self, address: Any, index: Any) -> Any:
        return self._to_double(self._load(address, index))

    def store(self, address: Any, index: Any, value: Any) -> None:
        self._store(address, index, value)

    def multiply(self, source: Any, target: Any, index: Any, factor: Any) -> None:
        value = self._load(source, index)
        if value.type != factor.type:
            factor = self._builder.fptrunc(factor, self._float)
        self._store(target, index, self._builder.fmul(value, factor))

    def multiply_all(self, source: Any, target: Any, ahead: Any, index: Any, factor: Any) -> None:
        self._prefetch(source, ahead, index)
        self.multiply(source, target, index, self._in_each(factor))

    def multiply_each(self, source: Any, target: Any, ahead: Any, index: Any, factors: Any) -> None:
        self._prefetch(source, ahead, index)
        vector = self._builder.load(self._lanes_at(factors, index), align=4)
        self.multiply(source, target, index, vector)

    def add_squares(self, address: Any, index: Any, sums: Any) -> None:
        self._add(self._squares(address, index), index, sums)

    def add_four_squares(self, address: Any, step: Any, ahead: Any, index: Any, sums: Any) -> None:
        self._prefetch(address, ahead, index)
        total = self._squares(address, index)
        for _ in range(3):
            address = self._builder.add(address, step)
            self._prefetch(address, ahead, index)
            total = self._builder.fadd(self._squares(address, index), total, flags=self._flags)
        self._add(total, index, sums)

    def add_spikes(self, grads: Any, moments: Any, ahead: Any, index: Any, threshold: Any, sums: Any) -> None:
        self._prefetch(grads, ahead, index)
        self._prefetch(moments, ahead, index)
        limit = self._builder.fmul(self._in_each(threshold), self._single(moments, index))
        over = self._builder.fcmp_ordered(">", self._squares(grads, index), limit)
        one, none = (self._constant(self._double, value) for value in (1.0, 0.0))
        self._add(self._builder.select(over, one, none), index, sums)

    def advance_all(
        self, grads: Any, moments: Any, after: Any, index: Any, decay: Any, rest: Any, largest: Any
    ) -> None:
        builder, most = self._builder, self._in_each(largest)
        kept = builder.fmul(self._in_each(decay), self._single(moments, index))
        moved = builder.fadd(kept, builder.fmul(self._in_each(rest), self._squares(grads, index)))
        moved = builder.select(builder.fcmp_ordered(">", moved, most), most, moved)
        builder.store(builder.fptrunc(moved, self._float), self._pointer(after, index, self._ir.FloatType()), align=4)

    def _single(self, address: Any, index: Any) -> Any:
        """Elements of a float32 array as double."""
        value = self._builder.load(self._pointer(address, index, self._ir.FloatType()), align=4)
        return self._builder.fpext(value, self._double)

    def _in_each(self, value: Any) -> Any:
        """A number in each lane."""
        undefined = self._ir.Constant(self._wide(value.type), self._ir.Undefined)
        vector = self._builder.insert_element(undefined, value, self._int(0))
        return self._builder.shuffle_vector(vector, vector, self._ir.Constant(self._word, [0] * self._lanes))

    def _prefetch(self, address: Any, ahead: Any, index: Any) -> None:
        byte, word = self._ir.IntType(8).as_pointer(), self._ir.IntType(32)
        kind = self._ir.FunctionType(self._ir.VoidType(), [byte, word, word, word])
        prefetch = self._builder.module.declare_intrinsic("llvm.prefetch", [byte], kind)
        start = self._pointer(self._builder.add(address, ahead), index, self._stored)
        reading, keep, data = word(0), word(3), word(1)
        self._builder.call(prefetch, [self._builder.bitcast(start, byte), reading, keep, data])

    def _add(self, squares: Any, index: Any, sums: Any) -> None:
        at = self._lanes_at(sums, index)
        total = self._builder.fadd(squares, self._builder.load(at, align=8), flags=self._flags)
        self._builder.store(total, at, align=8)

    def _squares(self, address: Any, index: Any) -> Any:
        value = self._load(address, index)
        if self._half:
            # exact in float32 as well, with half as many numbers to convert
            return self._to_double(self._builder.fmul(value, value))
        value = self._to_double(value)
        return self._builder.fmul(value, value, flags=self._flags)

    def _load(self, address: Any, index: Any) -> Any:
        """As float, or of float64 as double."""
        builder = self._builder
        value = builder.load(self._pointer(address, index, self._stored), align=self._bits // 8)
        if self._half:
            return builder.fpext(builder.bitcast(value, self._wide(self._ir.HalfType())), self._float)
        if self._bfloat:
            word = builder.shl(builder.zext(value, self._word), self._constant(self._word, 16))
            return builder.bitcast(word, self._float)
        return value

    def _store(self, address: Any, index: Any, value: Any) -> None:
        """From float or double, rounded once, to nearest even."""
        builder, narrow = self._builder, self._half or self._bfloat
        if narrow:
            value = self._to_odd(value) if value.type == self._double else value
            value = self._to_half(value) if self._half else self._to_bfloat(value)
        elif value.type != self._wide(self._stored):
            value = builder.fptrunc(value, self._float)
        builder.store(value, self._pointer(address, index, self._stored), align=self._bits // 8)

    def _to_double(self, value: Any) -> Any:
        return value if value.type == self._double else self._builder.fpext(value, self._double)

    def _to_half(self, value: Any) -> Any:
        half = self._builder.fptrunc(value, self._wide(self._ir.HalfType()))
        return self._builder.bitcast(half, self._wide(self._stored))

    def _to_bfloat(self, value: Any) -> Any:
        builder, word = self._builder, functools.partial(self._constant, self._word)
        bits = builder.bitcast(value, self._word)
        high = builder.lshr(bits, word(16))
        half = builder.add(builder.and_(high, word(1)), word(0x7FFF))
        rounded = builder.lshr(builder.add(bits, half), word(16))
        # a NaN stays one, whichever of its bits are cut off
        nan = builder.fcmp_unordered("uno", value, value)
        kept = builder.select(nan, builder.or_(high, word(0x40)), rounded)
        return builder.trunc(kept, self._wide(self._stored))

    def _to_odd(self, value: Any) -> Any:
        """A double as a float, cut off, its last bit set where it is inexact: what rounds it on rounds only once."""
        builder = self._builder
        near = builder.fptrunc(value, self._float)
        back = builder.fpext(near, self._double)
        beyond = builder.fcmp_ordered(">", self._absolute(back), self._absolute(value))
        inexact = builder.fcmp_ordered("!=", back, value)
        bits = builder.sub(builder.bitcast(near, self._word), builder.zext(beyond, self._word))
        return builder.bitcast(builder.or_(bits, builder.zext(inexact, self._word)), self._float)

    def _absolute(self, value: Any) -> Any:
        negative = self._builder.fcmp_ordered("<", value, self._constant(value.type, 0.0))
        return self._builder.select(negative, self._builder.fneg(value), value)

    def _wide(self, kind: Any) -> Any:
        return kind if self._lanes == 1 else self._ir.VectorType(kind, self._lanes)

    def _constant(self, kind: Any, value: Any) -> Any:
        return self._ir.Constant(kind, value if self._lanes == 1 else [value] * self._lanes)

    def _int(self, value: int) -> Any:
        return self._ir.Constant(self._ir.IntType(32), value)

    def _pointer(self, address: Any, index: Any, kind: Any) -> Any:
        return self._lanes_at(self._builder.inttoptr(address, kind.as_pointer()), index)

    def _lanes_at(self, start: Any, index: Any) -> Any:
        first = self._builder.gep(start, [index])
        return first if self._lanes == 1 else self._builder.bitcast(first, self._wide(start.type.pointee).as_pointer())
