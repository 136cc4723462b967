"""Files on this machine and objects in a store, behind the same functions."""
