"""DeepSpeed's optimizers, compiled at their first use."""

from __future__ import annotations

from .peer import Peer, maker, needs

missing = needs("deepspeed", "pip install deepspeed")

PEERS = (
    Peer(
        "deepspeed",
        "deepspeed",
        {
            "AdamW": maker("deepspeed.ops.adam", "FusedAdam", adam_w_mode=True),
            "Adam": maker("deepspeed.ops.adam", "FusedAdam", adam_w_mode=False),
            "LAMB": maker("deepspeed.ops.lamb", "FusedLamb"),
            "Lion": maker("deepspeed.ops.lion", "FusedLion"),
        },
        missing,
        devices=("cuda",),
        notes={"LAMB": "its trust ratio is bounded to [0.01, 10]"},
    ),
    Peer(
        "deepspeed-cpu",
        "deepspeed",
        {
            "AdamW": maker("deepspeed.ops.adam", "DeepSpeedCPUAdam", adamw_mode=True),
            "Adam": maker("deepspeed.ops.adam", "DeepSpeedCPUAdam", adamw_mode=False),
            "Lion": maker("deepspeed.ops.lion", "DeepSpeedCPULion"),
        },
        missing,
        devices=("cpu",),
    ),
)
