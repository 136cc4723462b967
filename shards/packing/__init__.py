"""Pack images into tar shards: the plan, one task per shard, then the index and the manifest."""
