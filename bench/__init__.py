"""The bench harness; installed as `fused_optim.bench`."""

from .profile import StepProfile, profile_step
from .shapes import write_shapes

__all__ = ["StepProfile", "profile_step", "write_shapes"]
