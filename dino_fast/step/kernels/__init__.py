"""Triton kernels of the step."""
