"""Training: one loop, its optimizer and schedule, its tasks, and the folder a run leaves behind."""
