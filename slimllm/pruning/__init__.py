"""The method: what it measures, how it chooses, what it removes and how it repairs."""
