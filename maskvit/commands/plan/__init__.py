"""What a train step would cost on devices that are not there: the real step, compiled for them, and read kernel by kernel."""
