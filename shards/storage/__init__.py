"""Files of this machine and objects of a store behind the same functions."""
