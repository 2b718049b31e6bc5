"""Model families: what their layers look like, what they can become, and how they are read."""
