"""Which operating point each sample runs at, and what a fleet can do by when. Pure."""
