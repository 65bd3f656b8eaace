"""Looking at many runs: what became of them, their curves, and what tells them apart."""
