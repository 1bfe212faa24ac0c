"""Arrays to pictures, panels, plots and one self-contained HTML page."""
