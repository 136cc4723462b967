"""DINO self-supervised training of image backbones: the model, the step and the run."""
