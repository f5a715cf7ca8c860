"""Which backend serves, and what each is held to: instruction sets, CUDA on the host, Triton, their machine code."""
