"""Matrix products of the same rows with one weight or several, each with a low-rank adapter or none."""
