"""The CUDA sources compiled for the processor, and a backend that steps CPU tensors with them."""
