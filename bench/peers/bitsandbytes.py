"""bitsandbytes.optim, with 32-bit and with 8-bit states."""

from __future__ import annotations

from .peer import Peer, maker, needs

REMEDY = "pip install --no-deps bitsandbytes"

PEERS = (
    Peer(
        "bitsandbytes",
        "bitsandbytes",
        {
            "AdamW": maker("bitsandbytes.optim", "AdamW32bit"),
            "Adam": maker("bitsandbytes.optim", "Adam32bit"),
            "SGD": maker("bitsandbytes.optim", "SGD32bit"),
            "LARS": maker("bitsandbytes.optim", "LARS32bit"),
            "LAMB": maker("bitsandbytes.optim", "LAMB32bit"),
            "Lion": maker("bitsandbytes.optim", "Lion32bit"),
        },
        needs("bitsandbytes", REMEDY),
        notes={
            "LARS": "its trust ratio bounds the norm of the update",
            "LAMB": "Adam's step, bounded in proportion to the parameter's norm",
        },
    ),
    Peer(
        "bitsandbytes-8bit",
        "bitsandbytes",
        {
            "AdamW": maker("bitsandbytes.optim", "AdamW8bit"),
            "Adam": maker("bitsandbytes.optim", "Adam8bit"),
            "Lion": maker("bitsandbytes.optim", "Lion8bit"),
        },
        needs("bitsandbytes", REMEDY),
        notes=dict.fromkeys(("AdamW", "Adam", "Lion"), "8-bit states for tensors of 4,096 elements and more"),
    ),
)
