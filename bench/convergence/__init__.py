"""The error of every solver over the number of steps; `python -m bench.convergence`."""
