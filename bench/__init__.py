"""The bench harness; installed as `fused_optim.bench`."""

from .shapes import write_shapes

__all__ = ["write_shapes"]
