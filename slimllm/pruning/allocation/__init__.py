"""How much goes from each layer."""
