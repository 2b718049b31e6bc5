"""Layers one at a time: what runs them, where their activations lie, what is measured of these, and what a stopped run left."""
