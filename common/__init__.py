"""What server and client must agree on: models, plans, adapters, messages. Imports neither side."""
