"""What a run will do and cost, and what limits it on this machine."""
