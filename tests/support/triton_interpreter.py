"""Triton's interpreter, without the patching of its language anew at every call of a device function.

That is three fifths of the time of a test; once a launch is enough.
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
