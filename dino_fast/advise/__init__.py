"""Advice before a run: what the run will do and cost (`plan`), and what limits it on this machine (`doctor`)."""
