"""Optimizers of other libraries, one small adapter each."""

from __future__ import annotations

from . import (
    apex,
    bitsandbytes,
    deepspeed,
    flashoptim,
    optimi,
    pytorch_optimizer,
    timm,
    torch_optim,
    torchao,
    transformer_engine,
)
from .peer import Missing, Peer

ADAPTERS = (
    torch_optim,
    timm,
    pytorch_optimizer,
    optimi,
    flashoptim,
    torchao,
    bitsandbytes,
    deepspeed,
    transformer_engine,
    apex,
)
PEERS: dict[str, Peer] = {peer.name: peer for adapter in ADAPTERS for peer in adapter.PEERS}

__all__ = ["PEERS", "Missing", "Peer"]
