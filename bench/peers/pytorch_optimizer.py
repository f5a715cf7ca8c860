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
            "LARS": "tensors of one dimension are stepped by plain SGD",
            "LAMB": "the norm of the parameter counts as 10 at most",
        },
    ),
)
