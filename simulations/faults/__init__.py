"""The fault matrix: everything is killed, cut, filled up or lied to, and what must hold is checked.

`python -m proxymoe.simulations.faults`, or `make faults`.
"""
