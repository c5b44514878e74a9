"""The coordinator: profiles a base model, extracts proxy submodels, aggregates updates, merges."""
