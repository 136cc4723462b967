"""One training step: loss, optimizers, update, and the forms in which it runs."""
