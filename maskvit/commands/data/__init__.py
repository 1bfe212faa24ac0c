"""Data sets: packing them (`maskvit.data.builders`), looking at what a config reads, making maps for pictures that have none."""
