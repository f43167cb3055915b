"""The parts of `python -m bench.gpu`: each is a module that is run as a process."""
