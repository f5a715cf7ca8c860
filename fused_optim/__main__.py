"""`python -m fused_optim` prints the configuration."""

from .report.config import show_config

show_config()
