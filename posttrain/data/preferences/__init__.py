"""Public preference data in the schemas it is published in, turned into pairs and graded answers of the hierarchy.

`adapt` is the way in. `columns` checks rows, `pairs` reads what says which of two answers is better, `graded` what grades each
answer, `benchmarks` the schemas of RewardBench 2 and RM-Bench.
"""
