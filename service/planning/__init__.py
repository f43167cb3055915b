"""Planning: the operating point of each sample, and what a fleet can do by when. Pure."""
