"""Scores of image folders: FID, KID, precision to coverage, diversity, reconstruction, each with counts and intervals.

``evaluation.evaluate_folders`` is the whole job (what ``retinar evaluate`` runs); ``features.FeatureStore`` and
``fid.frechet_distance`` are its parts for callers that hold arrays.
"""
