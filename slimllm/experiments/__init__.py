"""Measurements of the method itself: what each ingredient is worth, and how fast it runs."""
