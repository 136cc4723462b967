"""Bring whole shards close before they are read: the page cache for local disks, verified copies for slow storage."""
