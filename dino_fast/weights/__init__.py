"""Files of weights: what checkpoints and other programs' files hold, and how it fits our networks."""
