"""Networks as plain data with pure functions: parameters go in as nested dicts, nothing is stored."""
