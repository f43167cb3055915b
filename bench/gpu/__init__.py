"""The measurements of a GPU: one command, and parts that each run in a process of their own."""
