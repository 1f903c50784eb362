"""Hyper-parameter search: what is searched, the trials that all workers share, and what came of them."""
