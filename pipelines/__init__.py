"""Samples into batches: order, crop windows, colours, decoding. Everything random is computed from counters."""
