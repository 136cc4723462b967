"""Training of a whole network on labeled shards, for `finetune.py`.

`recipe.py` has the settings, `classifier.py` the training at one learning rate, and `sweep.py` that at several.
"""
