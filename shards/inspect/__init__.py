"""What is in a shard folder: held against its index, described, drawn."""
