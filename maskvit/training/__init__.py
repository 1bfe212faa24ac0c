"""Training: the step, the loop, and how a config becomes a run."""
