"""The headline benchmark: the systems under test, the runs, the results store, and the tables."""
