"""Optimizers whose parameters are shards: DTensors and FSDP's first kind, on several processes."""
