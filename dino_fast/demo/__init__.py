"""The demo: draw images, pack them, train on them and score the result, on a machine with only a CPU."""
