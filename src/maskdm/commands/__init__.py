"""The commands of the command line: a function each; its signature and docstring are its help."""
