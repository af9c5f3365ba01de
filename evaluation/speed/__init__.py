"""How fast a model generates."""
