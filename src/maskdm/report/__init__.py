"""Pictures for people: plots and sheets."""
