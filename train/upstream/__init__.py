"""LlamaGen's scripts under our names: ``python -m retinar.train.upstream.NAME`` takes the flags of its NAME.py.

Every flag does what it does there or is refused with a sentence; files land where they land there, and either program
reads the other's. docs/upstream.md has the tables.
"""
