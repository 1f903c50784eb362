"""Self-contained HTML: one file, no network, light and dark, phone and paper."""
