"""Picture and caption pairs."""
