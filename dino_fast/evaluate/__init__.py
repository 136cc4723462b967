"""Scores of a trained backbone: `knn.py`, `linear.py`, `finetune.py`, and `online_knn.py` during a run.

`features.py` computes the features for all of them, and `arguments.py` has the flags that they share.
"""
