"""`python -m maskvit segment`: a segmenter from a few labeled photos and a frozen encoder."""
