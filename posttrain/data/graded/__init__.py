"""Graded answers without a network: sums worked in steps, with answers that are good or bad in ways that are known.

`worked` takes sums apart, `answers` writes answers of given traits and grades them, `pairs` chooses what two answers of a pair
differ in, `generate` makes records of all three.
"""
