"""Scores, their table of predictions, and pictures of both."""
