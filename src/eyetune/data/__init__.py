"""Photographs and their labels: tables, splits, preprocessing, augmentation, loading."""
