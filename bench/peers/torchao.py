"""torchao.optim: low-bit states, one torch.compile'd step for each parameter."""

from __future__ import annotations

from .peer import Peer, maker, needs


def peer(name: str, suffix: str, note: str) -> Peer:
    return Peer(
        name,
        "torchao",
        {kind: maker("torchao.optim", f"{kind}{suffix}") for kind in ("AdamW", "Adam")},
        needs("torchao", "pip install --no-deps torchao"),
        notes=dict.fromkeys(("AdamW", "Adam"), note),
        compiles=True,
    )


PEERS = (
    peer("torchao-8bit", "8bit", "8-bit states"),
    peer("torchao-4bit", "4bit", "4-bit states"),
)
