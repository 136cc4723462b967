"""What `retrieval.py`, `copies.py` and `neighbors.py` are made of.

`images.py` reads files or shards, `describer.py` and `descriptors.py` turn them into descriptors, `whitening.py`
changes these, and `ranking.py` scores the order in which images are found. `ground_truth.py` and `copydays.py` read
sets.
"""
