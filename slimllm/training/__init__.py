"""Post-training of a pruned model: settings, data, and the run itself."""
