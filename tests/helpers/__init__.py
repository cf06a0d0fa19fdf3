"""What several test modules use: small models, recipes, processes, and the reading of what a run left."""
