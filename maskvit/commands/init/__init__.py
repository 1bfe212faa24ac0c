"""`python -m maskvit init DIR`: looks at pictures or a prepared data set, and writes a config file for them that says why."""
