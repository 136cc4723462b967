"""Look into a shard folder: check it against its index, describe it, draw samples."""
