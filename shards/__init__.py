"""Pack images into WebDataset tar shards, and read samples out of them by number."""
