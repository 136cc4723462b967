"""Scores of a trained backbone: `knn.py`, `linear.py`, `retrieval.py`, `copies.py`, and `online_knn.py` during a run.

`neighbors.py` shows what a backbone takes for alike. `features.py` computes the features of labeled shards, and
`search/describer.py` those of any images. `arguments.py` has the flags that all commands share.
"""
