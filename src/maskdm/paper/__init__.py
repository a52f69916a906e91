"""The paper's tables, and how its experiments are repeated."""
