"""Strategies, backbones and seeds side by side: from a request to its cells, from finished cells to one table."""
