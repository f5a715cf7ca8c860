"""flashoptim: 8-bit states and split master weights, in Triton."""

from __future__ import annotations

from .peer import Peer, maker, needs

NOTE = "8-bit states; 16-bit parameters have 24-bit masters"

PEERS = (
    Peer(
        "flashoptim",
        "flashoptim",
        {
            "AdamW": maker("flashoptim", "FlashAdamW"),
            "Adam": maker("flashoptim", "FlashAdam"),
            "SGD": maker("flashoptim", "FlashSGD"),
            "Lion": maker("flashoptim", "FlashLion"),
        },
        needs("flashoptim", "pip install --no-deps flashoptim"),
        devices=("cuda",),
        notes=dict.fromkeys(("AdamW", "Adam", "SGD", "Lion"), NOTE),
    ),
)
