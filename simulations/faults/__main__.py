"""Runs the fault matrix."""

from proxymoe.simulations.faults.cli import main

if __name__ == "__main__":
    main()
