"""Many devices on one machine, over the same server and client code that a deployment runs."""
