"""Data sets: packing them (`maskvit.data.builders`) and looking at what a config reads."""
