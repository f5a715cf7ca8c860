"""What tests stand on: files by folder, processes that take part in collectives, Triton without a GPU."""
