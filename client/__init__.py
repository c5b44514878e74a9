"""The software on a device: personalizes a proxy submodel and sends nothing but an update."""
