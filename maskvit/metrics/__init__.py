"""What a run measures of itself: sums, rates, progress, and where they are written; and the figures of merit of predictions."""
