"""Benchmarks: every arm in one process, interleaved, medians with quartiles, raw JSON beside every claim."""
