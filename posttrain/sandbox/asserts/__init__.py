"""Judging a program by assert statements that it can neither see nor reach.

Asserts run in a process of their own (`judge.py`); what they call runs in another (`subject.py`), and only plain data comes back
(`values.py`). So a program cannot end the judge, replace what it compares with, or print a verdict. Standard library alone.
"""
