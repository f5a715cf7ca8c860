"""optimi (torch-optimi), which keeps a Kahan compensation for 16-bit parameters."""

from __future__ import annotations

from .peer import Peer, maker, needs

PEERS = (
    Peer(
        "optimi",
        "torch-optimi",
        {
            "AdamW": maker("optimi", "AdamW"),
            "Adam": maker("optimi", "Adam"),
            "SGD": maker("optimi", "SGD"),
            "Lion": maker("optimi", "Lion"),
        },
        needs("optimi", "pip install --no-deps torch-optimi"),
    ),
)
