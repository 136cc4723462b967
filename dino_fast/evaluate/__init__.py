"""Scores of a trained backbone: `knn.py`, `linear.py`, `finetune.py`, `retrieval.py` and `copies.py`.

`online_knn.py` scores it during a run, and `suite.py` does all that the data at hand allow.

`neighbors.py` shows what a backbone takes for alike. `features.py` computes the features of labeled shards, and
`search/describer.py` those of any images. `arguments.py` has the flags that all commands share.
"""
