"""What the notebooks need and the engine does not: source listings, plots, checks of exercises."""
