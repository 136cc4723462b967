"""The demo: a drawn image set, packed, trained on and scored, on a machine with nothing but a CPU."""
