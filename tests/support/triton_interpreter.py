"""Triton's interpreter, without what it makes anew at every operation though it is always the same.

The kernels' scalars and tiles stay the numbers that they were. And with what triton 3.7 mended: 3.4 to 3.6 take an
array of shape [1] for a number, which numpy since 2.4 does not.
"""

from __future__ import annotations

import dataclasses
from typing import Any


def patch_once() -> None:
    """Mends the interpreter of this process, unless that has been done."""
    from triton.runtime import interpreter

    if interpreter.InterpretedFunction.__call__.__module__ != __name__:
        patch_calls()
        patch_dtypes()
        patch_types()
        patch_tensors()
        patch_reductions()
        leave_out_overflows()


def patch_calls() -> None:
    """A device function finds the language patched, unless it is the first to be called: once a launch is enough."""
    import triton.language as tl
    from triton.runtime import interpreter

    languages: dict[Any, list[Any]] = {}  # those that a function sees

    def call(self: Any, *arguments: Any, **options: Any) -> Any:
        seen = languages.get(self.fn)
        if seen is None:
            found = self.fn.__globals__.values()
            seen = languages[self.fn] = [value for value in found if value is tl or value is tl.core]
        if not all(language.load.__name__ == "<lambda>" for language in seen):
            interpreter._patch_lang(self.fn)
        return self.rewrite()(*arguments, **options)

    interpreter.InterpretedFunction.__call__ = call


def patch_dtypes() -> None:
    """numpy's dtype of one of Triton's is looked up; the interpreter writes the whole table for each look."""
    from triton.runtime import interpreter

    dtype_of, known = interpreter._get_np_dtype, {}

    def look_up(dtype: Any) -> Any:
        scalar = dtype.scalar
        if scalar.name not in known:
            known[scalar.name] = dtype_of(scalar)
        return known[scalar.name]

    interpreter._get_np_dtype = look_up


def patch_types() -> None:
    """Types of one shape and one kind of element share what else is known of them, such as their name."""
    import triton.language as tl

    make, known = tl.block_type.__init__, {}

    def make_of_known_shape(self: Any, element_ty: Any, shape: Any) -> None:
        key = element_ty.name, tuple(shape)
        if key in known:
            vars(self).update(known[key], element_ty=element_ty)
        else:
            make(self, element_ty, shape)
            known[key] = dict(vars(self))

    tl.block_type.__init__ = make_of_known_shape


def patch_tensors() -> None:
    """Tensors of one shape share what says it, and each may be an index."""
    import triton.language as tl
    from triton.runtime import interpreter

    make, known = tl.tensor.__init__, {}

    def make_of_known_shape(self: Any, handle: Any, type: Any) -> None:
        shape = tuple(type.shape) if type.is_block() else ()
        if shape in known:
            self.handle, self.type, self.dtype = handle, type, type.scalar
            self.numel, self.shape = known[shape]
        else:
            make(self, handle, type)
            known[shape] = self.numel, self.shape

    tl.tensor.__init__ = make_of_known_shape

    patch_tensor = interpreter._patch_lang_tensor

    def patch_tensor_and_index(tensor: Any, *scope: Any) -> None:
        patch_tensor(tensor, *scope)
        tensor.__index__ = lambda self: int(self.handle.data.squeeze())

    interpreter._patch_lang_tensor = patch_tensor_and_index


def patch_reductions() -> None:
    """A sum of the kernels' own is taken of halves, as on a GPU: the interpreter adds one element after the other."""
    from triton.runtime import interpreter

    one_by_one = interpreter.ReduceOps.generic_reduce

    def by_halves(self: Any, tensors: Any) -> Any:
        arrays, dtypes = [one.handle.data for one in tensors], [one.dtype for one in tensors]
        count = arrays[0].size
        if arrays[0].ndim != 1 or count & (count - 1) or self.keep_dims:
            return one_by_one(self, tensors)
        while count > 1:
            count //= 2
            halves = [half for part in (slice(None, count), slice(count, None)) for half in (a[part] for a in arrays)]
            made = self.combine_fn.fn(*map(self.to_tensor, halves, 2 * dtypes))
            arrays = [one.handle.data for one in (made if isinstance(made, tuple) else (made,))]
        return [self.to_tensor(array[0], dtype) for array, dtype in zip(arrays, dtypes, strict=True)]

    interpreter.ReduceOps.generic_reduce = by_halves


def leave_out_overflows() -> None:
    """Integers are computed once: the interpreter asserts nothing of the second time, which is to find overflows."""
    from triton.runtime import interpreter

    builder = interpreter.interpreter_builder
    if not builder.options.debug:
        builder.options = dataclasses.replace(builder.options, sanitize_overflow=False)
