"""What a run says of itself to a reader: one HTML page and a model card, from the run folder alone."""
