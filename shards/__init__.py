"""Images into WebDataset tar shards, and samples out of them by number."""
