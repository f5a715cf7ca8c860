"""kozistr's pytorch_optimizer. Its AdamW is torch's own, so it has no row."""

from __future__ import annotations

from .peer import Peer, maker, needs

PEERS = (
    Peer(
        "pytorch-optimizer",
        "pytorch_optimizer",
        {
            "NovoGrad": maker("pytorch_optimizer", "NovoGrad"),
            "LARS": maker("pytorch_optimizer", "LARS"),
            "LAMB": maker("pytorch_optimizer", "Lamb", max_grad_norm=0.0),
            "Lion": maker("pytorch_optimizer", "Lion"),
        },
        needs("pytorch_optimizer", "pip install --no-deps pytorch_optimizer"),
        notes={
            "LARS": "biases and norms are stepped by plain SGD, and the first momentum is dampened",
            "LAMB": "no bias correction; the norm of the parameter is at most 10",
        },
    ),
)
