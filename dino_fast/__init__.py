"""DINO self-supervised training of image backbones: the model, the step and the run."""

import getpass
import os

try:
    getpass.getuser()
except (KeyError, OSError):
    # A user without a name, as in many containers. torch asks for one to name its cache, in 2.11 even when imported.
    os.environ["LOGNAME"] = f"user-{os.getuid()}"
