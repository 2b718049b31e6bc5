"""From a pruned model in memory to what a runtime loads, and the proof that it is the same model."""
