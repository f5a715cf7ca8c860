"""Triton's interpreter, without the patching of its language anew at every call of a device function.

That is three fifths of the time of a test; once a launch is enough. And with what triton 3.7 mended: 3.4 to 3.6 take an
array of shape [1] for a number, which numpy since 2.4 does not.
"""

from __future__ import annotations

from typing import Any


def patch_once() -> None:
    """From now on a device function finds the language patched, unless it is the first to be called."""
    import triton.language as tl
    from triton.runtime import interpreter

    def call(self: Any, *arguments: Any, **options: Any) -> Any:
        languages = [value for value in self.fn.__globals__.values() if value is tl or value is tl.core]
        if not all(language.load.__name__ == "<lambda>" for language in languages):
            interpreter._patch_lang(self.fn)
        return self.rewrite()(*arguments, **options)

    interpreter.InterpretedFunction.__call__ = call

    patch_tensor = interpreter._patch_lang_tensor

    def patch_tensor_and_index(tensor: Any, *scope: Any) -> None:
        patch_tensor(tensor, *scope)
        tensor.__index__ = lambda self: int(self.handle.data.squeeze())

    if patch_tensor.__name__ != patch_tensor_and_index.__name__:
        interpreter._patch_lang_tensor = patch_tensor_and_index
