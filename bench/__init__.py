"""The bench harness; installed as `fused_optim.bench`."""
