"""Triton kernels that do on a GPU, in fewer passes over memory, what modules of `dino_fast` do with torch."""
