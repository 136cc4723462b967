"""What an image's bytes are: structure, full decode, re-encoding, and whether it becomes a sample."""
