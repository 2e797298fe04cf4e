"""Scores of image folders: FID with its floor, tokenizer reconstruction, a small probe classifier.

``evaluation.evaluate_folders`` is the whole job (what ``retinar evaluate`` runs); ``features.FeatureStore`` and
``fid.frechet_distance`` are its parts for callers that hold arrays.
"""
