"""Shows a run: figures that follow the notebook's theme, and a report in one HTML file."""
