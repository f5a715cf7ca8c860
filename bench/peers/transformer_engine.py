"""TransformerEngine's fused optimizers."""

from __future__ import annotations

from .peer import Peer, maker, needs

MODULE = "transformer_engine.pytorch.optimizers"

PEERS = (
    Peer(
        "transformer-engine",
        "transformer_engine",
        {
            "AdamW": maker(MODULE, "FusedAdam", adam_w_mode=True),
            "Adam": maker(MODULE, "FusedAdam", adam_w_mode=False),
            "SGD": maker(MODULE, "FusedSGD"),
        },
        needs("transformer_engine", "pip install --no-build-isolation transformer_engine[pytorch]"),
        devices=("cuda",),
    ),
)
