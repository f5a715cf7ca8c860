"""What does not take the fast path is said once: the log of one optimizer."""

from __future__ import annotations

from .backends import logger


class FallbackLog:
    """Writes one line for each kind of fallback of an optimizer.

    Args:
        name: the optimizer's class.
    """

    def __init__(self, name: str) -> None:
        self._name = name
        self._said: set[str] = set()

    def serves(self, what: str, reason: str, kind: str | None = None, served_by: str = "eager") -> None:
        """Say that another path serves ``what`` than the best there is, and why."""
        path = "eager path" if served_by == "eager" else f"{served_by} backend"
        self.once(kind or reason, "%s: the %s serves %s: %s", path, what, reason)

    def once(self, kind: str, message: str, *arguments: str) -> None:
        """Say what happens, the first time that this kind of thing does; ``message`` begins with the name."""
        if kind not in self._said:
            self._said.add(kind)
            logger.warning(message, self._name, *arguments)
