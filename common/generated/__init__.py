"""Stubs that grpcio-tools made from common/*.proto; the .proto files say how. Never edited."""
