"""What is done to a record between decoding and batching, one file per step."""
