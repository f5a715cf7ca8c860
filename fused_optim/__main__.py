"""`python -m fused_optim` prints the configuration."""

from .config import show_config

show_config()
