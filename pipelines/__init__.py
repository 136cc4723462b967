"""Turn samples into training batches: order, crop windows, decoding and augmentation.

Everything random is computed from counters, so a batch can be computed again from its step number.
"""
