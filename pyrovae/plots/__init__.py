"""Pictures: of data and pairs, of scores, of runs and of comparisons."""
