"""The peers: servers as other frameworks' documentation would write them, around the same model."""
