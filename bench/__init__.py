"""Measure speed and precision, beside other people's code.

A benchmark compares its arms. They run in turn, round after round, so that a change of the machine's speed affects all
of them alike. Results are medians with quartiles, and every claim has its raw records in bench/results/.
"""
