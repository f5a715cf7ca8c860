"""The cases that `step` times: shapes, groups and dtype of what an optimizer is given."""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Case:
    """`groups` param groups of `tensors` tensors of `numel` elements each."""

    name: str
    groups: int
    tensors: int
    numel: int
    dtype: torch.dtype = torch.float32
    default_device: str | None = None  # torch.set_default_device while stepping

    def param_groups(self) -> list[dict[str, list[torch.nn.Parameter]]]:
        generator = torch.Generator().manual_seed(0)
        groups = []
        for _ in range(self.groups):
            params = [torch.randn(self.numel, generator=generator).to(self.dtype) for _ in range(self.tensors)]
            groups.append({"params": [torch.nn.Parameter(param) for param in params]})
            for param in groups[-1]["params"]:
                param.grad = torch.randn(self.numel, generator=generator).to(self.dtype)
        return groups


CASES = {
    case.name: case
    for case in (
        Case("150 tensors, 1 group", 1, 150, 16),
        Case("465 groups of 1 tensor", 465, 1, 16),
        Case("1000 tensors, 50 groups", 50, 20, 16),
        Case("150 tensors, 1 group, default device set", 1, 150, 16, default_device="cpu"),
        Case("465 groups of 1 tensor, default device set", 465, 1, 16, default_device="cpu"),
        Case("1000 tensors, 50 groups, default device set", 50, 20, 16, default_device="cpu"),
        Case("8 x 8M float32", 1, 8, 8_000_000),
        Case("8 x 8M bfloat16", 1, 8, 8_000_000, torch.bfloat16),
    )
}
