"""Importance scores: pure functions of statistics and weights."""
