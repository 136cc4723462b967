"""Images into tar shards: the plan, one shard a task, their assembly."""
